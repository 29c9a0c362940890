"""Rearrangement: swap pruned units for kept ones, with the correlations between units in view.

Kwon et al. 2022, section 4.2, algorithm 2: per block, starting from the diagonal choice, minimise
sum over pruned i, j of F_ij, the block Fisher's quadratic form. With the Gram matrix F (U, U) and
the row sums r = F·1_pruned at hand, the best partner of a pruned unit is found in O(U).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rfprune.stages.float64 import to_float64

MAX_ROUNDS = 10
"""The authors visit every pruned unit once; rounds go on here until no swap helps, or this many."""


def rearrange(mask: Tensor, fisher: Tensor) -> Tensor:
    """Swap units of one block greedily; as many are kept as before.

    Args:
        mask: (U,), zero where a unit is pruned.
        fisher: (U, U), the block's Fisher information.

    Returns:
        A 0/1 mask (U,) whose quadratic form over pruned units is not above that of `mask`.
    """
    fisher = to_float64(fisher)
    pruned = mask == 0
    if not pruned.any() or pruned.all():
        return (~pruned).to(mask.dtype)
    row_sums = fisher @ to_float64(pruned)  # (U,)
    for _ in range(MAX_ROUNDS):
        if not _sweep(pruned, row_sums, fisher):
            break
    return (~pruned).to(mask.dtype)


def _sweep(pruned: Tensor, row_sums: Tensor, fisher: Tensor) -> bool:
    """Offer every pruned unit its best swap once; `pruned` and `row_sums` are updated in place."""
    diagonal = fisher.diagonal()
    tolerance = 1e-12 * float(diagonal.sum())
    swapped = False
    for out in torch.nonzero(pruned).flatten().tolist():
        # the return of `out` takes 2 r_out - F_oo away, then pruning j adds 2 (r_j - F_oj) + F_jj
        returned = 2 * row_sums[out] - diagonal[out]
        change = 2 * (row_sums - fisher[out]) + diagonal - returned  # (U,)
        change[pruned] = torch.inf
        best = int(change.argmin())
        if change[best] < -tolerance:
            pruned[out], pruned[best] = False, True
            row_sums += fisher[best] - fisher[out]
            swapped = True
    return swapped


def quadratic_form(mask: Tensor, fisher: Tensor) -> float:
    """The error that the block Fisher predicts: sum of F_ij over pruned i and j."""
    pruned = (mask == 0).to(fisher.dtype)
    return float(pruned @ fisher @ pruned)
