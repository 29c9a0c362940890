"""From masks to a smaller model: fold scales, drop rows and columns, bypass empty sublayers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rfprune.families.schema import Sublayer
from rfprune.model.layout import Block, Layout, unit_features
from rfprune.model.linear import is_transposed, linear, weight_of
from rfprune.model.modeling_rfprune import (
    BIAS_TABLE,
    check_description,
    describe,
    pruned_class,
    shrink,
    within,
)
from rfprune.model.residency import copy_without_offloading, load_weights, resident
from rfprune.model.unwrapped import remove_added_methods


def compact(model: PreTrainedModel, layout: Layout, masks: Sequence[Tensor]) -> PreTrainedModel:
    """A smaller copy of `model` that computes what `model` computes under `masks`.

    Weights that are sliced are not copied first: the memory needed is that of the smaller model.

    Args:
        model: pruned or not; it is not changed.
        layout: of `model`.
        masks: one (U,) vector per block of `layout`; units at zeros are removed, other values are
            folded into the weights.

    Returns:
        A model of a subclass of its class, whose `config.rfprune` records its shapes.
    """
    kept = [torch.nonzero(mask).flatten() for mask in masks]
    state: dict[str, Tensor] = {}
    for block, mask, units in zip(layout.blocks, masks, kept, strict=True):
        with resident(model.get_submodule(layout.layers[block.layer])):
            state |= _sliced(model, block, mask, units)
    small = _copy_without(model, layout)
    entries = [
        within(model.base_model_prefix, _describe(block, units))
        for block, units in zip(layout.blocks, kept, strict=True)
    ]
    small.__class__ = pruned_class(type(model))
    describe(small, [*_entries_of_empty_blocks(model, entries), *entries])
    shrink(small, entries)
    load_weights(small, model, state)
    tables = {
        _own_table(block): f"{block.sublayer.position_bias_table}.weight"
        for block in layout.blocks
        if block.sublayer.position_bias_table is not None
    }
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(model.get_parameter(tables.get(name, name)).requires_grad)
    return small


def unpruned_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model with all its units, of the same class."""
    copied = copy_without_offloading(model, {})
    remove_added_methods(copied)
    load_weights(copied, model, {})
    return copied


def _copy_without(model: PreTrainedModel, layout: Layout) -> PreTrainedModel:
    """A deep copy in which the weights that will be replaced are on the meta device."""
    sliced = [model.get_submodule(path) for block in layout.blocks for path in block.projections]
    stand_ins = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for module in sliced
        for parameter in module.parameters()
    }
    copied = copy_without_offloading(model, stand_ins)
    remove_added_methods(copied)
    return copied


def _entries_of_empty_blocks(
    model: PreTrainedModel, entries: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Descriptions of the sublayers that an earlier pruning emptied; they have no block."""
    description = getattr(model.config, "rfprune", None)
    earlier = [] if description is None else check_description(description, model.base_model_prefix)
    present = {entry["consumer"] for entry in entries}
    return [entry for entry in earlier if entry["consumer"] not in present]


def _describe(block: Block, kept: Tensor) -> dict[str, Any]:
    """The entry of a block in config.json, whose names must not change: outputs have them."""
    sublayer = block.sublayer
    return {
        "name": block.name,
        "kind": block.kind,
        "num_units": len(kept),
        "unit_width": block.unit_width,
        # indices of the heads in the unpruned model, which select their part of a position bias
        "units": [block.original_units[i] for i in kept.tolist()] if block.kind == "head" else None,
        "producers": [
            {"path": producer.path, "parts": producer.parts, "width": producer.width}
            for producer in block.producers
        ],
        "consumer": block.consumer,
        "inner": sublayer.module,
        **family_entries(sublayer),
    }


def family_entries(sublayer: Sublayer) -> dict[str, Any]:
    """The entries of a block in config.json that are the same for all models of a family."""
    bypass = "biased" if sublayer.returns_position_bias else "plain"
    return {
        "inner_returns_tuple": sublayer.returns_tuple,
        "head_bias": sublayer.head_bias,
        "bypass": "normed" if sublayer.includes_residual else bypass,
        "has_bias_table": sublayer.position_bias_table is not None,
    }


def _sliced(model: PreTrainedModel, block: Block, mask: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """The new parameters of a block, by name."""
    consumer = linear(model, block.consumer)
    weight = weight_of(consumer).detach()
    features = unit_features(kept, block.unit_width).to(weight.device)
    scales = mask[kept].repeat_interleave(block.unit_width).to(weight)
    columns = weight.index_select(1, features) * scales
    state = {f"{block.consumer}.weight": _as_stored(consumer, columns)}
    if consumer.bias is not None:
        state[f"{block.consumer}.bias"] = consumer.bias.detach().clone()
    for producer in block.producers if len(kept) else ():
        module = linear(model, producer.path)
        rows = producer.rows_of(kept, block.num_units).to(module.weight.device)
        chosen = weight_of(module).detach().index_select(0, rows)
        state[f"{producer.path}.weight"] = _as_stored(module, chosen)
        if module.bias is not None:
            state[f"{producer.path}.bias"] = module.bias.detach().index_select(0, rows)
    bias_table = block.sublayer.position_bias_table
    if bias_table is not None and len(kept):
        table = model.get_submodule(bias_table).weight.detach()
        state[_own_table(block)] = table.index_select(1, kept.to(table.device))
    return state


def _own_table(block: Block) -> str:
    """Name of the pruned block's own table of position biases."""
    return f"{block.sublayer.module}.{BIAS_TABLE}.weight"


def _as_stored(module: Any, weight: Tensor) -> Tensor:
    """A weight (outputs, inputs) in the orientation in which `module` stores its weight."""
    return weight.T.contiguous() if is_transposed(module) else weight
