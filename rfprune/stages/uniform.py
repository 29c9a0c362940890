"""Sizes that are the same in every layer: one fraction, or one number of heads and of neurons.

`same_fraction` is the classical alternative to a budget that all layers share. The largest fraction
that fits the budget applies to the heads and neurons of all layers. A block keeps its
ceil(fraction x units) most important units, so none is emptied.

`same_sizes` chooses a number of heads and a number of neurons that hold for every layer, with the
smallest total error. Such a model is an ordinary one of its family: its sizes fit into the
configuration, and it loads without code from the checkpoint.
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
    """Masks that keep the most important units of every block, the same fraction in each.

    Args:
        layout: the blocks.
        importance: (U,) per block. Of units with equal importance the first ones are kept.
        costs: cost tables of the same blocks.
        budget: largest cost of all blocks together, without `costs.constant`, in the unit of
            `costs`.

    Returns:
        A mask (U,) of zeros and ones per block.

    Raises:
        UserError: one unit of every block exceeds the budget; the smallest constraint is named.
    """
    kept = same_fraction_counts([block.num_units for block in layout.blocks], costs, budget)
    return keep_most_important(importance, kept)


def same_fraction_counts(
    num_units: Sequence[int], costs: CostModel, budget: float
) -> tuple[int, ...]:
    """The number of units that each block keeps at the largest common fraction within a budget.

    Args:
        num_units: of each block.
        costs: cost tables of the same blocks.
        budget: see `same_fraction`.

    Returns:
        ceil(fraction x units) per block.

    Raises:
        UserError: one unit of every block exceeds the budget; the smallest constraint is named.
    """
    fractions = {Fraction(kept, units) for units in num_units for kept in range(1, units + 1)}
    allowed = (budget + costs.constant) * (1 + 1e-12)
    smallest = costs.original
    for fraction in sorted(fractions, reverse=True):
        kept = tuple(-(-fraction.numerator * units // fraction.denominator) for units in num_units)
        cost = costs.total(kept)
        if cost <= allowed:
            return kept
        smallest = min(smallest, cost)
    raise UserError(
        f"the constraint leaves a {costs.metric} budget of {budget:.4g}, too little for one head "
        f"and one neuron in every layer; choose a constraint of at least "
        f"{costs.ratio_for(smallest):g}, or --allocation global (allocation='global')"
    )


def same_sizes(
    layout: Layout,
    errors: Sequence[NDArray[np.float64]],
    costs: CostModel,
    budget: float,
    *,
    allowed: Mapping[str, Sequence[int]] | None = None,
) -> tuple[int, ...]:
    """The number of heads and the number of neurons, for all layers, of the smallest total error.

    All pairs are compared, so the result is exact for curves and tables of any shape. Every block
    keeps at least one unit, since a configuration cannot describe a layer without heads or neurons.

    Args:
        layout: the blocks.
        errors: one float64 array (U + 1,) per block; `errors[b][n]` is the error of keeping n units
            of block b.
        costs: cost tables of the same blocks.
        budget: see `same_fraction`.
        allowed: by kind ("head", "neuron") the numbers of units that the family's configuration can
            describe; every number where a kind is missing.

    Returns:
        The number of units to keep, per block.

    Raises:
        UserError: no pair fits the budget; the smallest constraint is named.
    """
    sizes = _sizes(layout, allowed)
    cost = _totals(layout, costs.tables, sizes)
    fits = cost <= (budget + costs.constant) * (1 + 1e-12) - costs.constant
    if not fits.any():
        fixed = [kind for kind, numbers in sizes.items() if len(numbers) == 1]
        raise UserError(_too_small(costs, float(cost.min()), fixed))
    error = np.where(fits, _totals(layout, errors, sizes), np.inf)
    best = np.where(error == error.min(), cost, np.inf)  # of equal errors the cheapest
    chosen = np.unravel_index(int(best.argmin()), best.shape)
    kept = {kind: int(sizes[kind][i]) for kind, i in zip(sizes, chosen, strict=True)}
    return tuple(kept[block.kind] for block in layout.blocks)


def min_same_sizes_cost(
    layout: Layout, costs: CostModel, allowed: Mapping[str, Sequence[int]] | None = None
) -> float:
    """The smallest cost of a model with the same sizes in every layer, with `costs.constant`."""
    sizes = _sizes(layout, allowed)
    return costs.constant + float(_totals(layout, costs.tables, sizes).min())


def _sizes(
    layout: Layout, allowed: Mapping[str, Sequence[int]] | None
) -> dict[str, NDArray[np.int64]]:
    """By kind, the numbers of units to choose from; the largest is that of the smallest block."""
    largest: dict[str, int] = {}
    for block in layout.blocks:
        largest[block.kind] = min(block.num_units, largest.get(block.kind, block.num_units))
    return {
        kind: np.array((allowed or {}).get(kind, range(1, units + 1)), dtype=np.int64)
        for kind, units in largest.items()
    }


def _totals(
    layout: Layout, tables: Sequence[NDArray[np.float64]], sizes: Mapping[str, NDArray[np.int64]]
) -> NDArray[np.float64]:
    """Summed tables of all blocks, with one axis per kind for the numbers of units in `sizes`."""
    totals = {kind: np.zeros(len(numbers)) for kind, numbers in sizes.items()}
    for block, table in zip(layout.blocks, tables, strict=True):
        totals[block.kind] += table[sizes[block.kind]]
    return reduce(np.add.outer, totals.values())


def _too_small(costs: CostModel, smallest: float, fixed: Sequence[str]) -> str:
    if smallest == np.inf:
        return (
            "no allowed number of neurons fits into every layer; choose a smaller "
            "--round-to (round_to), or leave out --uniform (uniform=True)"
        )
    ratio = costs.ratio_for(costs.constant + smallest)
    kinds = " and ".join(f"{kind}s" for kind in fixed)
    reason = f" (all {kinds} stay, since its configuration cannot describe fewer)" if fixed else ""
    return (
        f"the constraint on {costs.metric} is too small for a model with the same sizes in every "
        f"layer{reason}; choose one of at least {ratio:g}, or leave out --uniform (uniform=True)"
    )
