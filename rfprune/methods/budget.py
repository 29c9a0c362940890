"""The cost model of a constraint's metric, and whether a constraint can be met at all."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

import numpy as np

from rfprune.cost.constraint import Constraint, CostModel
from rfprune.cost.limits import protected_blocks, restrict_to_limits
from rfprune.cost.macs import mac_costs
from rfprune.cost.memory import memory_costs, total_bytes
from rfprune.cost.params import param_costs, total_params
from rfprune.cost.rounding import restrict_to_multiples
from rfprune.errors import UserError
from rfprune.latency.table import LatencyTable, latency_costs
from rfprune.methods.problem import Problem
from rfprune.model.batch import mean_decoder_tokens, mean_tokens
from rfprune.model.depth import max_surplus_of_encoder, removable_layers
from rfprune.model.layout import Layout
from rfprune.model.plain import plain_sizes
from rfprune.stages.uniform import min_same_sizes_cost, same_sizes


def cost_model(problem: Problem, metric: str) -> CostModel:
    """The cost of keeping n units of each block, by the metric of a constraint.

    Numbers of units that `round_to`, protection or floors forbid cost infinitely much. With `depth`
    protection and floors are not applied here, since a removed layer keeps no units; `width_limits`
    applies them to the layers that stay.

    Raises:
        UserError: the metric is latency, and there is no latency table.
    """
    costs = _all_sizes(problem, metric)
    costs = restrict_to_multiples(costs, problem.layout, problem.settings.round_to)
    if problem.settings.depth != "off":
        return costs
    return restrict_to_limits(replace(costs, layer_costs=()), problem.layout, problem.settings)


def width_limits(problem: Problem, costs: CostModel) -> CostModel:
    """The costs of `cost_model` with `depth`, for the widths of the layers that stay."""
    return restrict_to_limits(costs, problem.layout, problem.settings)


def _all_sizes(problem: Problem, metric: str) -> CostModel:
    if metric == "latency":
        if problem.latency_table is None:
            raise UserError(
                "a constraint on latency needs a latency table; make one with "
                "rfprune.latency.profile.profile_latency, and give it as latency_table"
            )
        return latency_costs(problem.latency_table, problem.layout)
    if metric == "memory":
        trimmed = total_bytes(problem.original) - total_bytes(problem.model)
        return _of_larger(memory_costs(problem.model, problem.layout), trimmed)
    if metric == "params":
        trimmed = total_params(problem.original) - total_params(problem.model)
        return _of_larger(param_costs(problem.model, problem.layout), trimmed)
    tokens, decoder_tokens = mean_tokens(problem.batches), mean_decoder_tokens(problem.batches)
    return mac_costs(problem.layout, tokens, decoder_tokens)


def _of_larger(costs: CostModel, trimmed: float) -> CostModel:
    """The costs of a model whose original had more tokens.

    Args:
        trimmed: the cost of these tokens.
    """
    return replace(costs, added_by_pruning=costs.added_by_pruning - trimmed)


def min_ratio(problem: Problem, metric: str) -> float:
    """The smallest ratio of a constraint that can be met.

    Raises:
        UserError: with `uniform`, the model cannot have the same sizes in every layer.
    """
    costs = cost_model(problem, metric)
    if problem.settings.depth != "off":
        return costs.ratio_for(_min_cost_of_layers(problem, costs, layers_to_choose_from(problem)))
    if problem.settings.uniform:
        allowed = plain_sizes(problem.model, problem.layout)
        return costs.ratio_for(min_same_sizes_cost(problem.layout, costs, allowed))
    return costs.ratio_for(_single_unit_cost(costs))


def ratio_step(problem: Problem, metric: str) -> float:
    """The smallest difference between two sizes that constraints can give, as a fraction of the
    original cost: that of the cheapest layer where only whole layers are removed, else 0."""
    if problem.settings.depth != "layers" or problem.settings.uniform:
        return 0.0
    costs = cost_model(problem, metric)
    return min(_costs_of_layers(problem.layout, costs)) / costs.original


def _costs_of_layers(layout: Layout, costs: CostModel) -> list[float]:
    """What each layer costs with all its units, in the order of the layers."""
    found = [0.0] * len(layout.layers)
    for block, table in zip(layout.blocks, costs.tables, strict=True):
        found[block.layer] += float(table[-1])
    if not costs.layer_costs:
        return found
    return [units + own for units, own in zip(found, costs.layer_costs, strict=True)]


def _single_unit_cost(costs: CostModel) -> float:
    """The cost of what is never pruned, of what must be kept, and of a single unit at least."""
    extra = [float(table[1:].min() - table.min()) for table in costs.tables if len(table) > 1]
    return costs.constant + costs.min_block_cost + min(extra, default=0.0)


def check_constraints(problem: Problem, constraints: Iterable[Constraint]) -> None:
    """Check that constraints can be met, before any work is done for them.

    Raises:
        UserError: a constraint is below the smallest possible ratio, which is named; or, with
            `uniform`, the model cannot have the same sizes in every layer.
    """
    constraints = list(constraints)
    if problem.settings.depth != "off":
        _check_depth(problem, constraints)
        return
    for constraint in constraints:
        _check_single_unit(problem, constraint)
    if problem.settings.uniform:
        allowed = plain_sizes(problem.model, problem.layout)
        for constraint in constraints:
            costs = cost_model(problem, constraint.metric)
            no_errors = [np.zeros(len(table)) for table in costs.tables]
            budget = costs.budget(constraint)
            same_sizes(problem.layout, no_errors, costs, budget, allowed=allowed)


def _check_single_unit(problem: Problem, constraint: Constraint) -> None:
    """Check that the budget of a constraint is enough for a single head or neuron."""
    costs = cost_model(problem, constraint.metric)
    smallest = _single_unit_cost(costs)
    if constraint.ratio * costs.original < smallest:
        ratio = costs.ratio_for(smallest)
        table = problem.latency_table if constraint.metric == "latency" else None
        kept = "what is never pruned and a single head or neuron"
        if any(np.isinf(table[0]) for table in costs.tables):
            kept = "what is never pruned, is protected, or is below a floor"
        raise UserError(
            f"constraint {constraint.ratio:g} on {constraint.metric} cannot be met: {kept} already "
            f"cost{'s' * ('below' in kept)} {ratio:g} of the original"
            f"{'' if table is None else _conditions(table)}; choose {ratio:g} or more"
        )


def _check_depth(problem: Problem, constraints: Iterable[Constraint]) -> None:
    """Check that so many layers can be removed, and that this is enough for each constraint."""
    depth, uniform = problem.settings.depth, problem.settings.uniform
    stacks, allowed = problem.layout.stacks(), layers_to_choose_from(problem)
    most = sum(_most_removed(problem, allowed))
    if not most:
        raise UserError(
            "this model has no layer that can be removed: one must stay, and so must protected "
            "ones; leave out --depth (depth='off')"
        )
    if depth.isdecimal() and int(depth) > most:
        one = "one layer" if len(stacks) == 1 else "one layer of each stack"
        raise UserError(
            f"--depth {depth} (depth={depth}) cannot be met: this model has "
            f"{len(problem.layout.layers)} layers, and {one} must stay; choose at most {most}"
        )
    if uniform:
        plain_sizes(problem.model, problem.layout)
    for constraint in constraints:
        costs = cost_model(problem, constraint.metric)
        smallest = _min_cost_of_layers(problem, costs, allowed)
        if constraint.ratio * costs.original < smallest:
            others = "" if depth != "layers" or uniform else ", or --depth joint (depth='joint')"
            raise UserError(
                f"constraint {constraint.ratio:g} on {constraint.metric} cannot be met with "
                f"--depth {depth} (depth='{depth}'): the smallest model costs "
                f"{costs.ratio_for(smallest):g} of the original; choose that or more{others}"
            )


def layers_to_choose_from(problem: Problem) -> tuple[int, ...]:
    """Indices of the layers that may be removed: no part of them is protected."""
    protected = protected_blocks(problem.layout, problem.settings.protect)
    stay = {block.layer for block in problem.layout.blocks if block.name in protected}
    allowed = removable_layers(problem.model, problem.layout)
    return tuple(layer for layer in allowed if layer not in stay)


def _most_removed(problem: Problem, allowed: Collection[int]) -> list[int]:
    """How many of the allowed layers of each stack can be removed."""
    layout = problem.layout
    most = [min(len(set(allowed) & set(stack)), len(stack) - 1) for stack in layout.stacks()]
    surplus = max_surplus_of_encoder(problem.model, layout)
    if surplus is not None:
        most[0] = min(most[0], most[1] + surplus)
    return most


def _min_cost_of_layers(problem: Problem, costs: CostModel, allowed: Collection[int]) -> float:
    """The cost of the smallest model that `depth` allows without some of the allowed layers.

    With whole layers alone that is the cheapest layer of each stack, and those that cannot be
    removed; with widths as well a single unit in them.
    """
    settings, layout = problem.settings, problem.layout
    costs = width_limits(problem, costs)
    layer_costs = _costs_of_layers(layout, costs)
    own = costs.layer_costs or (0.0,) * len(layout.layers)
    removed: list[int] = []
    for stack, most in zip(layout.stacks(), _most_removed(problem, allowed), strict=True):
        dearest_first = sorted(
            (layer for layer in stack if layer in allowed),
            key=lambda layer: -layer_costs[layer],
        )
        removed += dearest_first[:most]
    if settings.depth.isdecimal():
        removed = sorted(removed, key=lambda layer: -own[layer])[: int(settings.depth)]
    fewer = costs.without_layers(removed)
    left = [
        (block, table)
        for block, table in zip(layout.blocks, costs.tables, strict=True)
        if block.layer not in removed
    ]
    if settings.depth == "layers" and not settings.uniform:
        return fewer.constant + sum(float(table[-1]) for _, table in left)
    if settings.uniform:
        allowed_sizes = plain_sizes(problem.model, layout)
        short = replace(layout, blocks=tuple(block for block, _ in left))
        tables = replace(fewer, tables=tuple(table for _, table in left))
        return min_same_sizes_cost(short, tables, allowed_sizes)
    return _single_unit_cost(replace(fewer, tables=tuple(table for _, table in left)))


def _conditions(table: LatencyTable) -> str:
    """The conditions of a measured latency, and what would help."""
    measured = table.conditions
    return (
        f" with batches of {measured.batch_size} x {measured.sequence_length} tokens on this "
        f"{measured.device}, where no pruning gains more (larger batches or longer texts would)"
    )
