"""Greedy Optimal Brain Surgeon: the order in which a block's units are removed, and the errors.

With inputs x of the output projection and loss gradients g at its outputs, the Fisher information
of its weight W (d, p) is approximated by the Kronecker product of A = E[x·xᵀ] and G = E[g·gᵀ].
Removing a group b of columns and adjusting the others optimally then costs

    tr(W_b · ([A⁻¹]_bb)⁻¹ · W_bᵀ · G)

with closed-form updates of W and A⁻¹ (Hassibi & Stork 1993; for Transformers ZipLM, Kurtic et al.
2023, and LLM Surgeon, van der Ouderaa et al. 2024). A⁻¹ is computed once and then updated.

The adjusted weights serve to predict errors only. The weights of the pruned model come from the
least squares of `rfprune.stages.tune`, on the student's own inputs.

Departure from these papers: neurons are removed in small groups rather than one at a time, as
matrix products are far faster than a loop over thousands of neurons. Neurons that are expensive to
remove together stay for a later group (`TOLERANCE`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rfprune.stages.float64 import to_float64
from rfprune.stages.least_squares import NumericalFailure

CHUNK = 1 / 32
"""Size of a group of neurons, as a fraction of the neurons that are left."""

TOLERANCE = 1.5
"""A neuron is removed with its group if its cost, after the neurons before it in the group, is at
most this many times the largest single cost in the group."""

SHRINK = 0.8
"""Matrices are copied without removed rows once less than this fraction of the rows is left."""


@dataclass(frozen=True)
class ErrorCurve:
    """The error of a block as a function of the number of units it keeps.

    Attributes:
        order: (U,) indices of the units, from the first to be removed to the last.
        errors: (U + 1,) float64; `errors[n]` is the error of keeping the last n units of `order`.
    """

    order: Tensor
    errors: Tensor

    def mask(self, kept: int) -> Tensor:
        """A mask (U,) of zeros and ones that keeps the last `kept` units of `order`."""
        mask = torch.ones(len(self.order))
        mask[self.order[: len(self.order) - kept]] = 0.0
        return mask


def removal_curve(inputs: Tensor, weight: Tensor, gradients: Tensor, unit_width: int) -> ErrorCurve:
    """Remove the units of a block greedily, cheapest first, with optimal adjustment of the rest.

    Args:
        inputs: A (p, p), second moment of the inputs; positive definite.
        weight: W (d, p) of the output projection.
        gradients: G (d, d), second moment of the loss gradients at its outputs.
        unit_width: number of columns of a unit, p / U; 1 for neurons.

    Returns:
        The removal order and the accumulated error, in the unit of tr(W·A·Wᵀ·G).

    Raises:
        NumericalFailure: A is not positive definite.

    Example:
        Two neurons; the second one has a larger output:

        >>> import torch
        >>> curve = removal_curve(torch.diag(torch.tensor([1.0, 4.0])), torch.ones(1, 2),
        ...                       torch.ones(1, 1), unit_width=1)
        >>> curve.order.tolist(), curve.errors.round(decimals=6).tolist()
        ([0, 1], [5.0, 1.0, 0.0])
        >>> curve.mask(kept=1)
        tensor([0., 1.])
    """
    inverse = _inverse(to_float64(inputs))
    # R·W with Rᵀ·R = G: the sum of squares of its columns is weighted by G.
    weighted = _root(to_float64(gradients)) @ to_float64(weight)  # (r, p)
    remove = _remove_neurons if unit_width == 1 else _remove_heads
    order, costs = remove(inverse, weighted, unit_width)
    removed = torch.cat([costs.new_zeros(1), costs.clamp_min(0)]).cumsum(0)
    return ErrorCurve(order.cpu(), removed.flip(0).cpu())


def _remove_heads(inverse: Tensor, weighted: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Removal order and the cost of each removal, one head at a time."""
    units = len(inverse) // width
    left, order, costs = list(range(units)), [], []
    while left:
        diagonal = inverse.view(units, width, units, width)[left, :, left]  # (n, width, width)
        factors = _cholesky(diagonal)
        columns = weighted.view(-1, units, width)[:, left].permute(1, 2, 0)  # (n, width, r)
        solved = torch.linalg.solve_triangular(factors, columns, upper=False)
        cost = solved.square().sum((1, 2))  # (n,)
        cheapest = int(cost.argmin())
        unit = left.pop(cheapest)
        unit_columns = torch.arange(unit * width, (unit + 1) * width, device=inverse.device)
        inverse, weighted = _eliminate(inverse, weighted, unit_columns, factors[cheapest])
        order.append(unit)
        costs.append(cost[cheapest])
    return torch.tensor(order), torch.stack(costs)


