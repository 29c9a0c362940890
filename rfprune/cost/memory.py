"""Bytes of all weights, by how many units each block keeps."""

from __future__ import annotations

from torch import Tensor, nn

from rfprune.cost.constraint import CostModel
from rfprune.cost.params import weight_costs
from rfprune.model.layout import Layout
from rfprune.model.residency import offloaded_ties


def distinct_tensors(model: nn.Module) -> list[Tensor]:
    """The weights and buffers of a model that are saved; shared ones once. Offloaded ones have no
    values, and computed ones, such as sinusoidal positions, are not saved."""
    left_out = {*offloaded_ties(model), *(getattr(model, "_keys_to_ignore_on_save", None) or ())}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    return list({tensor.data_ptr() or id(tensor): tensor for tensor in state.values()}.values())


def total_bytes(model: nn.Module) -> int:
    """Bytes of all weights and saved buffers of a model; shared ones count once."""
    return sum(tensor.numel() * tensor.itemsize for tensor in distinct_tensors(model))


def memory_costs(model: nn.Module, layout: Layout) -> CostModel:
    """Bytes of the whole model, by how many units each block keeps."""
    return weight_costs("memory", model, layout, lambda weight: weight.itemsize, total_bytes(model))
