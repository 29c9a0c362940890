"""The same in every layer: a fraction (the classical baseline), or a size (a plain architecture).

`uniform` is the classical alternative to a budget that is shared globally. One fraction holds for
the heads and the neurons of all layers, the largest that fits the budget. Each block keeps its most
important units, ceil(fraction x units) of them, so that none is emptied.

`same_sizes` chooses a number of heads and a number of neurons, each the same in every layer, but
apart from each other, for the least total error. What comes out can be told in a configuration.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fractions import Fraction
from functools import reduce

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rfprune.cost.constraint import CostModel
from rfprune.errors import UserError
from rfprune.model.layout import Layout
from rfprune.model.masks import Masks
from rfprune.stages.search import most_important


def uniform(layout: Layout, importance: Sequence[Tensor], costs: CostModel, budget: float) -> Masks:
    """Masks that keep the same fraction of every block, its most important units.

    Args:
        importance: per block the importance (U,) of its units; of equals the first stay.
        budget: what all kept units together may cost.

    Raises:
        UserError: not even one unit of every block fits the budget.
    """
    kept = uniform_counts([block.num_units for block in layout.blocks], costs, budget)
    return most_important(importance, kept)


def uniform_counts(num_units: Sequence[int], costs: CostModel, budget: float) -> tuple[int, ...]:
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
    fixed: Collection[str] = (),
) -> tuple[int, ...]:
    """Units to keep: the same number of heads and of neurons in every layer, at the least error.

    All pairs are tried, so it is exact for curves and tables of any shape. None is emptied: a
    configuration can say how many heads and neurons there are, not that there are none.

    Args:
        errors: per block, `errors[b][n]` is the error of keeping n units.
        fixed: the kinds ("head", "neuron") of which all units stay.

    Raises:
        UserError: no pair fits the budget; the least possible constraint is named.
    """
    kinds = list(dict.fromkeys(block.kind for block in layout.blocks))
    of_kind = {kind: [b for b, x in enumerate(layout.blocks) if x.kind == kind] for kind in kinds}
    sizes = []
    for kind in kinds:
        least = min(layout.blocks[b].num_units for b in of_kind[kind])
        sizes.append(np.arange(least if kind in fixed else 1, least + 1))

    def totals(tables: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        """Of all blocks, by the numbers of units: one axis for every kind."""
        return reduce(
            np.add.outer,
            [
                sum((tables[b][kept] for b in of_kind[kind]), np.zeros(len(kept)))
                for kind, kept in zip(kinds, sizes, strict=True)
            ],
        )

    cost = totals(costs.tables)
    fits = cost <= (budget + costs.constant) * (1 + 1e-12) - costs.constant
    if not fits.any():
        raise UserError(_too_small(costs, float(cost.min()), fixed))
    error = np.where(fits, totals(errors), np.inf)
    best = np.where(error == error.min(), cost, np.inf)  # of equals the cheapest
    chosen = np.unravel_index(int(best.argmin()), best.shape)
    kept = {kind: int(n[i]) for kind, n, i in zip(kinds, sizes, chosen, strict=True)}
    return tuple(kept[block.kind] for block in layout.blocks)


def _too_small(costs: CostModel, least: float, fixed: Collection[str]) -> str:
    if least == np.inf:
        return (
            "no number of neurons that is allowed is left in every layer; choose a smaller "
            "--round-to (round_to), or leave out --uniform (uniform=True)"
        )
    ratio = costs.ratio_for(costs.constant + least)
    stays = " and ".join(f"all {kind}s stay" for kind in sorted(fixed))
    reason = f" (where {stays}, since its configuration cannot say otherwise)" if fixed else ""
    return (
        f"a model of the same size in every layer{reason} costs at least {ratio:g} of the "
        f"original's {costs.metric}; choose a constraint of at least {ratio:g}, or leave out "
        "--uniform (uniform=True)"
    )