def _remove_neurons(inverse: Tensor, weighted: Tensor, _: int) -> tuple[Tensor, Tensor]:
    """Removal order and the cost of each removal, a group of neurons at a time."""
    units = torch.arange(len(inverse), device=inverse.device)
    alive = torch.ones(len(units), dtype=torch.bool, device=inverse.device)
    order, costs = [], []
    while (left := int(alive.sum())) > 0:
        cost = weighted.square().sum(0) / inverse.diagonal()
        cost[~alive] = torch.inf
        size = max(1, int(left * CHUNK))
        group, factor, group_costs = _choose_group(inverse, weighted, cost, size)
        inverse, weighted = _eliminate(inverse, weighted, group, factor)
        order.append(units[group])
        costs.append(group_costs)
        alive[group] = False
        if left - len(group) < SHRINK * len(alive):
            inverse, weighted = inverse[alive][:, alive], weighted[:, alive]
            units, alive = units[alive], alive[alive]
    return torch.cat(order), torch.cat(costs)


def _choose_group(
    inverse: Tensor, weighted: Tensor, cost: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The next neurons to remove.

    Neurons that are cheap one by one can be expensive together (two copies of one neuron). The cost
    of each neuron after those before it follows from the Cholesky factor. Expensive ones are left
    for a later group.

    Returns:
        Their columns, the Cholesky factor of [A⁻¹] at these columns, and the cost of each in turn.
    """
    chosen = torch.topk(cost, size, largest=False, sorted=True).indices
    limit = TOLERANCE * cost[chosen[-1]]
    while True:
        factor = _cholesky(inverse[chosen][:, chosen])
        solved = torch.linalg.solve_triangular(factor, weighted[:, chosen].T, upper=False)
        in_turn = solved.square().sum(1)  # (size,)
        fits = in_turn <= limit
        fits[0] = True
        if bool(fits.all()):
            return chosen, factor, in_turn
        chosen = chosen[fits]


def _eliminate(
    inverse: Tensor, weighted: Tensor, columns: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """Remove columns in place and adjust the others.

    Args:
        inverse: A⁻¹ (p, p).
        weighted: R·W (r, p).
        columns: (b,) indices of the columns.
        factor: (b, b), Cholesky factor of A⁻¹ at these columns.
    """
    update = torch.cholesky_solve(inverse[columns], factor)  # (b, p)
    weighted.addmm_(weighted[:, columns], update, alpha=-1)
    inverse.addmm_(inverse[:, columns], update, alpha=-1)
    inverse[columns] = 0.0
    inverse[:, columns] = 0.0
    inverse[columns, columns] = 1.0  # removed columns no longer matter; keep the matrix definite
    weighted[:, columns] = 0.0
    return inverse, weighted


def _root(gradients: Tensor) -> Tensor:
    """R (r, d) with Rᵀ·R = G; directions without gradient are dropped."""
    values, vectors = torch.linalg.eigh(gradients)
    used = values > 1e-7 * values[-1].clamp_min(0)
    root: Tensor = vectors[:, used] * values[used].sqrt()
    return root.T


def _inverse(matrix: Tensor) -> Tensor:
    return torch.cholesky_inverse(_cholesky(matrix))


def _cholesky(matrix: Tensor) -> Tensor:
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool((info != 0).any()):
        raise NumericalFailure("the second moments of its inputs are not positive definite")
    return factor
