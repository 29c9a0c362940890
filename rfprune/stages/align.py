"""Alignment: input projections of a pruned model are multiplied by a regression map.

Pruning changes the hidden states. The least-squares fit of an output projection restores them as
far as the kept units of its block can. The remaining error is partly a linear function of the
hidden state. So every projection that is applied to a hidden state x of the student (query, key and
value, the first projection of an FFN) gets W·M and W·m + b in place of W and b, where M·x + m is
the ridge regression of the teacher's hidden state on x. A projection without a bias gets W·M, with
a regression without intercept. This is the least-squares fit of the outputs of all these
projections to the teacher's at once, from two second moments of size (d, d).

This stage is not in Kwon et al. 2022 or in K-prune (Park et al., ICLR 2024); neither changes the
input projections.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rfprune.stages.float64 import to_float64
from rfprune.stages.least_squares import Moments, NumericalFailure, fit_with_validation

RIDGES = (1e-1, 1e-2, 1.0)
"""Candidate ridge strengths, as fractions of the mean diagonal. The prior of M is the identity; the
held-out tokens choose."""


def fit_regression_map(
    train: Moments, held_out: Moments, *, intercept: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The map from the student's hidden states to the teacher's.

    Args:
        train: moments of the student's hidden states (features) and the teacher's (targets).
        held_out: the same of other tokens.
        intercept: whether the map has one; False for projections without a bias.

    Returns:
        M (d, d) and m (d,), float64, with teacher ≈ M·student + m; m is None without an intercept.
        The identity, if the regression does not lower the error on the held-out tokens.

    Raises:
        NumericalFailure: the solve failed.
    """
    size = len(train.gram)
    identity = torch.eye(size, dtype=torch.float64, device=train.gram.device)
    zero = identity.new_zeros(size) if intercept else None
    return fit_with_validation(train, held_out, RIDGES, identity, zero)


def apply_regression_map(
    weight: Tensor, bias: Tensor | None, matrix: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a projection that follows a regression map.

    Args:
        weight: (n, d) of the projection.
        bias: (n,) of the projection, or None.
        matrix: M (d, d).
        shift: m (d,); None for a projection without a bias.

    Returns:
        W·M (n, d) and W·m + b (n,), or None, with the dtype and device of `weight`.

    Raises:
        NumericalFailure: the product is not finite in that dtype.
    """
    exact = to_float64(weight, matrix.device)
    new_weight = (exact @ matrix).to(weight)
    new_bias = None
    if bias is not None and shift is not None:
        new_bias = bias + (exact @ shift).to(weight)
    if not all(torch.isfinite(new).all() for new in (new_weight, new_bias) if new is not None):
        raise NumericalFailure("the aligned weights are not finite")
    return new_weight, new_bias
