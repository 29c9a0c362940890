"""Mask tuning: scales that lower the error, for the blocks that the authors tune.

Without these tests tuning could change a model without error, or end at the first failed block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rfprune.model.compact import compact
from rfprune.model.frozen import frozen
from rfprune.model.layout import Layout, layout_of
from rfprune.model.masks import full_masks
from rfprune.stages.tune import classifies_first_token, last_ffn, tune_scales

Tiny = Callable[..., Any]
FAMILIES = ["bert", "distilbert", "mpnet"]


def tune(teacher: Any, student: Any, layout: Layout, batches: Any) -> Any:
    with frozen(teacher), frozen(student):
        return tune_scales(teacher, student, layout, batches)


def batches_of(tiny_batch: Tiny) -> list[dict[str, Tensor]]:
    return [tiny_batch(16, 7 + seed, seed=seed) for seed in range(4)]


def scale_columns(model: Any, layout: Layout, name: str, scales: Tensor) -> None:
    (block,) = (block for block in layout.blocks if block.name == name)
    with torch.no_grad():
        weight = model.get_parameter(f"{block.consumer}.weight")
        weight.mul_(scales.repeat_interleave(block.unit_width))


def distance(student: Any, teacher: Any, batches: list[dict[str, Tensor]]) -> float:
    """Mean squared difference of the logits."""
    with torch.no_grad():
        differences = [student(**batch).logits - teacher(**batch).logits for batch in batches]
    return float(torch.cat(differences).square().mean())


@pytest.mark.parametrize("head", ["sequence-classification", "question-answering"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_scales_of_a_student_equal_to_its_teacher_are_one(
    model_type: str, head: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    teacher, batches = tiny_model(model_type, head), batches_of(tiny_batch)
    layout = layout_of(teacher)
    student = compact(teacher, layout, full_masks(layout))
    scales, failures = tune(teacher, student, layout, batches)
    assert failures == []
    assert list(scales) == [block.consumer for block in layout.blocks[1:]]
    for found in scales.values():
        torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=1e-3)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_planted_scales_are_undone(model_type: str, tiny_model: Tiny, tiny_batch: Tiny) -> None:
    teacher, batches = tiny_model(model_type), batches_of(tiny_batch)
    layout = layout_of(teacher)
    damage = {
        "layer.0.neurons": torch.linspace(0.5, 2.0, 12),
        "layer.1.heads": torch.tensor([0.6, 1.0, 1.5, 2.0]),
    }
    student = compact(teacher, layout, full_masks(layout))
    for name, planted in damage.items():
        scale_columns(student, layout, name, planted)
    before = distance(student, teacher, batches)
    scales, failures = tune(teacher, student, layout, batches)
    assert failures == []
    assert distance(student, teacher, batches) < 0.01 * before
    for block in layout.blocks[1:3]:
        undone = scales[block.consumer] * damage[block.name]
        torch.testing.assert_close(undone, torch.ones_like(undone), rtol=0, atol=0.1)


def test_scales_are_folded_into_the_weights_but_not_those_of_the_first_heads(
    tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    teacher, batches = tiny_model(), batches_of(tiny_batch)
    layout = layout_of(teacher)
    masks = full_masks(layout)
    masks[1][:6], masks[2][2] = 0, 0
    plain, tuned = compact(teacher, layout, masks), compact(teacher, layout, masks)
    scales, failures = tune(teacher, tuned, layout, batches)
    assert failures == []
    for block in layout.blocks:
        path = f"{block.consumer}.weight"
        found, expected = tuned.get_parameter(path), plain.get_parameter(path)
        if block is layout.blocks[0]:
            assert torch.equal(found, expected)
            continue
        factors = scales[block.consumer].repeat_interleave(block.unit_width).float()
        torch.testing.assert_close(found, expected * factors)
        assert (factors - 1).abs().max() > 1e-3
    assert distance(tuned, teacher, batches) < distance(plain, teacher, batches)


def test_a_failed_block_keeps_its_weights_and_the_others_are_tuned(
    tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    teacher, batches = tiny_model(), batches_of(tiny_batch)
    layout = layout_of(teacher)
    student = compact(teacher, layout, full_masks(layout))
    scale_columns(student, layout, "layer.0.neurons", torch.full((12,), 0.02))  # needs 50
    left = student.get_parameter(f"{layout.blocks[1].consumer}.weight").clone()
    scales, failures = tune(teacher, student, layout, batches)
    assert len(failures) == 1
    assert failures[0].startswith("layer.0.neurons was left unchanged: a scale of ")
    assert failures[0].endswith("is beyond ±10")
    assert torch.equal(student.get_parameter(f"{layout.blocks[1].consumer}.weight"), left)
    assert list(scales) == [block.consumer for block in layout.blocks[2:]]


@pytest.mark.parametrize("num_kept", [0, 1])
def test_one_neuron_or_none(num_kept: int, tiny_model: Tiny, tiny_batch: Tiny) -> None:
    """The authors' code crashes for a layer with one neuron."""
    teacher, batches = tiny_model(), batches_of(tiny_batch)
    layout = layout_of(teacher)
    masks = full_masks(layout)
    masks[1][num_kept:], masks[2][num_kept:] = 0, 0
    student = compact(teacher, layout, masks)
    scales, failures = tune(teacher, student, layout, batches)
    assert failures == []
    expected = {block.consumer for block in layout.blocks[1:]} if num_kept else None
    assert set(scales) == (expected or {layout.blocks[3].consumer})
    assert torch.isfinite(student(**batches[0]).logits).all()


def test_the_last_ffn_of_classifiers_is_tuned_on_the_first_token(tiny_model: Tiny) -> None:
    model = tiny_model()
    layout = layout_of(model)
    assert last_ffn(layout) == ["bert.encoder.layer.1.output.dense"]
    masks = full_masks(layout)
    masks[3][:] = 0
    small = compact(model, layout, masks)
    assert last_ffn(layout_of(small)) == []
    assert classifies_first_token(model, layout_of(model))
    assert classifies_first_token(small, layout_of(small))
    answering = tiny_model("bert", "question-answering")
    assert not classifies_first_token(answering, layout_of(answering))
    pooled = tiny_model("modernbert")
    for pooling in ("cls", "mean"):
        pooled.config.classifier_pooling = pooling
        assert classifies_first_token(pooled, layout_of(pooled)) == (pooling == "cls")
