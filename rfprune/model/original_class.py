"""A pruned model as its original class again: what dense and plain models have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rfprune.model.layout import layout_of, recorded_blocks
from rfprune.model.modeling_rfprune import BIAS_TABLE


def original_class(model: PreTrainedModel) -> Any:
    """The class of transformers that a pruned model was made from, or the model's own."""
    return getattr(type(model), "pruned_from", type(model))


def original_config(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a configuration without the entries that pruning adds."""
    original = copy.deepcopy(config)
    for entry in ("rfprune", "auto_map"):
        if hasattr(original, entry):
            delattr(original, entry)
    return original


def make_on_meta(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """A model of the original class on the meta device: shapes without memory."""
    with torch.device("meta"):
        original: PreTrainedModel = original_class(model)(config)
    return original


def fill(original: PreTrainedModel, model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Give `original`, from `make_on_meta`, the parameters `state` and all else that `model` has.

    That is tied weights, buffers that are not saved, the generation configuration and the mode.
    """
    assign(original, model, _with_joined_tables(state, recorded_blocks(model), original))


def assign(
    made: PreTrainedModel,
    model: PreTrainedModel,
    state: Mapping[str, Tensor],
    rename: Callable[[str], str | None] = str,
) -> None:
    """The same for a model `made` on the meta device, of any class.

    Args:
        rename: from a name in `model` to that in `made`; None for what `made` does not have.
    """
    made.load_state_dict(state, assign=True)
    _tie_like(model, made, rename)
    _copy_unsaved_buffers(model, made, rename)
    if hasattr(model, "generation_config"):
        made.generation_config = copy.deepcopy(model.generation_config)
    made.train(model.training)


def _with_joined_tables(
    state: Mapping[str, Tensor], blocks: Sequence[Mapping[str, Any]], original: PreTrainedModel
) -> dict[str, Tensor]:
    """Join the position bias tables of all layers into the one table of the first layer."""
    others, joined = dict(state), dict[str, Tensor]()
    rows = [block.sublayer for block in layout_of(original).blocks]
    shared = {row.module: f"{row.position_bias_table}.weight" for row in rows}
    for block in blocks:
        own = others.pop(f"{block['inner']}.{BIAS_TABLE}.weight", None)
        if not block["has_bias_table"]:
            continue
        name = shared[block["inner"]]
        like = others[f"{block['consumer']}.weight"] if own is None else own
        table = joined.setdefault(name, like.new_zeros(original.get_parameter(name).shape))
        if block["num_units"] and own is not None:
            table[:, block["units"]] = own
    return others | joined


def _tie_like(model: nn.Module, original: nn.Module, rename: Callable[[str], str | None]) -> None:
    """Tie the parameters that are tied in `model`, and no others.

    A pruned T5 may have untied output weights although its configuration ties them.
    """
    first: dict[int, str] = {}
    for own, parameter in model.named_parameters(remove_duplicate=False):
        name = rename(own)
        if name is None:
            continue
        earlier = first.setdefault(id(parameter), name)
        if earlier != name:
            parent, _, last = name.rpartition(".")
            setattr(original.get_submodule(parent), last, original.get_parameter(earlier))


def _copy_unsaved_buffers(
    model: nn.Module, original: nn.Module, rename: Callable[[str], str | None]
) -> None:
    """Copy the buffers that no state has, such as position indices."""
    in_state = original.state_dict().keys()
    for before, buffer in model.named_buffers():
        name = rename(before)
        if name is not None and name not in in_state:
            parent, _, own = name.rpartition(".")
            original.get_submodule(parent).register_buffer(own, buffer.clone(), persistent=False)
