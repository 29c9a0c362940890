"""A pruned model in its original shapes, with zeros where units were removed.

It is as large and as slow as the model that was pruned, and computes what the pruned one does. Any
tool that knows the architecture loads it: there is no code and no entry of ours in it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rfprune.model.checkpoint import stored_state
from rfprune.model.layout import Layout, Producer, layout_of, unit_features
from rfprune.model.linear import is_transposed, linear
from rfprune.model.modeling_rfprune import BIAS_TABLE


def to_dense(
    model: PreTrainedModel, layout: Layout | None = None, masks: Sequence[Tensor] = ()
) -> PreTrainedModel:
    """A model of the class that was pruned, equal to `model` but for rounding.

    Removed units have weights of zero on both sides; a sublayer without units keeps its bias.

    Args:
        model: pruned; it is left as it is.
        layout: of the model that was pruned, to which `masks` belong (one (U,) per block). They
            tell which places the neurons had; without them the neurons come first. Heads always
            have their own places, since a position bias may be looked up by them.
    """
    neurons = {} if layout is None else _kept_neurons(layout, masks)
    dense = _without_weights(model)
    state = dict(model.state_dict())
    for block in model.config.rfprune["blocks"]:
        state |= _spread(block, neurons.get(block["consumer"]), state, dense)
    state = with_joined_tables(state, model.config.rfprune["blocks"], dense)
    dense.load_state_dict(state, assign=True)
    tie_as(model, dense)
    share_buffers(model, dense)
    if hasattr(model, "generation_config"):
        dense.generation_config = copy.deepcopy(model.generation_config)
    return dense.train(model.training)


def save_dense(
    model: PreTrainedModel,
    layout: Layout,
    masks: Sequence[Tensor],
    folder: Path,
    tokenizer: Any,
    *,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Write a pruned model in its original shapes, with its tokenizer; gives what was written.

    `dtype`: that the weights are stored in, as for `save_pruned`.
    """
    dense = to_dense(model, layout, masks)
    dense.save_pretrained(folder, state_dict=None if dtype is None else stored_state(dense, dtype))
    tokenizer.save_pretrained(folder)
    return dense


def _kept_neurons(layout: Layout, masks: Sequence[Tensor]) -> dict[str, Tensor]:
    """The places of the kept neurons by the path of their consumer."""
    return {
        block.consumer: torch.nonzero(mask).flatten()
        for block, mask in zip(layout.blocks, masks, strict=True)
        if block.kind == "neuron"
    }


def _without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """The unpruned class on the device meta: shapes alone, no memory and no random numbers."""
    config = copy.deepcopy(model.config)
    for entry in ("rfprune", "auto_map"):
        if hasattr(config, entry):
            delattr(config, entry)
    base: Any = getattr(type(model), "pruned_from", type(model))
    with torch.device("meta"):
        dense: PreTrainedModel = base(config)
    return dense


def _spread(
    block: Mapping[str, Any],
    neurons: Tensor | None,
    small: Mapping[str, Tensor],
    dense: nn.Module,
) -> dict[str, Tensor]:
    """The parameters of a block in their full shapes, by their names."""
    units = torch.arange(block["num_units"]) if neurons is None else neurons
    if block["units"] is not None:
        units = torch.tensor(block["units"], dtype=torch.long)
    consumer = f"{block['consumer']}.weight"
    shapes = {name: value.shape for name, value in dense.state_dict().items()}
    side = 0 if is_transposed(linear(dense, block["consumer"])) else 1
    columns = unit_features(units, block["unit_width"])
    num_units = shapes[consumer][side] // block["unit_width"]
    state = {consumer: _scattered(small[consumer], shapes[consumer], columns, side)}
    for entry in block["producers"]:
        producer = Producer(**entry)
        transposed = is_transposed(linear(dense, producer.path))
        rows = producer.rows_of(units, num_units)
        for name in (f"{producer.path}.weight", f"{producer.path}.bias"):
            if name in shapes:
                values = small.get(name, small[consumer].new_zeros(0))
                side = len(shapes[name]) - 1 if transposed else 0
                state[name] = _scattered(values, shapes[name], rows, side)
    for name, shape in shapes.items():  # of an emptied sublayer, norms of its heads, say
        if name.startswith(f"{block['inner']}.") and name not in state and name not in small:
            state[name] = small[consumer].new_ones(shape)
    return state


def with_joined_tables(
    state: Mapping[str, Tensor], blocks: Sequence[Mapping[str, Any]], dense: PreTrainedModel
) -> dict[str, Tensor]:
    """A state in which the position biases of all layers are in the one table that they had."""
    others, joined = dict(state), dict[str, Tensor]()
    owners = {
        block.sublayer.module: f"{block.sublayer.position_bias_table}.weight"
        for block in layout_of(dense).blocks
    }
    for block in blocks:
        own = others.pop(f"{block['inner']}.{BIAS_TABLE}.weight", None)
        if not block["has_bias_table"]:
            continue
        owner, like = owners[block["inner"]], others[f"{block['consumer']}.weight"]
        table = joined.setdefault(owner, like.new_zeros(dense.get_parameter(owner).shape))
        if block["num_units"] and own is not None:
            table[:, block["units"]] = own
    return others | joined


def _scattered(values: Tensor, shape: torch.Size, places: Tensor, dimension: int) -> Tensor:
    """Zeros of a shape with `values` at `places` of one dimension."""
    full = values.new_zeros(shape)
    if len(places):
        full.index_copy_(dimension, places.to(values.device), values)
    return full


def tie_as(model: nn.Module, other: nn.Module) -> None:
    """Parameters that are one in `model` are one in `other`, and no more than these: a T5's head
    may have weights of its own where its configuration says that it has not."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        original = first.setdefault(id(parameter), name)
        if original != name:
            parent, _, own = name.rpartition(".")
            setattr(other.get_submodule(parent), own, other.get_parameter(original))


def share_buffers(model: nn.Module, dense: nn.Module) -> None:
    """Buffers that no state holds, such as position numbers, are those of the pruned model."""
    in_state = dense.state_dict().keys()
    for name, buffer in model.named_buffers():
        parent, _, own = name.rpartition(".")
        if name not in in_state:
            dense.get_submodule(parent).register_buffer(own, buffer.clone(), persistent=False)
