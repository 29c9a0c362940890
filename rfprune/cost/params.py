"""Parameters of the whole model, by how many units each block keeps.

A unit takes rows of its producers and columns of its consumer. With hidden size d and head width D,
a head has 3·D·(d + 1) + D·d parameters (query, key, value with biases; output), and a neuron has
(d + 1) + d. A head of T5 also has one parameter per bucket of its position-bias table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from rfprune.cost.constraint import CostModel, linear_costs
from rfprune.model.layout import Block, Layout
from rfprune.model.linear import linear, weight_of
from rfprune.model.residency import offloaded_ties

ElementCost = Callable[[Tensor], int]
"""The cost of one element of a weight: 1 to count parameters, its bytes to count memory."""


def _one(_: Tensor) -> int:
    return 1


def unit_params(model: nn.Module, block: Block, element_cost: ElementCost = _one) -> int:
    """Cost of the parameters that are removed with one unit."""
    consumer = weight_of(linear(model, block.consumer))
    cost = block.unit_width * consumer.shape[0] * element_cost(consumer)
    for producer in block.producers:
        module = linear(model, producer.path)
        row = weight_of(module).shape[1] * element_cost(module.weight)
        bias = 0 if module.bias is None else element_cost(module.bias)
        cost += producer.unit_rows * (row + bias)
    return int(cost) + _position_biases(model, block, element_cost)


def _position_biases(model: nn.Module, block: Block, element_cost: ElementCost) -> int:
    """Cost of one head's column in the block's position-bias table, 0 without a table."""
    if block.sublayer.position_bias_table is None:
        return 0
    table = model.get_parameter(f"{block.sublayer.position_bias_table}.weight")
    return int(table.shape[0]) * element_cost(table)


def _added_params(model: nn.Module, block: Block, element_cost: ElementCost) -> int:
    """Cost of the position-bias table that pruning adds to a block which shares another block's.

    The columns of heads that are removed are part of `unit_params`.
    """
    table = block.sublayer.position_bias_table
    if table is None or table.startswith(f"{block.sublayer.module}."):
        return 0
    return block.num_units * _position_biases(model, block, element_cost)


def shared_params(model: nn.Module, block: Block, element_cost: ElementCost = _one) -> int:
    """Cost of the parameters that are removed with the last unit of a block.

    The norms of queries and keys are an example; the bias of the output projection stays. A table
    of position biases goes with the heads.
    """
    if block.sublayer.includes_residual or block.sublayer.returns_position_bias:
        return 0
    counted = {*block.projections, block.sublayer.position_bias_table}
    inner = model.get_submodule(block.sublayer.module)
    return sum(
        parameter.numel() * element_cost(parameter)
        for name, parameter in inner.named_parameters(block.sublayer.module)
        if name.rpartition(".")[0] not in counted
    )


def total_params(model: nn.Module) -> int:
    """Number of parameters of a model; shared ones count once."""
    ties = offloaded_ties(model)
    parameters = model.named_parameters(remove_duplicate=False)
    distinct = {id(weight): weight for name, weight in parameters if name not in ties}
    return sum(weight.numel() for weight in distinct.values())


def param_costs(model: nn.Module, layout: Layout) -> CostModel:
    """Parameters of the whole model, by how many units each block keeps."""
    return weight_costs("params", model, layout, _one, total_params(model))


def weight_costs(
    metric: str, model: nn.Module, layout: Layout, element_cost: ElementCost, total: int
) -> CostModel:
    """Cost of all weights of a model, by how many units each block keeps.

    Args:
        element_cost: weights of a model may differ in precision, and so in cost.
        total: the cost of all weights of `model`.
    """
    unit_costs = [unit_params(model, block, element_cost) for block in layout.blocks]
    shared = [shared_params(model, block, element_cost) for block in layout.blocks]
    num_units = [block.num_units for block in layout.blocks]
    costs = linear_costs(metric, unit_costs, num_units)
    for table, extra in zip(costs.tables, shared, strict=True):
        table[1:] += extra
    added = sum(_added_params(model, block, element_cost) for block in layout.blocks)
    constant = float(total + added - costs.original)
    return replace(
        costs,
        constant=constant,
        added_by_pruning=float(added),
        layer_costs=_layer_costs(model, layout, costs, element_cost),
    )


def _layer_costs(
    model: nn.Module, layout: Layout, costs: CostModel, element_cost: ElementCost
) -> tuple[float, ...]:
    """The cost of the parameters of each layer that belong to no unit: norms, biases."""
    found = [
        float(sum(each.numel() * element_cost(each) for each in layer.parameters()))
        for layer in map(model.get_submodule, layout.layers)
    ]
    for block, table in zip(layout.blocks, costs.tables, strict=True):
        found[block.layer] -= float(table[-1]) - _added_params(model, block, element_cost)
    return tuple(found)
