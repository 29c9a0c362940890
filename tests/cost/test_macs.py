"""MACs by the formulas are those that torch counts in a forward pass.

Without these tests, "half of the MACs" could mean something else than half of the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rfprune.cost.macs import mac_costs, total_macs
from rfprune.model.compact import compact
from rfprune.model.layout import Layout, layout_of
from rfprune.model.masks import full_masks, num_kept
from tests.conftest import (
    ALL_TYPES,
    AUDIO_TYPES,
    ENCODER_DECODER_TYPES,
    GENERATION_TYPES,
    IMAGE_TYPES,
)

Tiny = Callable[..., Any]
LENGTH = 9


def counted_macs(model: Any, layout: Layout) -> float:
    """MACs of all layers on one sequence, counted in a forward pass with eager attention."""
    if model.config.model_type not in ("mpnet", "deberta-v2"):  # eager is all they have
        model.set_attn_implementation("eager")
    model.requires_grad_(False)  # the counter fails on views of parameters
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        if model.config.model_type in IMAGE_TYPES:
            model(torch.randn(1, 3, 8, 8))
        elif model.config.model_type in AUDIO_TYPES:
            model(torch.randn(1, 8 * LENGTH))
        elif model.config.model_type == "whisper":
            model(torch.randn(1, 4, 14), decoder_input_ids=torch.full((1, 7), 3))
        else:
            ids = torch.full((1, LENGTH), 3)
            written = model.config.model_type in GENERATION_TYPES
            model(input_ids=ids, **({"decoder_input_ids": ids} if written else {}))
    counts = counter.get_flop_counts()
    flops = sum(
        sum(counts[name].values())
        for name in {f"{type(model).__name__}.{path}" for path in layout.layers}
        if name in counts
    )
    return flops / 2


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_macs_are_what_torch_counts(model_type: str, tiny_model: Tiny) -> None:
    model = tiny_model(model_type)
    layout = layout_of(model)
    length = 7 if model_type == "whisper" else LENGTH
    if model_type in IMAGE_TYPES:  # four patches, a class token and further tokens of some models
        length = {"deit": 6, "dinov2_with_registers": 9, "siglip_vision_model": 4}.get(
            model_type, 5
        )
    assert total_macs(layout, length) == counted_macs(model, layout) > 0
    masks = full_masks(layout)
    masks[0][1:], masks[1][3:], masks[2][:] = 0, 0, 0
    for mask in masks[4:]:
        mask[1:] = 0
    small = compact(model, layout, masks)
    kept = mac_costs(layout, length).total(num_kept(masks))
    assert kept == total_macs(layout_of(small), length) == counted_macs(small, layout)
    assert kept < total_macs(layout, length) * (0.6 if len(masks[0]) == 1 else 0.5)


def test_a_model_with_nothing_left_costs_nothing(tiny_model: Tiny) -> None:
    model = tiny_model()
    layout = layout_of(model)
    small = compact(model, layout, [0 * mask for mask in full_masks(layout)])
    assert counted_macs(small, layout) == total_macs(layout_of(small), LENGTH) == 0


@pytest.mark.parametrize(
    "model_type", [each for each in ENCODER_DECODER_TYPES if each != "whisper"]
)
def test_a_decoder_has_a_length_of_its_own(model_type: str, tiny_model: Tiny) -> None:
    """Its queries come from its own tokens, the keys of its cross-attention from the encoder's."""
    model = tiny_model(model_type, "seq2seq-lm")
    layout = layout_of(model)
    model.set_attn_implementation("eager")
    model.requires_grad_(False)
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.full((1, LENGTH), 3), decoder_input_ids=torch.full((1, 4), 3))
    counts = counter.get_flop_counts()
    paths = [f"{type(model).__name__}.{path}" for path in layout.layers]
    assert total_macs(layout, LENGTH, 4) == sum(sum(counts[path].values()) for path in paths) / 2
    assert total_macs(layout, LENGTH) > total_macs(layout, LENGTH, 4) > total_macs(layout, 4)
