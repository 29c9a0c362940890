"""Masks scale the features of their units, and no hook, mode or flag stays changed.

Without these tests a hook could stay after an error, or a mode of the user's model could change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from rfprune.model.frozen import frozen
from rfprune.model.layout import layout_of
from rfprune.model.masks import full_masks, masked, num_kept

Tiny = Callable[..., Any]


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def test_transformers_ignores_head_mask_but_not_our_masks(
    tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model, batch = tiny_model(), tiny_batch()
    layout = layout_of(model)
    plain = model(**batch).logits
    if int(transformers.__version__.split(".")[0]) >= 5:
        assert torch.equal(model(**batch, head_mask=torch.zeros(2, 4)).logits, plain)
    masks = full_masks(layout)
    for block, mask in zip(layout.blocks, masks, strict=True):
        mask *= block.kind != "head"
    with masked(model, layout, masks):
        without_heads = model(**batch).logits
    assert (without_heads - plain).abs().max() > 1e-2


def test_each_example_may_have_its_own_masks(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    model, batch = tiny_model(), tiny_batch()
    layout = layout_of(model)
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(4, block.num_units, generator=generator) for block in layout.blocks]
    with masked(model, layout, masks):
        together = model(**batch).logits
    for row in range(4):
        with masked(model, layout, [mask[row] for mask in masks]):
            alone = model(**batch).logits[row]
        torch.testing.assert_close(together[row], alone, rtol=1e-5, atol=1e-6)
    assert (together - model(**batch).logits).abs().min() > 1e-4


def test_no_hook_stays_after_an_error(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    model, batch = tiny_model(), tiny_batch()
    layout = layout_of(model)
    plain, before = model(**batch).logits, hooks_of(model)

    def fail_inside() -> None:
        with masked(model, layout, [0 * mask for mask in full_masks(layout)]):
            assert hooks_of(model) == before + len(layout.blocks)
            model(input_ids=None)

    with pytest.raises(ValueError, match="input_ids"):
        fail_inside()
    with pytest.raises(ValueError, match="shorter"), masked(model, layout, full_masks(layout)[:2]):
        pass
    assert hooks_of(model) == before
    assert torch.equal(model(**batch).logits, plain)


def test_num_kept_counts_scales_of_any_sign() -> None:
    assert num_kept([torch.tensor([0.0, 1.0, -0.3]), torch.zeros(4)]) == (2, 0)


def test_frozen_restores_modes_and_flags_after_an_error(tiny_model: Tiny) -> None:
    model = tiny_model()
    model.train()
    model.bert.encoder.layer[0].eval()
    model.bert.embeddings.requires_grad_(False)

    def state() -> tuple[list[bool], list[bool]]:
        modes = [module.training for module in model.modules()]
        return modes, [parameter.requires_grad for parameter in model.parameters()]

    before = state()
    assert len(set(before[0])) == len(set(before[1])) == 2

    def fail_inside() -> None:
        with frozen(model):
            assert state() == ([False] * len(before[0]), [False] * len(before[1]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_inside()
    assert state() == before


def test_no_weight_gradient_is_computed_when_frozen(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    model, batch = tiny_model(), tiny_batch()
    layout = layout_of(model)
    masks = [mask.requires_grad_() for mask in full_masks(layout)]
    with frozen(model), masked(model, layout, masks):
        loss: Tensor = model(**batch).logits.sum()
    loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(mask.grad is not None and mask.grad.abs().max() > 0 for mask in masks)


def test_a_frozen_decoder_keeps_no_cache(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    model, batch = tiny_model("llama", "causal-lm"), tiny_batch()
    with frozen(model):
        assert model(**batch).past_key_values is None
    assert model(**batch).past_key_values is not None
    assert model.config.use_cache
