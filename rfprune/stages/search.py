"""Which units to keep under a budget, by additive importance (Kwon et al. 2022, algorithm 1).

Where heads cost the same in every layer, and so do neurons, the published search is exact: for
every number of heads kept, the rest of the budget goes to neurons, each taken by importance; the
best total wins. Whatever the optimal number of heads is, the optimum keeps the most important ones,
and as many of the most important neurons as fit. Departure from the authors' code: keeping no heads
is a candidate too.

Any other table (a measured latency with its steps and plateaus, sizes that are not allowed, layers
of unequal cost) is left to `allocate`, with the importance of what goes as the error. The paper
fits such tables with a constant and a line instead, which is not exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rfprune.cost.constraint import CostModel
from rfprune.errors import UserError
from rfprune.model.layout import Layout
from rfprune.model.masks import Masks
from rfprune.stages.allocate import allocate


def search(layout: Layout, importance: Sequence[Tensor], costs: CostModel, budget: float) -> Masks:
    """Masks of the largest total importance whose cost stays within `budget`.

    Args:
        importance: per block the importance (U,) of its units, not negative; of equals the first
            stay.
        budget: what all kept units together may cost.

    Raises:
        UserError: not even one unit fits the budget.
    """
    if _same_unit_costs(layout, costs):
        return _published(layout, importance, costs, budget)
    return keep_most_important(importance, allocate(additive_errors(importance), costs, budget))


def additive_errors(importance: Sequence[Tensor]) -> list[NDArray[np.float64]]:
    """Per block (U + 1,): the importance of all units but the n most important ones."""
    errors = []
    for values in importance:
        ascending = np.sort(values.cpu().double().numpy())
        errors.append(np.concatenate([[0.0], np.cumsum(ascending)])[::-1].copy())
    return errors


def keep_most_important(importance: Sequence[Tensor], kept: Sequence[int]) -> Masks:
    """Masks of the `kept[b]` most important units of each block b; of equals the first stay."""
    masks = tuple(torch.zeros(len(values)) for values in importance)
    for mask, values, count in zip(masks, importance, kept, strict=True):
        mask[values.argsort(descending=True, stable=True)[:count].to(mask.device)] = 1.0
    return masks


def _same_unit_costs(layout: Layout, costs: CostModel) -> bool:
    """Whether all heads cost the same, and all neurons, however many there are of them."""
    unit_costs: dict[str, float] = {}
    for block, table in zip(layout.blocks, costs.tables, strict=True):
        unit_cost = unit_costs.setdefault(block.kind, float(table[-1]) / block.num_units)
        if not unit_cost > 0:
            return False
        if not np.allclose(table, unit_cost * np.arange(len(table)), rtol=1e-9, atol=0):
            return False
    return True


def _published(
    layout: Layout, importance: Sequence[Tensor], costs: CostModel, budget: float
) -> Masks:
    heads = _Ranking(layout, importance, costs, "head")
    neurons = _Ranking(layout, importance, costs, "neuron")
    best, best_value = (0, 0), -1.0
    for num_heads in range(heads.most_within(budget) + 1):
        num_neurons = neurons.most_within(budget - num_heads * heads.unit_cost)
        value = heads.gain[num_heads] + neurons.gain[num_neurons]
        if value >= best_value:
            best, best_value = (num_heads, num_neurons), value
    if best == (0, 0):
        cheapest = min(ranking.unit_cost for ranking in (heads, neurons) if len(ranking.order))
        raise UserError(
            f"the constraint leaves a {costs.metric} budget of {budget:.4g}, less than one head or "
            f"neuron costs ({cheapest:.4g}); choose a constraint of at least "
            f"{costs.ratio_for(costs.constant + cheapest):g}"
        )
    masks = tuple(torch.zeros(block.num_units) for block in layout.blocks)
    for ranking, count in zip((heads, neurons), best, strict=True):
        for block, unit in ranking.order[:count]:
            masks[block][unit] = 1.0
    return masks


class _Ranking:
    """All units of one kind by falling importance, and what the first n are worth together."""

    def __init__(
        self, layout: Layout, importance: Sequence[Tensor], costs: CostModel, kind: str
    ) -> None:
        indices = [b for b, block in enumerate(layout.blocks) if block.kind == kind]
        self.unit_cost = float(costs.tables[indices[0]][1]) if indices else 0.0
        values = np.concatenate(
            [importance[b].cpu().double().numpy() for b in indices] or [np.zeros(0)]
        )
        owners = [(b, unit) for b in indices for unit in range(layout.blocks[b].num_units)]
        descending = np.argsort(-values, kind="stable")
        self.order = [owners[i] for i in descending]
        self.gain: NDArray[np.float64] = np.concatenate([[0.0], np.cumsum(values[descending])])

    def most_within(self, budget: float) -> int:
        """How many units at the most fit `budget`."""
        if not len(self.order) or budget < 0:
            return 0
        return min(len(self.order), int(budget * (1 + 1e-12) // self.unit_cost))
