"""The polish trains norms and biases alone, and keeps what lowers the held-out divergence.

Deleting this lets it touch weights, labels, or keep a model that it made worse.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # scripts are no package

from rfprune.model.layout import layout_of
from rfprune.model.masks import frozen, full_masks, masked
from scripts import variation_polish as stage
from scripts.variation_polish import norms_and_biases, polish, prediction_divergence

Tiny = Callable[..., Any]
Batch = dict[str, Tensor]


@pytest.fixture
def batches(tiny_batch: Tiny) -> list[Batch]:
    return [tiny_batch(6, 9, seed=seed) for seed in range(10)]


def disturbed(model: Any) -> Any:
    """A copy whose last norm is off, which a polish can mend."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in norms_and_biases(other)[-4:]:
            parameter.add_(0.5 * torch.randn_like(parameter))
    return other


HEADS: list[dict[str, Any]] = [
    {},
    {"num_labels": 1, "problem_type": "regression"},
    {"num_labels": 4, "problem_type": "multi_label_classification"},
    {"head": "question-answering"},
]


@pytest.mark.parametrize("changes", HEADS)
def test_it_lowers_the_divergence_and_leaves_the_weights(
    tiny_model: Tiny,
    batches: list[Batch],
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(stage, "LEARNING_RATE", 1e-3)
    teacher = tiny_model(**changes)
    student = disturbed(teacher)
    weights = {n: p.clone() for n, p in student.named_parameters() if p.dim() > 1}
    flags = [p.requires_grad for p in student.parameters()]
    with frozen(teacher):
        before, after = polish(teacher, student, batches)
        with torch.no_grad():
            measured = torch.cat(
                [prediction_divergence(teacher, student, batch) for batch in batches[::8]]
            )
    assert after < 0.8 * before
    assert float(measured.double().mean()) == pytest.approx(after)
    assert all(torch.equal(p, weights[n]) for n, p in student.named_parameters() if n in weights)
    assert [p.requires_grad for p in student.parameters()] == flags
    assert all(p.grad is None for p in student.parameters())


def test_what_does_not_help_is_taken_back(
    tiny_model: Tiny, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "LEARNING_RATE", 1e3)
    teacher = tiny_model()
    student = disturbed(teacher)
    state = {name: value.clone() for name, value in student.state_dict().items()}
    trained: list[bool] = []

    def spy(*arguments: Any) -> None:
        train(*arguments)
        trained.append(any(not torch.equal(v, state[n]) for n, v in student.state_dict().items()))

    train = stage._train
    monkeypatch.setattr(stage, "_train", spy)
    before, after = polish(teacher, student, batches)
    assert trained == [True]
    assert after == before
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())


def test_equal_models_do_not_diverge_and_padding_does_not_count(
    tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model = tiny_model(head="question-answering")
    batch = tiny_batch(4, 9)
    layout = layout_of(model)
    assert float(prediction_divergence(model, model, batch).detach().abs().max()) < 1e-6
    masks = full_masks(layout)
    masks[0][0] = 0.0
    other = copy.deepcopy(model)
    with masked(other, layout, masks):
        rows = prediction_divergence(model, other, batch)
        wider = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in batch.items()}
        assert rows.min() > 1e-4
        torch.testing.assert_close(prediction_divergence(model, other, wider), rows)


def test_a_single_batch_has_nothing_to_hold_out(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    model = tiny_model()
    assert polish(model, copy.deepcopy(model), [tiny_batch(4, 5)]) == (0.0, 0.0)
