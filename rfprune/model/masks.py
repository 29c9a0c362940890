"""Masks on heads and neurons, by hooks on the inputs of the output projections.

transformers 5 has no `head_mask` and silently ignores one, so a mask multiplies the input features
of the block's consumer. This is exact for every architecture, and a mask of ones changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rfprune.model.layout import Layout

Masks = tuple[Tensor, ...]
"""One float vector (U,) per block of a layout, in its order; 0 removes a unit."""


def full_masks(layout: Layout) -> Masks:
    """Masks of ones: nothing is pruned."""
    return tuple(torch.ones(block.num_units) for block in layout.blocks)


def num_kept(masks: Sequence[Tensor]) -> tuple[int, ...]:
    """How many units each mask keeps."""
    return tuple(int(torch.count_nonzero(mask)) for mask in masks)


def compose_masks(layout: Layout, masks: Masks, later_layout: Layout, later: Masks) -> Masks:
    """Masks of the original's units, after a pruned model has been pruned again.

    Args:
        layout: of the original, to which `masks` belong.
        later_layout: of the pruned model, to which `later` belong; emptied blocks are not in it.
    """
    by_consumer = {
        block.consumer: mask for block, mask in zip(later_layout.blocks, later, strict=True)
    }
    return scale_kept_units(layout, masks, by_consumer)


def scale_kept_units(layout: Layout, masks: Masks, scales: Mapping[str, Tensor]) -> Masks:
    """Multiply the nonzero entries of masks by scales (kept units,), by consumer."""
    scaled = tuple(mask.clone() for mask in masks)
    for block, mask in zip(layout.blocks, scaled, strict=True):
        if block.consumer in scales:
            mask[mask != 0] *= scales[block.consumer].to(mask.dtype)
    return scaled


@contextmanager
def masked(model: nn.Module, layout: Layout, masks: Sequence[Tensor]) -> Iterator[None]:
    """A context in which `model` runs under masks.

    Args:
        masks: one tensor per block of `layout`: (U,), or (B, U) with one mask per example.
    """
    with ExitStack() as stack:
        for block, mask in zip(layout.blocks, masks, strict=True):
            consumer = model.get_submodule(block.consumer)
            handle = consumer.register_forward_pre_hook(_multiply_by(mask, block.unit_width))
            stack.callback(handle.remove)
        yield


def _multiply_by(mask: Tensor, unit_width: int) -> Callable[[nn.Module, Any], Any]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        features = inputs[0]  # (B, ..., U * width), or (B * S, U * width) in some models
        factors = mask.to(device=features.device, dtype=features.dtype)
        if unit_width > 1:
            factors = factors.repeat_interleave(unit_width, dim=-1)
        if factors.dim() == 2:  # (B, U * width): broadcast over the tokens of each example
            by_example = features.reshape(len(factors), -1, factors.shape[1]) * factors[:, None]
            return (by_example.view(features.shape), *inputs[1:])
        return (features * factors, *inputs[1:])

    return hook
