"""Alignment: input projections give the teacher's outputs on the student's hidden states.

Without these tests, the wrong projections could be changed, only some of those of a block, or a map
be fitted to padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rfprune.model.compact import compact
from rfprune.model.frozen import frozen
from rfprune.model.layout import Block, layout_of
from rfprune.model.masks import full_masks
from rfprune.stages.align import apply_regression_map, fit_regression_map
from rfprune.stages.least_squares import Moments
from rfprune.stages.reconstruct import BlockFit, reconstruct

Tiny = Callable[..., Any]


def keep(
    _: Block, __: Moments, ___: Moments, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    return weight, bias


KEEP = BlockFit(keep, align=True)


def maps_of(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor | None]:
    train, held_out = Moments.zeros(6, 6), Moments.zeros(6, 6)
    split = len(student) * 3 // 4
    train.add(student[:split], teacher[:split])
    held_out.add(student[split:], teacher[split:])
    return fit_regression_map(train, held_out)


def test_a_planted_map_is_found_and_applied_and_that_of_no_change_is_the_identity() -> None:
    torch.manual_seed(0)
    original = torch.randn(4000, 6, dtype=torch.float64)
    mixing = torch.eye(6, dtype=torch.float64) + 0.3 * torch.randn(6, 6, dtype=torch.float64)
    moved = original @ mixing.T + 1.0
    matrix, shift = maps_of(moved, original)
    weight, bias = torch.randn(4, 6).double(), torch.randn(4).double()
    new_weight, new_bias = apply_regression_map(weight, bias, matrix, shift)
    assert new_bias is not None
    wanted = original @ weight.T + bias
    before = (moved @ weight.T + bias - wanted).square().mean()
    after = (moved @ new_weight.T + new_bias - wanted).square().mean()
    assert before > 0.1
    assert after < 0.01 * before
    matrix, shift = maps_of(original, original)
    torch.testing.assert_close(matrix, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-6)
    assert shift is not None and shift.abs().max() < 1e-6


def test_one_failing_input_projection_leaves_the_others_of_its_block_unchanged(
    tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    teacher = tiny_model("bert")
    layout = layout_of(teacher)
    batches = [tiny_batch(8, 9, seed=seed) for seed in range(12)]
    masks = full_masks(layout)
    masks[1][:6] = 0.0
    query, key, value = layout.blocks[2].input_projections
    for overflows in (False, True):
        student = compact(teacher, layout, masks)
        if overflows:
            weight = student.get_parameter(f"{key}.weight")
            with torch.no_grad():
                weight.copy_(3e38 * weight.sign())
        before = {path: student.get_parameter(f"{path}.weight").clone() for path in (query, value)}
        with frozen(teacher), frozen(student):
            warnings = reconstruct(teacher, student, layout, batches, KEEP)
        for path, weight in before.items():
            unchanged = torch.equal(student.get_parameter(f"{path}.weight"), weight)
            assert unchanged == overflows
        named = [text for text in warnings if "input projections of layer.1.heads" in text]
        assert len(named) == overflows
        assert all("unchanged" in text and "not finite" in text for text in named)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet", "gpt2", "llama", "qwen2"])
def test_producers_above_a_damaged_block_follow_the_teacher(
    model_type: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    teacher = tiny_model(model_type)
    layout = layout_of(teacher)
    batches = [tiny_batch(8, 9, seed=seed) for seed in range(12)]
    masks = full_masks(layout)
    masks[1][:6] = 0.0  # half of the first FFN
    plain, aligned = compact(teacher, layout, masks), compact(teacher, layout, masks)
    with frozen(teacher), frozen(aligned):
        assert reconstruct(teacher, aligned, layout, batches, KEEP) == []
    changed = {
        name
        for name, value in aligned.state_dict().items()
        if not torch.equal(value, plain.state_dict()[name])
    }
    above = {
        f"{producer.path}.{name}"
        for block in layout.blocks[2:]
        for producer in block.producers
        for name, _ in teacher.get_submodule(producer.path).named_parameters()
    }
    assert changed == above
    path = layout.blocks[2].producers[0].path
    wanted, before, after = (
        output_of(model, path, batches[0]) for model in (teacher, plain, aligned)
    )
    assert (before - wanted).square().mean() > 1e-3
    assert (after - wanted).square().mean() < 0.9 * (before - wanted).square().mean()


def output_of(model: Any, path: str, batch: dict[str, Tensor]) -> Tensor:
    """What leaves a projection at the real tokens, (tokens, features)."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0][batch["attention_mask"].bool()]
