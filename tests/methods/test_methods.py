"""Every setting of a method matters, and a method does what its paper says.

Deleting this lets a setting be ignored, or a criterion be replaced by another, unnoticed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rfprune.cost.constraint import Constraint
from rfprune.model.masks import num_kept
from rfprune.pruning import prune
from rfprune.settings import ALLOCATIONS, CRITERIA, METHODS, TEACHERS, Settings
from rfprune.stages.search import search

Tiny = Callable[..., Any]
Batch = dict[str, Tensor]
KWON = Settings(method="kwon")
HALF = Constraint("mac", 0.5)


@pytest.fixture
def batches(tiny_batch: Tiny) -> list[Batch]:
    return [tiny_batch(6, 7 + seed, seed=seed) for seed in range(3)]


def logits_of(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(**batch)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "changes",
    [
        {"rearrange": False},
        {"tune": False},
        {"teacher": TEACHERS[1]},
        {"use_labels": True},
        {"gradients": "per-batch"},
    ],
    ids=str,
)
def test_every_setting_of_the_published_method_matters(
    changes: dict[str, Any], tiny_model: Tiny, batches: list[Batch]
) -> None:
    labelled = [{**batch, "labels": torch.arange(6) % 2} for batch in batches]
    plain = prune(tiny_model(), labelled, HALF, KWON)
    other = prune(tiny_model(), labelled, HALF, Settings(method="kwon", **changes))
    assert other.achieved["mac"] <= 0.5
    left, right = (logits_of(result.model, batches[0]) for result in (plain, other))
    assert not torch.allclose(left, right)


def test_failures_of_tuning_are_reported(
    tiny_model: Tiny, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rfprune.stages.tune.SCALE_LIMIT", 1e-6)
    result = prune(tiny_model(), batches, HALF, KWON)
    assert len(result.warnings) >= 1
    assert all(re.fullmatch(r"layer\.\d\.\w+ was left unchanged: .*", w) for w in result.warnings)
    assert all(set(mask.tolist()) <= {0.0, 1.0} for mask in result.masks)


def test_the_scheduled_teacher_is_masked_at_the_square_root(
    tiny_model: Tiny, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_macs = []

    def spy(layout: Any, importance: Any, costs: Any, budget: float) -> Any:
        kept_macs.append(budget / costs.original)
        return search(layout, importance, costs, budget)

    for module in ("kwon", "allocation"):
        monkeypatch.setattr(f"rfprune.methods.{module}.search", spy)
    for teacher, expected in (("scheduled", [0.25, 0.5]), ("dense", [0.25])):
        kept_macs.clear()
        settings = Settings(method="kwon", teacher=teacher)
        prune(tiny_model(), batches, Constraint("mac", 0.25), settings)
        assert kept_macs == pytest.approx(expected)


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_classical_criterion_prunes_and_is_refitted(
    criterion: str, allocation: str, rounds: int, tiny_model: Tiny, batches: list[Batch]
) -> None:
    classical = Settings(
        method="importance", importance=criterion, allocation=allocation, rounds=rounds
    )
    fitted, alone = (
        prune(tiny_model(), batches, HALF, replace(classical, tune=tune)) for tune in (True, False)
    )
    assert 0.4 < fitted.achieved["mac"] <= 0.5
    if allocation == "uniform":
        assert num_kept(fitted.masks) == (2, 6, 2, 6)
    if rounds == 1:
        assert all(torch.equal(*pair) for pair in zip(fitted.masks, alone.masks, strict=True))
    left, right = (logits_of(result.model, batches[0]) for result in (fitted, alone))
    assert not torch.allclose(left, right, atol=1e-3)


def test_fisher_importance_is_the_first_stage_of_the_published_method(
    tiny_model: Tiny, batches: list[Batch]
) -> None:
    first_stage = Settings(method="kwon", rearrange=False, tune=False)
    classical = Settings(method="importance", importance="fisher", tune=False)
    one, other = (prune(tiny_model(), batches, HALF, s) for s in (first_stage, classical))
    assert all(torch.equal(*pair) for pair in zip(one.masks, other.masks, strict=True))
    random_one = prune(tiny_model(), batches, HALF, replace(classical, importance="random"))
    assert any(not torch.equal(*pair) for pair in zip(one.masks, random_one.masks, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_of_the_users_own_takes_the_place_of_the_predictions(
    method: str, tiny_model: Tiny, batches: list[Batch], tmp_path: Path
) -> None:
    """Given the loss on the labels, it is the same as `use_labels`, and nothing is kept of it."""
    labelled = [{**batch, "labels": torch.arange(6) % 2} for batch in batches]
    calls = []

    def loss(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        calls.append(batch)
        return torch.nn.functional.cross_entropy(outputs.logits, batch["labels"])

    settings = Settings(method=method, tune=False)
    own = prune(tiny_model(), labelled, HALF, settings, loss=loss, cache=tmp_path)
    assert len(calls) == 1 + len(labelled) and not any(tmp_path.iterdir())
    by_label = prune(tiny_model(), labelled, HALF, replace(settings, use_labels=True))
    free = prune(tiny_model(), labelled, HALF, settings)
    found, expected, other = (
        result.importance or [curve.errors for curve in result.curves or ()]
        for result in (own, by_label, free)
    )
    for i, values in enumerate(expected):
        torch.testing.assert_close(found[i], values, rtol=1e-3, atol=1e-9)
    assert not all(torch.allclose(o, e, rtol=1e-3) for o, e in zip(other, expected, strict=True))
