"""How many units each block keeps: exact allocation of a budget over error curves.

A multiple-choice knapsack: for every block choose a number of units, so that the summed error is
least and the summed cost within the budget. Dynamic programming over a grid of costs is exact for
curves and cost tables of any shape (steps, plateaus, sizes that are not allowed, free removal of a
whole sublayer, noise that makes more units cheaper than fewer). Costs are rounded up to the grid,
which is longer than the budget by a cell a block; what is chosen is added up unrounded. So the
budget is never exceeded, and what rounding wastes is at most one cell a block, mostly nothing.
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
        costs: per block, `costs.tables[b][n]` is the cost of keeping n units; infinite: n units
            are not allowed.

    Raises:
        UserError: the budget allows no unit at all, or none is worth anything.
    """
    cheapest = [float(table.min()) for table in costs.tables]
    beyond = budget - sum(cheapest)  # what there is to spend beyond the least that blocks can cost
    if beyond < -1e-12 * abs(budget):
        raise UserError(_too_small(costs))
    size = 1 + cells + len(errors)
    weights = [
        _on_grid(table - least, beyond, cells, size)
        for table, least in zip(costs.tables, cheapest, strict=True)
    ]
    least_error = np.zeros(size)  # of the blocks so far, by cells they may cost
    choices = []
    for error, weight in zip(errors, weights, strict=True):
        least_error, choice = _add_block(least_error, error, weight)
        choices.append(choice)
    allowed = (costs.constant + budget) * (1 + 1e-12)
    for cell in reversed(range(cells, size)):
        kept = _choice(choices, weights, cell)
        if cell == cells or costs.total(kept) <= allowed:
            break
    if not any(kept):
        affordable = any(
            (table[1:] - least <= beyond).any()
            for table, least in zip(costs.tables, cheapest, strict=True)
        )
        raise UserError(_WORTHLESS if affordable else _too_small(costs))
    return kept


def _choice(
    choices: Sequence[NDArray[np.int32]], weights: Sequence[NDArray[np.int64]], cell: int
) -> tuple[int, ...]:
    """What was chosen for every block on the way to `cell`."""
    kept = []
    for choice, weight in zip(reversed(choices), reversed(weights), strict=True):
        kept.append(int(choice[cell]))
        cell -= int(weight[kept[-1]])
    return tuple(reversed(kept))


def _on_grid(table: NDArray[np.float64], budget: float, cells: int, size: int) -> NDArray[np.int64]:
    """Costs in cells, of which the budget has `cells`, rounded up; `size` is beyond the grid."""
    if budget <= 0:
        return np.where(table <= 0, 0, size).astype(np.int64)
    scaled = np.minimum(table * (cells / budget), size)
    return np.ceil(scaled * (1 - 1e-12)).astype(np.int64)


def _add_block(
    least: NDArray[np.float64], error: NDArray[np.float64], weight: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """One more block: the least error by cells, and how many of its units that takes."""
    size = len(least)
    best = np.full(size, np.inf)
    choice = np.zeros(size, dtype=np.int32)
    for n in _worthwhile(error, weight, size):
        candidate = least[: size - weight[n]] + error[n]
        target = best[weight[n] :]
        better = candidate < target
        np.copyto(target, candidate, where=better)
        np.copyto(choice[weight[n] :], np.int32(n), where=better)
    return best, choice


def _worthwhile(
    error: NDArray[np.float64], weight: NDArray[np.int64], size: int
) -> NDArray[np.int64]:
    """The numbers of units that fit the grid and for which none is as cheap and as good: on a
    plateau its end, and of a table that is rough the lower edge."""
    order = np.lexsort((error, weight))
    order = order[weight[order] < size]
    least_before = np.concatenate([[np.inf], np.minimum.accumulate(error[order])[:-1]])
    return order[error[order] < least_before]


def _too_small(costs: CostModel) -> str:
    """With the least constraint that keeps one unit, and of all other blocks what is cheapest."""
    cheapest = sum(float(table.min()) for table in costs.tables)
    more = (float(table[1:].min() - table.min()) for table in costs.tables if len(table) > 1)
    least = costs.ratio_for(costs.constant + cheapest + min(more, default=0.0))
    return (
        "the constraint is too small to keep a single head or neuron; choose one of at least "
        f"{least:g}"
    )
