"""The same shape for every layer: the classical alternative to a budget that is shared globally.

One fraction holds for the heads and the neurons of all layers, the largest that fits the budget.
Each block keeps its most important units, ceil(fraction x units) of them, so that none is emptied.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from rfprune.cost.constraint import CostModel
from rfprune.errors import UserError
from rfprune.model.layout import Layout
from rfprune.model.masks import Masks


def uniform(layout: Layout, importance: Sequence[Tensor], costs: CostModel, budget: float) -> Masks:
    """Masks that keep the same fraction of every block, its most important units.

    Args:
        importance: per block the importance (U,) of its units; of equals the first stay.
        budget: what all kept units together may cost.

    Raises:
        UserError: not even one unit of every block fits the budget.
    """
    kept = uniform_counts([block.num_units for block in layout.blocks], costs, budget)
    masks = tuple(torch.zeros(block.num_units) for block in layout.blocks)
    for mask, values, count in zip(masks, importance, kept, strict=True):
        mask[values.argsort(descending=True, stable=True)[:count].to(mask.device)] = 1.0
    return masks


def uniform_counts(num_units: Sequence[int], costs: CostModel, budget: float) -> tuple[int, ...]:
    """How many units each block keeps at the largest common fraction whose cost fits `budget`.

    Raises:
        UserError: not even one unit of every block fits.
    """
    steps = {Fraction(kept, units) for units in num_units for kept in range(1, units + 1)}
    allowed = (budget + costs.constant) * (1 + 1e-12)
    for fraction in sorted(steps, reverse=True):
        kept = tuple(-(-fraction.numerator * units // fraction.denominator) for units in num_units)
        if costs.total(kept) <= allowed:
            return kept
    raise UserError(
        f"the constraint leaves a {costs.metric} budget of {budget:.4g}, too little for one head "
        f"and one neuron in every layer; choose a constraint of at least "
        f"{costs.ratio_for(costs.total([1] * len(num_units))):g}, or allocate globally"
    )
