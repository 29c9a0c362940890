"""Bytes of all weights, by how many units each block keeps."""

from __future__ import annotations

from torch import nn

from rfprune.cost.constraint import CostModel
from rfprune.cost.params import weight_costs
from rfprune.model.layout import Layout


def total_bytes(model: nn.Module) -> int:
    """Bytes of all weights and saved buffers of a model; shared ones count once."""
    tensors = {tensor.data_ptr() or id(tensor): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


def memory_costs(model: nn.Module, layout: Layout) -> CostModel:
    """Bytes of the whole model, by how many units each block keeps."""
    return weight_costs("memory", model, layout, lambda weight: weight.itemsize, total_bytes(model))
