"""Mask rearrangement: swaps of pruned and kept units that respect the interactions between them.

Kwon et al. 2022, section 4.2 and algorithm 2. In each block, starting from the mask that the
diagonal Fisher information selects, the predicted error Σ F_ij over pruned units i and j is reduced
by greedy swaps, with the block's Fisher information F (U, U). The row sums r_i = Σ F_ij over pruned
j are kept up to date, so the best partner of a pruned unit is found in O(U).

Departure from the authors' code, which visits every pruned unit once: the visits are repeated until
no swap lowers the error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rfprune.stages.float64 import to_float64

MAX_ROUNDS = 10
"""The largest number of visits to each pruned unit."""


def rearrange(mask: Tensor, fisher: Tensor) -> Tensor:
    """Swap pruned and kept units of one block greedily.

    Args:
        mask: (U,), zero where a unit is pruned.
        fisher: (U, U), Fisher information of the block's mask; see
            `rfprune.stages.fisher.block_fisher`.

    Returns:
        A mask (U,) of zeros and ones with as many kept units, whose predicted error is not larger.

    Example:
        Units 0 and 1 are redundant. Each alone is cheap to remove, both together are not:

        >>> import torch
        >>> fisher = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.5]])
        >>> rearrange(torch.tensor([0.0, 0.0, 1.0]), fisher)
        tensor([1., 0., 0.])
    """
    fisher = to_float64(fisher)
    pruned = mask == 0
    if not pruned.any() or pruned.all():
        return (~pruned).to(mask.dtype)
    row_sums = fisher @ to_float64(pruned)  # (U,)
    for _ in range(MAX_ROUNDS):
        if not _visit_pruned_units(pruned, row_sums, fisher):
            break
    return (~pruned).to(mask.dtype)


def _visit_pruned_units(pruned: Tensor, row_sums: Tensor, fisher: Tensor) -> bool:
    """Swap every pruned unit with its best partner; `pruned` and `row_sums` change in place.

    Returns:
        Whether there was any swap.
    """
    diagonal = fisher.diagonal()
    tolerance = 1e-12 * float(diagonal.sum())
    swapped = False
    for i in torch.nonzero(pruned).flatten().tolist():
        # Keeping i lowers the error by 2 r_i - F_ii. Pruning j then adds 2 (r_j - F_ij) + F_jj.
        gain = 2 * row_sums[i] - diagonal[i]
        change = 2 * (row_sums - fisher[i]) + diagonal - gain  # (U,)
        change[pruned] = torch.inf
        j = int(change.argmin())
        if change[j] < -tolerance:
            pruned[i], pruned[j] = False, True
            row_sums += fisher[j] - fisher[i]
            swapped = True
    return swapped


def quadratic_form(mask: Tensor, fisher: Tensor) -> float:
    """The predicted error of a mask: the sum of F_ij over pruned units i and j.

    Args:
        mask: (U,), zero where a unit is pruned.
        fisher: (U, U), Fisher information of the block's mask.
    """
    pruned = (mask == 0).to(fisher.dtype)
    return float(pruned @ fisher @ pruned)
