"""Readers of a student's hidden states see the best linear estimate of the teacher's.

Pruning moves the hidden states. Least squares on an out-projection brings them back as far as the
kept units of that block can; what is left is still partly a linear function of the whole hidden
state. So every projection that reads a hidden state x of the student (query, key and value, the
first half of an FFN, the head's first linear map) gets W·M and b + W·m in place of W and b, with
M·x + m the ridge estimate of the teacher's hidden state from x (M·x alone where a projection has no
bias to take m). That is the least-squares fit of
all these projections' outputs to the teacher's at once, from two second moments of size (d, d).
Neither Kwon et al. 2022 nor K-prune (ICLR 2024) touches what reads the hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rfprune.model.linear import weight_of
from rfprune.stages.float64 import to_float64
from rfprune.stages.least_squares import Moments, NumericalFailure, fit_with_validation

RIDGES = (1e-1, 1e-2, 1.0)
"""As fractions of the mean diagonal, drawing M to the identity; held-out tokens choose."""


def fit_regression_map(
    seen: Moments, held_out: Moments, *, shift: bool = True
) -> tuple[Tensor, Tensor | None]:
    """M (d, d) and m (d,), float64, with teacher ≈ M·student + m, or the identity, if better.

    Args:
        seen: of the student's hidden states (features) and the teacher's (targets).
        held_out: the same of other tokens.
        shift: False for readers without a bias: then there is no m.

    Raises:
        NumericalFailure: the solve failed.
    """
    size = len(seen.gram)
    identity = torch.eye(size, dtype=torch.float64, device=seen.gram.device)
    return fit_with_validation(
        seen, held_out, RIDGES, identity, identity.new_zeros(size) if shift else None
    )


def apply_regression_map(reader: Any, matrix: Tensor, shift: Tensor | None) -> None:
    """Put an estimate M (d, d), m (d,) before a linear map, in place; m is None without a bias.

    Raises:
        NumericalFailure: what comes out is not finite; the map stays as it was.
    """
    weight = to_float64(weight_of(reader), matrix.device)
    new_weight = (weight @ matrix).to(reader.weight)
    new_shift = new_weight.new_zeros(1) if shift is None else (weight @ shift).to(reader.weight)
    if not (torch.isfinite(new_weight).all() and torch.isfinite(new_shift).all()):
        raise NumericalFailure("the aligned weights are not finite")
    with torch.no_grad():
        weight_of(reader).copy_(new_weight)
        if shift is not None:
            reader.bias.add_(new_shift)
