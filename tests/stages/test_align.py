"""Alignment: what reads a moved hidden state gives what it gave for the original one.

Deleting this lets the wrong projections be changed, or a map be fitted to padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rfprune.model.compact import compact
from rfprune.model.frozen import frozen
from rfprune.model.layout import Block, layout_of
from rfprune.model.masks import full_masks
from rfprune.stages.align import apply_regression_map, fit_regression_map
from rfprune.stages.least_squares import Moments, NumericalFailure
from rfprune.stages.reconstruct import reconstruct

Tiny = Callable[..., Any]


def keep(
    _: Block, __: Moments, ___: Moments, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    return weight, bias


def test_a_planted_map_is_found_and_read_through() -> None:
    torch.manual_seed(0)
    original = torch.randn(4000, 6, dtype=torch.float64)
    mixing = torch.eye(6, dtype=torch.float64) + 0.3 * torch.randn(6, 6, dtype=torch.float64)
    moved = original @ mixing.T + 1.0
    seen, held_out = Moments.zeros(6, 6), Moments.zeros(6, 6)
    seen.add(moved[:3000], original[:3000])
    held_out.add(moved[3000:], original[3000:])
    matrix, shift = fit_regression_map(seen, held_out)
    reader = nn.Linear(6, 4).double()
    aligned = copy.deepcopy(reader)
    apply_regression_map(aligned, matrix, shift)
    with torch.no_grad():
        wanted = reader(original)
        before = (reader(moved) - wanted).square().mean()
        after = (aligned(moved) - wanted).square().mean()
    assert before > 0.1
    assert after < 0.01 * before


def test_states_that_have_not_moved_are_read_as_they_are() -> None:
    torch.manual_seed(0)
    states = torch.randn(500, 6)
    seen, held_out = Moments.zeros(6, 6), Moments.zeros(6, 6)
    seen.add(states[:400], states[:400])
    held_out.add(states[400:], states[400:])
    matrix, shift = fit_regression_map(seen, held_out)
    assert torch.equal(matrix, torch.eye(6, dtype=torch.float64))
    assert shift is not None
    assert torch.equal(shift, torch.zeros(6, dtype=torch.float64))


def test_what_is_not_finite_changes_nothing() -> None:
    reader = nn.Linear(3, 2)
    weight = reader.weight.clone()
    with pytest.raises(NumericalFailure, match="not finite"):
        apply_regression_map(
            reader, torch.full((3, 3), torch.nan).double(), torch.zeros(3).double()
        )
    assert torch.equal(reader.weight, weight)


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
        assert reconstruct(teacher, aligned, layout, batches, keep, align=True) == []
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
