"""Greedy Optimal Brain Surgeon: in which order to remove a block's units, and at what error.

With x the consumer's inputs and g the loss gradient at its outputs, the Fisher information of the
consumer's weight W (d, p) is approximated by the Kronecker product of A = E[x·xᵀ] and G = E[g·gᵀ].
Removing a group b of columns, the others compensating as well as they can, then costs

    tr(W_b · ([A⁻¹]_bb)⁻¹ · W_bᵀ · G)

with a closed-form update of W and A⁻¹ (Hassibi & Stork 1993; for Transformers see ZipLM, Kurtic et
al. 2023, and LLM Surgeon, van der Ouderaa et al. 2024). A⁻¹ is computed once and then only updated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rfprune.stages.float64 import to_float64
from rfprune.stages.least_squares import NumericalFailure

CHUNK = 1 / 32
"""Neurons go in chunks of this fraction of those left: matrix products, not a loop over neurons."""

TOLERANCE = 1.5
"""A neuron stays in a chunk if its cost after those before it is at most this times the dearest."""

SHRINK = 0.8
"""Matrices are copied without their removed rows once less than this fraction is left."""


@dataclass(frozen=True)
class ErrorCurve:
    """How a block's error grows as its units go.

    Attributes:
        order: (U,) units, from the first to be removed to the last.
        errors: (U + 1,) float64; `errors[n]` is the error of keeping the n units removed last.
    """

    order: Tensor
    errors: Tensor

    def mask(self, kept: int) -> Tensor:
        """Mask (U,) of the `kept` units that are removed last."""
        mask = torch.ones(len(self.order))
        mask[self.order[: len(self.order) - kept]] = 0.0
        return mask


def removal_curve(inputs: Tensor, weight: Tensor, gradients: Tensor, unit_width: int) -> ErrorCurve:
    """Remove the units of a block one after the other, cheapest first.

    Args:
        inputs: A (p, p), positive definite. weight: W (d, p). gradients: G (d, d).
        unit_width: columns of a unit; 1 for neurons, which are removed in small chunks.

    Raises:
        NumericalFailure: A is not positive definite.
    """
    inverse = _inverse(to_float64(inputs))
    rooted = _root(to_float64(gradients)) @ to_float64(weight)  # (r, p): its squares weigh W by G
    remove = _remove_neurons if unit_width == 1 else _remove_heads
    order, costs = remove(inverse, rooted, unit_width)
    removed = torch.cat([costs.new_zeros(1), costs.clamp_min(0)]).cumsum(0)
    return ErrorCurve(order.cpu(), removed.flip(0).cpu())


def _remove_heads(inverse: Tensor, rooted: Tensor, width: int) -> tuple[Tensor, Tensor]:
    units = len(inverse) // width
    left, order, costs = list(range(units)), [], []
    while left:
        diagonal = inverse.view(units, width, units, width)[left, :, left]  # (n, width, width)
        factors = _cholesky(diagonal)
        columns = rooted.view(-1, units, width)[:, left].permute(1, 2, 0)  # (n, width, r)
        solved = torch.linalg.solve_triangular(factors, columns, upper=False)
        cost = solved.square().sum((1, 2))  # (n,)
        cheapest = int(cost.argmin())
        unit = left.pop(cheapest)
        columns_of = torch.arange(unit * width, (unit + 1) * width, device=inverse.device)
        inverse, rooted = _eliminate(inverse, rooted, columns_of, factors[cheapest])
        order.append(unit)
        costs.append(cost[cheapest])
    return torch.tensor(order), torch.stack(costs)


def _remove_neurons(inverse: Tensor, rooted: Tensor, _: int) -> tuple[Tensor, Tensor]:
    units = torch.arange(len(inverse), device=inverse.device)
    alive = torch.ones(len(units), dtype=torch.bool, device=inverse.device)
    order, costs = [], []
    while (left := int(alive.sum())) > 0:
        cost = rooted.square().sum(0) / inverse.diagonal()
        cost[~alive] = torch.inf
        chunk, factor, chunk_costs = _chunk(inverse, rooted, cost, max(1, int(left * CHUNK)))
        inverse, rooted = _eliminate(inverse, rooted, chunk, factor)
        order.append(units[chunk])
        costs.append(chunk_costs)
        alive[chunk] = False
        if left - len(chunk) < SHRINK * len(alive):
            inverse, rooted = inverse[alive][:, alive], rooted[:, alive]
            units, alive = units[alive], alive[alive]
    return torch.cat(order), torch.cat(costs)


def _chunk(
    inverse: Tensor, rooted: Tensor, cost: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The next neurons to go, the Cholesky factor of their part of A⁻¹, and what each adds.

    Neurons that are cheap one by one can be dear together (two copies of one neuron). What each
    costs once those before it are gone falls out of the Cholesky factor; the dear ones wait.
    """
    chosen = torch.topk(cost, size, largest=False, sorted=True).indices
    limit = TOLERANCE * cost[chosen[-1]]
    while True:
        factor = _cholesky(inverse[chosen][:, chosen])
        solved = torch.linalg.solve_triangular(factor, rooted[:, chosen].T, upper=False)
        in_turn = solved.square().sum(1)  # (size,)
        fits = in_turn <= limit
        fits[0] = True
        if bool(fits.all()):
            return chosen, factor, in_turn
        chosen = chosen[fits]


def _eliminate(
    inverse: Tensor, rooted: Tensor, columns: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """Remove columns in place, the others compensating; `factor` is the Cholesky factor of
    [A⁻¹]_bb."""
    update = torch.cholesky_solve(inverse[columns], factor)  # (b, p)
    rooted.addmm_(rooted[:, columns], update, alpha=-1)
    inverse.addmm_(inverse[:, columns], update, alpha=-1)
    inverse[columns] = 0.0
    inverse[:, columns] = 0.0
    inverse[columns, columns] = 1.0  # what is gone no longer matters, but stays well-posed
    rooted[:, columns] = 0.0
    return inverse, rooted


def _root(gradients: Tensor) -> Tensor:
    """R (r, d) with Rᵀ·R = G, directions without gradient left out."""
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
