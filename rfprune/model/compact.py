"""From masks to a physically smaller model: fold the scales, drop the rows and columns, bypass empty blocks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rfprune.model.layout import Block, Layout
from rfprune.model.modeling_rfprune import FORMAT_VERSION, pruned_class, shrink


def compact(model: PreTrainedModel, layout: Layout, masks: Sequence[Tensor]) -> PreTrainedModel:
    """A smaller copy of `model` that computes what `model` computes under `masks`.

    Args:
        model: dense or already pruned; it is left as it is.
        masks: one (U,) vector per block of `layout`; zeros are removed, other values folded into the weights.

    Returns:
        A model of the class `Pruned<class of model>`, whose `config.rfprune` describes its shapes.
    """
    small = copy.deepcopy(model)
    state = small.state_dict()
    entries = {entry["consumer"]: entry for entry in _earlier_entries(model)}
    for block, mask in zip(layout.blocks, masks, strict=True):
        kept = torch.nonzero(mask).flatten()
        entries[block.consumer] = _describe(block, kept)
        _slice(state, block, mask, kept)
    small.config.rfprune = {"format_version": FORMAT_VERSION, "blocks": list(entries.values())}
    small.__class__ = pruned_class(type(model))
    shrink(small, small.config.rfprune)
    small.load_state_dict(state, strict=True)
    for parameter, source in zip(small.parameters(), _flags(model, small), strict=True):
        parameter.requires_grad_(source)
    return small


def _earlier_entries(model: PreTrainedModel) -> list[dict[str, Any]]:
    return list((getattr(model.config, "rfprune", None) or {}).get("blocks", []))


def _describe(block: Block, kept: Tensor) -> dict[str, Any]:
    return {
        "kind": block.kind,
        "layer": block.layer,
        "num_units": len(kept),
        "unit_width": block.unit_width,
        # which heads of the unpruned model these are: a shared position bias is looked up by it
        "units": [block.units[i] for i in kept.tolist()] if block.kind == "head" else None,
        "producers": list(block.producers),
        "consumer": block.consumer,
        "inner": block.inner,
        "inner_returns_tuple": block.inner_returns_tuple,
        "shared_position_bias": block.shared_position_bias,
    }


def _slice(state: dict[str, Tensor], block: Block, mask: Tensor, kept: Tensor) -> None:
    features = unit_features(kept, block.unit_width).to(state[f"{block.consumer}.weight"].device)
    for producer in block.producers:
        for name in ("weight", "bias"):
            key = f"{producer}.{name}"
            if key in state:
                state[key] = state[key].index_select(0, features)
            if not len(kept):
                state.pop(key, None)
    weight = state.pop(f"{block.consumer}.weight")  # (d, U * width)
    if len(kept):
        scales = mask[kept].repeat_interleave(block.unit_width).to(weight)
        state[f"{block.consumer}.weight"] = weight.index_select(1, features) * scales


def unit_features(units: Tensor, unit_width: int) -> Tensor:
    """Indices of the input features of `units` (n,) -> (n * width,)."""
    offsets = torch.arange(unit_width, device=units.device)
    return (units[:, None] * unit_width + offsets).flatten()


def _flags(model: PreTrainedModel, small: PreTrainedModel) -> list[bool]:
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return [flags.get(name, True) for name, _ in small.named_parameters()]
