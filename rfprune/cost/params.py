"""Parameters, by how many units each block keeps; whatever else a model has always stays."""

from __future__ import annotations

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
    return int(params)


def total_params(model: nn.Module) -> int:
    """All parameters of a model; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def param_costs(model: nn.Module, layout: Layout) -> CostModel:
    """Parameters of the whole model, by how many units each block keeps."""
    unit_costs = [unit_params(model, block) for block in layout.blocks]
    num_units = [block.num_units for block in layout.blocks]
    pruned = sum(cost * units for cost, units in zip(unit_costs, num_units, strict=True))
    return linear_costs("params", unit_costs, num_units, constant=total_params(model) - pruned)
