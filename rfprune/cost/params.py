"""Parameters, by how many units each block keeps; whatever else a model has always stays."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from rfprune.cost.constraint import CostModel, linear_costs
from rfprune.model.layout import Block, Layout
from rfprune.model.linear import linear, weight_of


def unit_params(model: nn.Module, block: Block) -> int:
    """Parameters that go with one unit: rows of its producers, columns of its consumer."""
    params = block.unit_width * weight_of(linear(model, block.consumer)).shape[0]
    for producer in block.producers:
        module = linear(model, producer.path)
        params += producer.unit_rows * (weight_of(module).shape[1] + (module.bias is not None))
    return int(params) + _distances(model, block)


def _distances(model: nn.Module, block: Block) -> int:
    """Numbers that a head has in the block's table of position biases."""
    if block.bias_table is None:
        return 0
    return int(model.get_parameter(f"{block.bias_table}.weight").shape[0])


def _added_params(model: nn.Module, block: Block) -> int:
    """Parameters that pruning adds to a block which shares its table of position biases.

    Each gets a table of its own; a unit's share of that is in `unit_params`, and goes with it.
    """
    table = block.bias_table
    if table is None or table.startswith(f"{block.inner}."):
        return 0
    return block.num_units * _distances(model, block)


def shared_params(model: nn.Module, block: Block) -> int:
    """Parameters that go with the last unit of a block: norms of queries and keys, say."""
    if block.bypass != "plain":  # what else is inside stays
        return 0
    projections = (*(producer.path for producer in block.producers), block.consumer)
    inner = model.get_submodule(block.inner)
    return sum(
        parameter.numel()
        for name, parameter in inner.named_parameters(block.inner)
        if name.rpartition(".")[0] not in projections
    )


def total_params(model: nn.Module) -> int:
    """All parameters of a model; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def param_costs(model: nn.Module, layout: Layout) -> CostModel:
    """Parameters of the whole model, by how many units each block keeps."""
    return sized_costs("params", model, layout, [1] * len(layout.blocks), total_params(model))


def sized_costs(
    metric: str, model: nn.Module, layout: Layout, sizes: list[int], total: int
) -> CostModel:
    """What all parameters of a model cost together, by how many units each block keeps.

    Args:
        sizes: what a parameter of each block costs.
        total: what all parameters cost.
    """
    blocks = list(zip(layout.blocks, sizes, strict=True))
    unit_costs = [size * unit_params(model, block) for block, size in blocks]
    shared = [size * shared_params(model, block) for block, size in blocks]
    num_units = [block.num_units for block in layout.blocks]
    costs = linear_costs(metric, unit_costs, num_units)
    for table, extra in zip(costs.tables, shared, strict=True):
        table[1:] += extra
    added = sum(size * _added_params(model, block) for block, size in blocks)
    constant = float(total + added - costs.original)
    return replace(costs, constant=constant, added=float(added))
