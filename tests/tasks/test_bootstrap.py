"""The standard error of a drop, against the analytic error and against full evaluations.

Without these --max-drop could rest on unpaired resamples, another split or another score.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rfprune.tasks.bootstrap import _scorer, paired_drop
from rfprune.tasks.evaluation import (
    Evaluation,
    EvaluationSet,
    evaluate_model,
    prepare_evaluation,
)
from rfprune.tasks.registry import get_task

Tiny = Callable[..., Any]
HEADS = {"squad": "question-answering", "squad_v2": "question-answering"}


def both(
    name: str, tiny_model: Tiny, tiny_tokenizer: Tiny, data_dir: Path
) -> tuple[EvaluationSet, Evaluation, Evaluation]:
    """Two random models on a task's tiny data."""
    task = get_task(name)
    prepared = prepare_evaluation(task, tiny_tokenizer(), data_dir)
    head = HEADS.get(name, "sequence-classification")
    models = [tiny_model("bert", head, seed=seed, num_labels=task.num_labels) for seed in (0, 1)]
    first, second = (evaluate_model(model, prepared) for model in models)
    assert first.score != second.score
    return prepared, first, second


@pytest.mark.parametrize("name", ["sst2", "mrpc", "stsb", "mnli", "squad", "squad_v2"])
def test_all_examples_once_give_the_score_itself(
    name: str, tiny_model: Tiny, tiny_tokenizer: Tiny, tiny_data_dir: Path
) -> None:
    prepared, first, second = both(name, tiny_model, tiny_tokenizer, tiny_data_dir)
    for evaluation in (first, second):
        score = _scorer(prepared, evaluation)
        assert score(np.arange(24)) == pytest.approx(evaluation.score, abs=1e-9)
    drop = paired_drop(prepared, first, second, allowed=0.0)
    assert drop.points == first.score - second.score
    assert drop.standard_error > 0
    assert 0 <= drop.within <= 1


def accuracies(*right: NDArray[np.bool_]) -> tuple[EvaluationSet, list[Evaluation]]:
    """Models that are right on these examples, and wrong on the others."""
    labels = np.zeros(len(right[0]), dtype=np.int64)
    prepared = EvaluationSet(get_task("sst2"), (), (), {"validation": len(labels)}, labels)
    evaluations = []
    for one in right:
        logits = np.stack([one, ~one], axis=1).astype(np.float32)
        score = 100 * float(one.mean())
        scores = {"accuracy": score}
        evaluations.append(Evaluation(score, "accuracy", scores, (logits,), len(one), 0.0))
    return prepared, evaluations


def test_the_error_is_that_of_the_paired_difference() -> None:
    """Two models that are wrong in the same places differ by less than each one's own error."""
    generator = np.random.default_rng(0)
    first = generator.random(2000) < 0.8
    second = first & (generator.random(2000) < 0.98)
    prepared, (original, other) = accuracies(first, second)
    drop = paired_drop(prepared, original, other, allowed=original.score - other.score)
    analytic = 100 * float((first.astype(float) - second).std()) / 2000**0.5
    unpaired = 100 * float((first.var() + second.var()) / 2000) ** 0.5
    assert analytic < 0.4 * unpaired
    assert drop.standard_error == pytest.approx(analytic, rel=0.15)
    assert 0.35 < drop.within < 0.65  # the limit is the drop itself
    assert paired_drop(prepared, original, other, allowed=100.0).within == 1.0
    assert paired_drop(prepared, original, other, allowed=0.0).within == 0.0
    assert paired_drop(prepared, other, original, allowed=0.0).within == 1.0


def test_the_same_seed_gives_the_same_and_another_another() -> None:
    generator = np.random.default_rng(1)
    prepared, (first, second) = accuracies(*(generator.random((2, 200)) < 0.7))
    drop = paired_drop(prepared, first, second, allowed=1.0)
    assert paired_drop(prepared, first, second, allowed=1.0) == drop
    assert paired_drop(prepared, first, second, allowed=1.0, seed=1) != drop


def test_a_model_is_surely_as_good_as_itself() -> None:
    right = np.arange(50) % 3 > 0
    prepared, (first, second) = accuracies(right, right)
    drop = paired_drop(prepared, first, second, allowed=0.0)
    assert (drop.points, drop.standard_error, drop.within) == (0.0, 0.0, 1.0)
