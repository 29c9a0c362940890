"""Mask search: which units to keep under a budget, by additive importance.

Kwon et al. 2022, section 4.1 and algorithm 1. Where all heads have the same cost, and so have all
neurons, the published search is exact: for every number of heads, the rest of the budget goes to
neurons, and each kind is kept in order of importance. The best total wins. The optimum is among
these candidates: for its number of heads, it keeps the most important heads, and as many of the
most important neurons as fit.

Departures from the paper:

- Keeping no heads is a candidate too.
- All other cost tables (a measured latency with its steps and plateaus, sizes that are not allowed,
  layers of unequal cost) go to `rfprune.stages.allocate`, with the importance of the pruned units
  as the error. The paper approximates a latency table by a constant and a line.
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
    """Masks of the largest total importance whose cost is within a budget.

    Args:
        layout: the blocks.
        importance: (U,) per block, not negative. Of units with equal importance the first ones are
            kept.
        costs: cost tables of the same blocks.
        budget: largest cost of all blocks together, without `costs.constant`, in the unit of
            `costs`.

    Returns:
        A mask (U,) of zeros and ones per block.

    Raises:
        UserError: the budget is too small for a single unit; the smallest constraint is named.

    Example:
        Keep half of the MACs of a BERT by diagonal Fisher importance:

            layout = layout_of(model)
            gradients = collect_gradients(Calibration(model, layout, batches))
            costs = mac_costs(layout, mean_tokens(batches))
            budget = costs.budget(Constraint("mac", 0.5))
            masks = search(layout, diagonal_fisher(gradients), costs, budget)
    """
    if _has_equal_unit_costs(layout, costs):
        return _published_search(layout, importance, costs, budget)
    return keep_most_important(importance, allocate(additive_errors(importance), costs, budget))


def additive_errors(importance: Sequence[Tensor]) -> list[NDArray[np.float64]]:
    """Error curves of additive importance, (U + 1,) per block.

    Entry n is the summed importance of all units but the n most important ones.
    """
    errors = []
    for values in importance:
        ascending = np.sort(values.cpu().double().numpy())
        errors.append(np.concatenate([[0.0], np.cumsum(ascending)])[::-1].copy())
    return errors


def keep_most_important(importance: Sequence[Tensor], kept: Sequence[int]) -> Masks:
    """Masks that keep the `kept[b]` most important units of each block b; of equals the first."""
    masks = tuple(torch.zeros(len(values)) for values in importance)
    for mask, values, count in zip(masks, importance, kept, strict=True):
        mask[values.argsort(descending=True, stable=True)[:count].to(mask.device)] = 1.0
    return masks


def _has_equal_unit_costs(layout: Layout, costs: CostModel) -> bool:
    """Whether all heads have one cost and all neurons have one cost, in any number."""
    unit_costs: dict[str, float] = {}
    for block, table in zip(layout.blocks, costs.tables, strict=True):
        unit_cost = unit_costs.setdefault(block.kind, float(table[-1]) / block.num_units)
        if not 0 < unit_cost < np.inf:
            return False
        if not np.allclose(table, unit_cost * np.arange(len(table)), rtol=1e-9, atol=0):
            return False
    return True


def _published_search(
    layout: Layout, importance: Sequence[Tensor], costs: CostModel, budget: float
) -> Masks:
    """Algorithm 1 of the paper."""
    heads = _Ranking(layout, importance, costs, "head")
    neurons = _Ranking(layout, importance, costs, "neuron")
    best, best_importance = (0, 0), -1.0
    for num_heads in range(heads.max_within(budget) + 1):
        num_neurons = neurons.max_within(budget - num_heads * heads.unit_cost)
        total = heads.cumulative[num_heads] + neurons.cumulative[num_neurons]
        if total >= best_importance:
            best, best_importance = (num_heads, num_neurons), total
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
    """All units of one kind, most important first.

    Attributes:
        unit_cost: cost of one unit.
        order: block and unit, by descending importance.
        cumulative: entry n is the summed importance of the first n units.
    """

    def __init__(
        self, layout: Layout, importance: Sequence[Tensor], costs: CostModel, kind: str
    ) -> None:
        indices = [b for b, block in enumerate(layout.blocks) if block.kind == kind]
        self.unit_cost = float(costs.tables[indices[0]][1]) if indices else 0.0
        values = np.concatenate(
            [importance[b].cpu().double().numpy() for b in indices] or [np.zeros(0)]
        )
        units = [(b, unit) for b in indices for unit in range(layout.blocks[b].num_units)]
        descending = np.argsort(-values, kind="stable")
        self.order = [units[i] for i in descending]
        self.cumulative: NDArray[np.float64] = np.concatenate(
            [[0.0], np.cumsum(values[descending])]
        )

    def max_within(self, budget: float) -> int:
        """The largest number of units that fits a budget."""
        if not len(self.order) or budget < 0:
            return 0
        return min(len(self.order), int(budget * (1 + 1e-12) // self.unit_cost))
