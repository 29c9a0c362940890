"""From masks to a smaller model: fold scales, drop rows and columns, bypass empty sublayers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rfprune.families.schema import Sublayer
from rfprune.model.depth import masks_of_layers_that_stay, remove_layers, without_layers
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
from rfprune.model.residency import (
    copy_without_offloading,
    is_offloaded,
    resident,
)
from rfprune.model.unwrapped import remove_added_methods
from rfprune.model.weight_store import MakeWeight, offload_like


def compact(
    model: PreTrainedModel,
    layout: Layout,
    masks: Sequence[Tensor],
    removed: Collection[int] = (),
    *,
    folder: Path | None = None,
) -> PreTrainedModel:
    """A smaller copy of `model` that computes what `model` computes under `masks`.

    Weights that are sliced are not copied first: the memory needed is that of the smaller model.
    The copy of an offloaded model is offloaded, too, and nothing is sliced before it is needed.
    What is in memory of `model`, such as its embeddings, is shared by the copy.

    Args:
        model: pruned or not; it is not changed.
        layout: of `model`.
        masks: one (U,) vector per block of `layout`; units at zeros are removed, other values are
            folded into the weights.
        removed: indices of layers that go whole, with their norms and biases, whatever their masks.
        folder: for the changed weights of an offloaded copy; None for a temporary folder that is
            removed with the copy.

    Returns:
        A model of a subclass of its class, whose `config.rfprune` records its shapes; where nothing
        but layers is removed, a model of the same class with fewer layers.
    """
    if removed:
        model = remove_layers(model, layout, removed)
        masks = masks_of_layers_that_stay(layout, masks, removed)
        layout = without_layers(layout, removed)
        if all(bool((mask == 1).all()) for mask in masks):
            return unpruned_copy(model)
    offloaded = is_offloaded(model)
    kept = [torch.nonzero(mask).flatten() for mask in masks]
    sliced: dict[str, MakeWeight] = {}
    for block, mask, units in zip(layout.blocks, masks, kept, strict=True):
        sliced |= _sliced(model, block, mask, units)
    small = _copy_without(model, layout, shared=offloaded)
    entries = [
        within(model.base_model_prefix, _describe(block, units))
        for block, units in zip(layout.blocks, kept, strict=True)
    ]
    small.__class__ = pruned_class(type(model))
    describe(small, [*_entries_of_empty_blocks(model, entries), *entries])
    shrink(small, entries)
    if offloaded:
        empty = {name for name, buffer in small.named_buffers() if buffer.is_meta}
        state = {name: make() for name, make in sliced.items() if name in empty}
        small.load_state_dict(state, strict=False, assign=True)
        offload_like(small, model, sliced, folder)
    else:
        state = {name: make() for name, make in sliced.items()}
        small.load_state_dict(state, strict=False, assign=True)
    tables = {
        _own_table(block): f"{block.sublayer.position_bias_table}.weight"
        for block in layout.blocks
        if block.sublayer.position_bias_table is not None
    }
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(model.get_parameter(tables.get(name, name)).requires_grad)
    return small


def unpruned_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model with all its units, of the same class; see `compact`."""
    offloaded = is_offloaded(model)
    copied = copy_without_offloading(model, _same_tensors(model) if offloaded else {})
    remove_added_methods(copied)
    if offloaded:
        offload_like(copied, model, {})
    return copied


def _copy_without(model: PreTrainedModel, layout: Layout, *, shared: bool) -> PreTrainedModel:
    """A deep copy in which the weights that will be replaced are on the meta device.

    Args:
        shared: the other weights are not copied.
    """
    sliced = [model.get_submodule(path) for block in layout.blocks for path in block.projections]
    stand_ins = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for module in sliced
        for parameter in module.parameters()
    }
    others = _same_tensors(model) if shared else {}
    copied = copy_without_offloading(model, others | stand_ins)
    remove_added_methods(copied)
    return copied


def _same_tensors(model: PreTrainedModel) -> dict[int, nn.Parameter]:
    """Parameters of a copy that share the memory of the model's, by the id of the latter."""
    return {id(one): nn.Parameter(one.detach(), one.requires_grad) for one in model.parameters()}


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
            {
                "path": producer.path,
                "parts": producer.parts,
                "width": producer.width,
                "first_width": producer.first_width,
            }
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


def _sliced(
    model: PreTrainedModel, block: Block, mask: Tensor, kept: Tensor
) -> dict[str, MakeWeight]:
    """Functions that make the new parameters of a block, by name."""
    consumer = linear(model, block.consumer)
    features = unit_features(kept, block.unit_width)
    scales = mask[kept].repeat_interleave(block.unit_width)

    def columns() -> Tensor:
        with resident(consumer):
            weight = weight_of(consumer).detach()
            chosen = weight.index_select(1, features.to(weight.device))
            return _as_stored(consumer, chosen * scales.to(weight))

    makers: dict[str, MakeWeight] = {f"{block.consumer}.weight": columns}
    if consumer.bias is not None:
        makers[f"{block.consumer}.bias"] = partial(_selected, consumer, "bias", None)
    for producer in block.producers if len(kept) else ():
        module, rows = linear(model, producer.path), producer.rows_of(kept, block.num_units)
        makers[f"{producer.path}.weight"] = partial(_selected, module, "weight", rows)
        if module.bias is not None:
            makers[f"{producer.path}.bias"] = partial(_selected, module, "bias", rows)
    bias_table = block.sublayer.position_bias_table
    if bias_table is not None and len(kept):
        table: Any = model.get_submodule(bias_table)

        def heads() -> Tensor:
            with resident(table):
                weight: Tensor = table.weight.detach()
                return weight.index_select(1, kept.to(weight.device))

        makers[_own_table(block)] = heads
    return makers


def _selected(module: Any, name: str, rows: Tensor | None) -> Tensor:
    """Rows of the weight or the bias of a linear map; all for None."""
    with resident(module):
        if name == "bias":
            values: Tensor = module.bias.detach()
            return (
                values.clone() if rows is None else values.index_select(0, rows.to(values.device))
            )
        weight = weight_of(module).detach()
        if rows is None:
            return _as_stored(module, weight.clone())
        return _as_stored(module, weight.index_select(0, rows.to(weight.device)))


def _own_table(block: Block) -> str:
    """Name of the pruned block's own table of position biases."""
    return f"{block.sublayer.module}.{BIAS_TABLE}.weight"


def _as_stored(module: Any, weight: Tensor) -> Tensor:
    """A weight (outputs, inputs) in the orientation in which `module` stores its weight."""
    return weight.T.contiguous() if is_transposed(module) else weight
