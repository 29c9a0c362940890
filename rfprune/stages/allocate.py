"""How many units each block keeps: exact allocation of a budget over error curves.

A multiple-choice knapsack: for every block choose a number of units, so that the summed error is
least and the summed cost within the budget. Dynamic programming over a grid of costs is exact for
curves and cost tables of any shape (steps, plateaus, free removal of a whole sublayer). Costs are
rounded up to the grid, so the budget is never exceeded, and what rounding wastes is at most one
grid cell a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rfprune.cost.constraint import CostModel
from rfprune.errors import UserError

CELLS = 32768
"""Grid cells that the budget is divided into: 24 blocks waste at most 0.07% of it."""

_WORTHLESS = (
    "no head or neuron has any influence on the model's predictions: its outputs are constant, or "
    "so large that its probabilities are exactly 0 and 1; check the checkpoint's weights"
)


def allocate(
    errors: Sequence[NDArray[np.float64]],
    costs: CostModel,
    budget: float,
    *,
    cells: int = CELLS,
) -> tuple[int, ...]:
    """Units to keep in every block, for the least total error within `budget`.

    Args:
        errors: per block, `errors[b][n]` is the error of keeping n units.
        costs: per block, `costs.tables[b][n]` is the cost of keeping n units.

    Raises:
        UserError: the budget allows no unit at all, or none is worth anything.
    """
    weights = [_on_grid(table, budget, cells) for table in costs.tables]
    least = np.zeros(cells + 1)  # least error of the blocks so far, by cells they may cost
    choices = []
    for error, weight in zip(errors, weights, strict=True):
        least, choice = _add_block(least, error, weight)
        choices.append(choice)
    if not np.isfinite(least[cells]):
        raise UserError(_too_small(costs))
    kept, cell = [], cells
    for choice, weight in zip(reversed(choices), reversed(weights), strict=True):
        kept.append(int(choice[cell]))
        cell -= int(weight[kept[-1]])
    if not any(kept):
        affordable = any((weight[1:] <= cells).any() for weight in weights)
        raise UserError(_WORTHLESS if affordable else _too_small(costs))
    return tuple(reversed(kept))


def _on_grid(table: NDArray[np.float64], budget: float, cells: int) -> NDArray[np.int64]:
    """Costs in cells, rounded up; whatever is beyond the budget is one cell beyond the grid."""
    if budget <= 0:
        return np.where(table <= 0, 0, cells + 1).astype(np.int64)
    scaled = np.minimum(table * (cells / budget), cells + 1.0)
    return np.ceil(scaled * (1 - 1e-12)).astype(np.int64)


def _add_block(
    least: NDArray[np.float64], error: NDArray[np.float64], weight: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """One more block: the least error by cells, and how many of its units that takes."""
    size = len(least)
    best = np.full(size, np.inf)
    choice = np.zeros(size, dtype=np.int32)
    for n in np.flatnonzero(weight < size):
        candidate = least[: size - weight[n]] + error[n]
        target = best[weight[n] :]
        better = candidate < target
        np.copyto(target, candidate, where=better)
        np.copyto(choice[weight[n] :], np.int32(n), where=better)
    return best, choice


def _too_small(costs: CostModel) -> str:
    cheapest = min(float(table[1:].min()) for table in costs.tables if len(table) > 1)
    least = (costs.constant + cheapest) / costs.original
    return (
        f"the constraint is too small to keep a single head or neuron; choose one above {least:.2g}"
    )
