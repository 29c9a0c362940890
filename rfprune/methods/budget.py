"""The cost model of a constraint's metric, and whether a constraint can be met at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from rfprune.cost.constraint import Constraint, CostModel
from rfprune.cost.macs import mac_costs
from rfprune.cost.memory import memory_costs
from rfprune.cost.params import param_costs
from rfprune.cost.rounding import restrict_to_multiples
from rfprune.errors import UserError
from rfprune.latency.table import LatencyTable, latency_costs
from rfprune.model.batch import Batch, decoder_token_mask, token_mask
from rfprune.model.layout import Layout, layout_of


def cost_model(
    metric: str,
    model: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    table: LatencyTable | None = None,
) -> CostModel:
    """What kept units cost by the metric of a constraint; `table` is for latency.

    Raises:
        UserError: latency without a table.
    """
    if metric == "latency":
        if table is None:
            raise UserError(
                "a constraint on latency needs a latency table; give one that "
                "rfprune.latency.profile.profile_latency has made"
            )
        return latency_costs(table, layout)
    if metric == "memory":
        return memory_costs(model, layout)
    if metric == "params":
        return param_costs(model, layout)
    return mac_costs(layout, mean_tokens(batches), mean_decoder_tokens(layout, batches))


def mean_tokens(batches: Sequence[Batch]) -> float:
    """Mean number of real tokens an example."""
    return _mean_length([token_mask(batch) for batch in batches])


def mean_decoder_tokens(layout: Layout, batches: Sequence[Batch]) -> float | None:
    """The same of a decoder that reads an encoder; None without one."""
    if not layout.is_encoder_decoder:
        return None
    return _mean_length([decoder_token_mask(batch) for batch in batches])


def _mean_length(masks: Sequence[Tensor]) -> float:
    """Mean number of tokens of the rows of masks (B, S)."""
    return float(sum(int(mask.sum()) for mask in masks) / sum(len(mask) for mask in masks))


def least_ratio(costs: CostModel) -> float:
    """The least ratio that leaves a single head or neuron."""
    return costs.ratio_for(_least_cost(costs))


def _least_cost(costs: CostModel) -> float:
    cheapest = [float(table[1:].min()) for table in costs.tables if len(table) > 1]
    return costs.constant + min(cheapest, default=0.0)


def check_constraints(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    constraints: Iterable[Constraint],
    table: LatencyTable | None = None,
    round_to: int | None = None,
) -> None:
    """Refuse what cannot be met before any work is done for it.

    Raises:
        UserError: a constraint is too small for a single head or neuron; the least is named.
    """
    layout = layout_of(model)
    for constraint in constraints:
        costs = cost_model(constraint.metric, model, layout, batches, table)
        costs = restrict_to_multiples(costs, layout, round_to)
        least = _least_cost(costs)
        if constraint.ratio * costs.original < least:
            ratio = costs.ratio_for(least)
            where = _conditions(table) if constraint.metric == "latency" else ""
            raise UserError(
                f"constraint {constraint.ratio:g} on {constraint.metric} cannot be met: what is "
                f"never pruned and a single head or neuron already cost {ratio:g} of the original"
                f"{where}; choose {ratio:g} or more"
            )


def _conditions(table: LatencyTable | None) -> str:
    """Of a latency, what it was measured with, and what would help."""
    if table is None:
        return ""
    measured = table.conditions
    return (
        f" with batches of {measured.batch_size} x {measured.sequence_length} tokens on this "
        f"{measured.device}, where no pruning gains more (larger batches or longer texts would)"
    )
