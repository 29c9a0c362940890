"""The same in every layer: a fraction (the classical baseline), or a size (a plain architecture).

`same_fraction` is the classical alternative to a budget that is shared globally. One fraction holds
for the heads and the neurons of all layers, the largest that fits the budget. Each block keeps its
most important units, ceil(fraction x units) of them, so that none is emptied.

`same_sizes` chooses a number of heads and a number of neurons, each the same in every layer, but
apart from each other, for the least total error. What comes out can be told in a configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import reduce

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rfprune.cost.constraint import CostModel
from rfprune.errors import UserError
from rfprune.model.layout import Layout
from rfprune.model.masks import Masks
from rfprune.stages.search import keep_most_important


def same_fraction(
    layout: Layout, importance: Sequence[Tensor], costs: CostModel, budget: float
) -> Masks:
    """Masks that keep the same fraction of every block, its most important units.

    Args:
        importance: per block the importance (U,) of its units; of equals the first stay.
        budget: what all kept units together may cost.

    Raises:
        UserError: not even one unit of every block fits the budget.
    """
    kept = same_fraction_counts([block.num_units for block in layout.blocks], costs, budget)
    return keep_most_important(importance, kept)


def same_fraction_counts(
    num_units: Sequence[int], costs: CostModel, budget: float
) -> tuple[int, ...]:
    """How many units each block keeps at the largest common fraction whose cost fits `budget`.

    Raises:
        UserError: not even one unit of every block fits.
    """
    steps = {Fraction(kept, units) for units in num_units for kept in range(1, units + 1)}
    allowed = (budget + costs.constant) * (1 + 1e-12)
    least = costs.original
    for fraction in sorted(steps, reverse=True):
        kept = tuple(-(-fraction.numerator * units // fraction.denominator) for units in num_units)
        cost = costs.total(kept)
        if cost <= allowed:
            return kept
        least = min(least, cost)
    raise UserError(
        f"the constraint leaves a {costs.metric} budget of {budget:.4g}, too little for one head "
        f"and one neuron in every layer; choose a constraint of at least "
        f"{costs.ratio_for(least):g}, or allocate globally"
    )


def same_sizes(
    layout: Layout,
    errors: Sequence[NDArray[np.float64]],
    costs: CostModel,
    budget: float,
    *,
    allowed: Mapping[str, Sequence[int]] | None = None,
) -> tuple[int, ...]:
    """Units to keep: the same number of heads and of neurons in every layer, at the least error.

    All pairs are tried, so it is exact for curves and tables of any shape. None is emptied: a
    configuration can say how many heads and neurons there are, not that there are none.

    Args:
        errors: per block, `errors[b][n]` is the error of keeping n units.
        allowed: by kind ("head", "neuron") the numbers of units that there may be, where not every
            number is.

    Raises:
        UserError: no pair fits the budget; the least possible constraint is named.
    """
    sizes = _sizes(layout, allowed)
    cost = _totals(layout, costs.tables, sizes)
    fits = cost <= (budget + costs.constant) * (1 + 1e-12) - costs.constant
    if not fits.any():
        fixed = [kind for kind, numbers in sizes.items() if len(numbers) == 1]
        raise UserError(_too_small(costs, float(cost.min()), fixed))
    error = np.where(fits, _totals(layout, errors, sizes), np.inf)
    best = np.where(error == error.min(), cost, np.inf)  # of equals the cheapest
    chosen = np.unravel_index(int(best.argmin()), best.shape)
    kept = {kind: int(sizes[kind][i]) for kind, i in zip(sizes, chosen, strict=True)}
    return tuple(kept[block.kind] for block in layout.blocks)


def min_same_sizes_cost(
    layout: Layout, costs: CostModel, allowed: Mapping[str, Sequence[int]] | None = None
) -> float:
    """What the cheapest sizes cost that are the same in every layer, the constant included."""
    sizes = _sizes(layout, allowed)
    return costs.constant + float(_totals(layout, costs.tables, sizes).min())


def _sizes(
    layout: Layout, allowed: Mapping[str, Sequence[int]] | None
) -> dict[str, NDArray[np.int64]]:
    """By kind, the numbers of units to choose from: no layer has fewer than that."""
    most: dict[str, int] = {}
    for block in layout.blocks:
        most[block.kind] = min(block.num_units, most.get(block.kind, block.num_units))
    return {
        kind: np.array((allowed or {}).get(kind, range(1, units + 1)), dtype=np.int64)
        for kind, units in most.items()
    }


def _totals(
    layout: Layout, tables: Sequence[NDArray[np.float64]], sizes: Mapping[str, NDArray[np.int64]]
) -> NDArray[np.float64]:
    """Of all blocks together, by the numbers of units that they have: an axis for every kind."""
    totals = {kind: np.zeros(len(numbers)) for kind, numbers in sizes.items()}
    for block, table in zip(layout.blocks, tables, strict=True):
        totals[block.kind] += table[sizes[block.kind]]
    return reduce(np.add.outer, totals.values())


def _too_small(costs: CostModel, least: float, fixed: Sequence[str]) -> str:
    if least == np.inf:
        return (
            "no number of neurons that is allowed is left in every layer; choose a smaller "
            "--round-to (round_to), or leave out --uniform (uniform=True)"
        )
    ratio = costs.ratio_for(costs.constant + least)
    stays = " and ".join(f"all {kind}s stay" for kind in fixed)
    reason = f", where {stays} since its configuration cannot say otherwise" if fixed else ""
    return (
        f"the constraint on {costs.metric} is too small for a model of the same size in every "
        f"layer{reason}; choose one of at least {ratio:g}, or leave out --uniform (uniform=True)"
    )
