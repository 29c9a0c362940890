"""Bytes of weights, in memory and on disk, by how many units each block keeps."""

from __future__ import annotations

from torch import nn

from rfprune.cost.constraint import CostModel, linear_costs
from rfprune.cost.params import unit_params
from rfprune.model.layout import Layout


def total_bytes(model: nn.Module) -> int:
    """Bytes of all weights and of the buffers that are saved with them; shared ones count once."""
    tensors = {tensor.data_ptr() or id(tensor): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


def memory_costs(model: nn.Module, layout: Layout) -> CostModel:
    """Bytes of the whole model, by how many units each block keeps."""
    unit_costs = [
        unit_params(model, block) * model.get_parameter(f"{block.consumer}.weight").itemsize
        for block in layout.blocks
    ]
    num_units = [block.num_units for block in layout.blocks]
    pruned = sum(cost * units for cost, units in zip(unit_costs, num_units, strict=True))
    return linear_costs("memory", unit_costs, num_units, constant=total_bytes(model) - pruned)
