"""Whole layers are removed: a model of its own class with fewer layers in its configuration.

A configuration has one entry for the number of layers of a stack, and lists with one value per
layer (`PER_LAYER_ENTRIES`). So a model without some layers is an ordinary one of its family: it
loads without code from the checkpoint, and its key-value cache has fewer layers. Of a model that
was pruned before, the description of its blocks (`config.rfprune`) is renumbered as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from rfprune.errors import UserError, error_summary
from rfprune.families.architectures import ARCHITECTURES
from rfprune.families.schema import Stack
from rfprune.model.layout import Block, Layout, recorded_blocks
from rfprune.model.original_class import assign
from rfprune.model.rebuild import init_options
from rfprune.model.residency import is_offloaded

PER_LAYER_ENTRIES = ("layer_types", "no_rope_layers")
"""Configuration entries with one value per layer."""

_FIRST_SLIDING_LAYER = "max_window_layers"
"""A configuration entry with the number of layers before the first one with a sliding window."""

_BLOCK_LISTS = 2
"""The format version of `config.rfprune` that lists blocks one by one, with paths from the root."""


def removable_layers(model: PreTrainedModel, layout: Layout) -> tuple[int, ...]:
    """Indices of the layers that may be removed; of each stack at least one must stay.

    Raises:
        UserError: the family's configuration cannot express fewer layers, or what a layer computes
            depends on its number.
    """
    config = model.config
    stacks = ARCHITECTURES[config.model_type].stacks
    if any(stack.shared for stack in stacks):
        raise UserError(
            f"the layers of a {config.model_type} model share their weights, so none of them can "
            "be removed alone; leave out --depth (depth='off')"
        )
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise UserError(
            f"this {config.model_type} model scales its attention by the number of the layer "
            "(scale_attn_by_inverse_layer_idx), so no layer can be removed; leave out --depth "
            "(depth='off')"
        )
    if is_offloaded(model):
        raise UserError(
            "no layer can be removed from a model whose weights are offloaded (device_map): load "
            "it into memory, or leave out --depth (depth='off')"
        )
    found = tuple(
        layer
        for indices, stack in zip(layout.stacks(), stacks, strict=False)
        for layer in indices[int(stack.first_layer_stays) :]
        if len(indices) > 1
    )
    if found:
        _check_shorter(model, layout, found[-1])
    return found


def _check_shorter(model: PreTrainedModel, layout: Layout, layer: int) -> None:
    """Check that the model's class makes a model without a layer, for the weights that are left.

    Raises:
        UserError: it does not, such as a head that weighs the outputs of all layers.
    """
    try:
        remove_layers(model, layout, [layer])
    except Exception as error:  # classes raise errors of many types
        name, reason = type(model).__name__, error_summary(error)
        raise UserError(
            f"a {name} with fewer layers cannot be made from this model's configuration "
            f"and weights ({reason}); leave out --depth (depth='off')"
        ) from error


def max_surplus_of_encoder(model: PreTrainedModel, layout: Layout) -> int | None:
    """How many more layers the encoder may lose than the decoder; None for any number.

    For a T5 that writes, transformers makes a cache with as many layers as the encoder has, since
    `num_decoder_layers` is not among the names that it looks for. A decoder with more layers fails.
    """
    stacks = ARCHITECTURES[model.config.model_type].stacks
    by_encoder = stacks[-1].num_layers_entry == "num_decoder_layers" and model.can_generate()
    if not (layout.is_encoder_decoder and by_encoder):
        return None
    encoder, decoder = layout.stacks()
    return max(len(encoder) - len(decoder), 0)


def without_layers(layout: Layout, removed: Collection[int]) -> Layout:
    """The layout of a model without some of its layers: the others move up.

    Args:
        removed: indices into `layout.layers`.
    """
    paths = _new_paths(layout, removed)
    kept = list(paths)
    split = layout.first_decoder_layer
    return replace(
        layout,
        layers=tuple(paths.values()),
        blocks=tuple(
            _moved(block, path, paths[path], kept.index(path))
            for block in layout.blocks
            if (path := layout.layers[block.layer]) in paths
        ),
        first_decoder_layer=None if split is None else split - sum(i < split for i in removed),
    )


def masks_of_layers_that_stay(
    layout: Layout, masks: Sequence[Tensor], removed: Collection[int]
) -> tuple[Tensor, ...]:
    """The masks of the blocks of `without_layers(layout, removed)`."""
    return tuple(
        mask for block, mask in zip(layout.blocks, masks, strict=True) if block.layer not in removed
    )


def remove_layers(
    model: PreTrainedModel, layout: Layout, removed: Collection[int]
) -> PreTrainedModel:
    """A model without some layers, which shares its weights with `model`.

    Args:
        model: pruned or not; it is not changed.
        layout: of `model`.
        removed: indices into `layout.layers`; of each stack at least one layer stays.
    """
    rename = _renamer(layout, removed)
    state = {new: value for old, value in model.state_dict().items() if (new := rename(old))}
    config = _shorter(model, layout, removed, rename)
    with torch.device("meta"):
        short: PreTrainedModel = type(model)(config, **init_options(type(model), state.keys()))
    assign(short, model, state, rename)
    for name, parameter in model.named_parameters():
        if (new := rename(name)) is not None:
            short.get_parameter(new).requires_grad_(parameter.requires_grad)
    heads = getattr(getattr(short, "generation_config", None), "alignment_heads", None)
    if heads:
        short.generation_config.alignment_heads = _alignment_heads(heads, layout, removed)
    return short


def _alignment_heads(
    heads: Sequence[Sequence[int]], layout: Layout, removed: Collection[int]
) -> list[list[int]] | None:
    """The heads that Whisper takes the times of words from, as [layer of the decoder, head], in the
    layers that stay; None without any, which Whisper reports."""
    decoder = layout.layer_indices(decoder=True)
    kept = [layer - decoder.start for layer in decoder if layer not in removed]
    return [[kept.index(layer), head] for layer, head in heads if layer in kept] or None


def _shorter(
    model: PreTrainedModel,
    layout: Layout,
    removed: Collection[int],
    rename: Callable[[str], str | None],
) -> PretrainedConfig:
    """The configuration of a model without some layers."""
    config = copy.deepcopy(model.config)
    for indices, stack in zip(layout.stacks(), _stacks_of(config), strict=False):
        kept = [number for number, layer in enumerate(indices) if layer not in removed]
        setattr(config, stack.num_layers_entry, len(kept))
        for entry in PER_LAYER_ENTRIES:
            values = getattr(config, entry, None)
            if isinstance(values, list) and len(values) == len(indices):
                setattr(config, entry, [values[number] for number in kept])
        first_sliding = getattr(config, _FIRST_SLIDING_LAYER, None)
        if isinstance(first_sliding, int):
            before = sum(number < first_sliding for number in kept)
            setattr(config, _FIRST_SLIDING_LAYER, before)
    names = getattr(config, "stage_names", None)  # of backbones: the embeddings and each layer
    if isinstance(names, list):
        config.stage_names = names[: 1 + len(layout.layers) - len(set(removed))]
        config.out_indices = None  # the last layer
    if getattr(config, "rfprune", None) is not None:
        config.rfprune |= {
            "format_version": _BLOCK_LISTS,
            "blocks": _renumbered(recorded_blocks(model), layout, removed, rename),
        }
    return config


def _stacks_of(config: PretrainedConfig) -> tuple[Stack, ...]:
    return ARCHITECTURES[config.model_type].stacks


def _renumbered(
    blocks: Sequence[Mapping[str, Any]],
    layout: Layout,
    removed: Collection[int],
    rename: Callable[[str], str | None],
) -> list[dict[str, Any]]:
    """The descriptions of the blocks that stay, with their new paths and names."""
    kept = [layer for layer in range(len(layout.layers)) if layer not in removed]
    found = []
    for block in blocks:
        consumer, inner = rename(block["consumer"]), rename(block["inner"])
        if consumer is None:
            continue
        _, number, kind = block["name"].split(".")
        producers = [each | {"path": rename(each["path"])} for each in block["producers"]]
        found.append(
            {
                **block,
                "name": f"layer.{kept.index(int(number))}.{kind}",
                "consumer": consumer,
                "inner": inner,
                "producers": producers,
            }
        )
    return found


def _new_paths(layout: Layout, removed: Collection[int]) -> dict[str, str]:
    """The new path of each layer that stays, by its present one."""
    return {
        layout.layers[layer]: f"{layout.layers[layer].rpartition('.')[0]}.{number}"
        for indices in layout.stacks()
        for number, layer in enumerate(i for i in indices if i not in removed)
    }


def _renamer(layout: Layout, removed: Collection[int]) -> Callable[[str], str | None]:
    """A function from the name of a weight to its new name; None if its layer is removed."""
    paths = _new_paths(layout, removed)
    starts = {layout.layers[indices[0]].rpartition(".")[0] for indices in layout.stacks()}

    def rename(name: str) -> str | None:
        start = next((each for each in starts if name.startswith(f"{each}.")), None)
        if start is None:
            return name
        number, dot, rest = name.removeprefix(f"{start}.").partition(".")
        path = paths.get(f"{start}.{number}")
        return None if path is None else f"{path}{dot}{rest}"

    return rename


def _moved(block: Block, old: str, new: str, layer: int) -> Block:
    """The same block in a layer of another number."""

    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        return new + value.removeprefix(old) if f"{value}.".startswith(f"{old}.") else value

    sublayer = replace(
        block.sublayer, **{name: moved(value) for name, value in vars(block.sublayer).items()}
    )
    producers = tuple(replace(each, path=moved(each.path)) for each in block.producers)
    return replace(block, layer=layer, sublayer=sublayer, producers=producers)
