"""Parameters, by how many units each block keeps; whatever else a model has always stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from rfprune.cost.constraint import CostModel, linear_costs
from rfprune.model.layout import Block, Layout
from rfprune.model.linear import linear, weight_of

Size = Callable[[Tensor], int]
"""What one number of a parameter costs."""


def _one(_: Tensor) -> int:
    return 1


def unit_params(model: nn.Module, block: Block, size: Size = _one) -> int:
    """Parameters that go with one unit: rows of its producers, columns of its consumer."""
    consumer = weight_of(linear(model, block.consumer))
    cost = block.unit_width * consumer.shape[0] * size(consumer)
    for producer in block.producers:
        module = linear(model, producer.path)
        row = weight_of(module).shape[1] * size(module.weight)
        bias = 0 if module.bias is None else size(module.bias)
        cost += producer.unit_rows * (row + bias)
    return int(cost) + _distances(model, block, size)


def _distances(model: nn.Module, block: Block, size: Size) -> int:
    """Numbers that a head has in the block's table of position biases."""
    if block.sublayer.position_bias_table is None:
        return 0
    table = model.get_parameter(f"{block.sublayer.position_bias_table}.weight")
    return int(table.shape[0]) * size(table)


def _added_params(model: nn.Module, block: Block, size: Size) -> int:
    """Parameters that pruning adds to a block which shares its table of position biases.

    Each gets a table of its own; a unit's share of that is in `unit_params`, and goes with it.
    """
    table = block.sublayer.position_bias_table
    if table is None or table.startswith(f"{block.sublayer.module}."):
        return 0
    return block.num_units * _distances(model, block, size)


def shared_params(model: nn.Module, block: Block, size: Size = _one) -> int:
    """Parameters that go with the last unit of a block: norms of queries and keys, say."""
    if block.sublayer.includes_residual or block.sublayer.returns_position_bias:
        return 0
    projections = (*(producer.path for producer in block.producers), block.consumer)
    inner = model.get_submodule(block.sublayer.module)
    return sum(
        parameter.numel() * size(parameter)
        for name, parameter in inner.named_parameters(block.sublayer.module)
        if name.rpartition(".")[0] not in projections
    )


def total_params(model: nn.Module) -> int:
    """All parameters of a model; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def param_costs(model: nn.Module, layout: Layout) -> CostModel:
    """Parameters of the whole model, by how many units each block keeps."""
    return sized_costs("params", model, layout, _one, total_params(model))


def sized_costs(metric: str, model: nn.Module, layout: Layout, size: Size, total: int) -> CostModel:
    """What all parameters of a model cost together, by how many units each block keeps.

    Args:
        size: what a number of a parameter costs; they may be of several precisions.
        total: what all parameters cost.
    """
    unit_costs = [unit_params(model, block, size) for block in layout.blocks]
    shared = [shared_params(model, block, size) for block in layout.blocks]
    num_units = [block.num_units for block in layout.blocks]
    costs = linear_costs(metric, unit_costs, num_units)
    for table, extra in zip(costs.tables, shared, strict=True):
        table[1:] += extra
    added = sum(_added_params(model, block, size) for block in layout.blocks)
    constant = float(total + added - costs.original)
    return replace(costs, constant=constant, added=float(added))
