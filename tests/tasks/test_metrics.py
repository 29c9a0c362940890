"""Scores against their definitions written out, and the `evaluate` modules against the functions.

Without these a wrong score would look like a better or worse model.
"""

import itertools
import re
import string
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfprune.tasks import metrics
from rfprune.tasks.registry import TASKS

BITS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=12)
VALUES = st.lists(
    st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=1, max_size=10
)  # small integers: many ties
WORDS = st.sampled_from(["the", "a", "An", "cat", "cats", "U.S.", "--", "9%", "theme"])
TEXTS = st.lists(WORDS, max_size=4).map("  ".join)


def confusion(pairs: list[tuple[int, int]]) -> tuple[int, int, int, int]:
    """True positives, false positives, false negatives, true negatives of (predicted, true)."""
    counts = Counter(pairs)
    return counts[1, 1], counts[1, 0], counts[0, 1], counts[0, 0]


def macro_f1(pairs: list[tuple[int, int]]) -> float:
    """The mean over the classes that are in either column of 2 both / (predicted + true)."""
    predicted, truth = zip(*pairs, strict=True)
    classes = {*predicted, *truth}
    return sum(
        2 * pairs.count((label, label)) / (predicted.count(label) + truth.count(label))
        for label in classes
    ) / len(classes)


@given(BITS)
def test_classification_scores_are_their_definitions(pairs: list[tuple[int, int]]) -> None:
    predicted, truth = (list(column) for column in zip(*pairs, strict=True))
    tp, fp, fn, tn = confusion(pairs)
    spread = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    expected = {
        "accuracy": (tp + tn) / len(pairs),
        "f1": 2 * tp / (2 * tp + fp + fn) if tp else 0.0,
        "f1_macro": macro_f1(pairs),
        "matthews_correlation": (tp * tn - fp * fn) / spread**0.5 if spread else 0.0,
    }
    for name, value in expected.items():
        assert metrics.SCORE_FUNCTIONS[name](predicted, truth) == pytest.approx(value)


def average_ranks(values: list[int]) -> list[float]:
    """Ranks from 1, equal values sharing the mean of theirs."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]


def correlation(first: list[float], second: list[float]) -> float:
    """Pearson's correlation by its definition, 0 where it has none."""
    a, b = (np.array(values, dtype=float) - np.mean(values) for values in (first, second))
    scale = float((a @ a) * (b @ b))
    return float(a @ b) / scale**0.5 if scale else 0.0


@given(VALUES)
def test_correlations_are_their_definitions(pairs: list[tuple[int, int]]) -> None:
    first, second = (list(column) for column in zip(*pairs, strict=True))
    assert metrics.pearson(first, second) == pytest.approx(correlation(first, second), abs=1e-9)
    expected = correlation(average_ranks(first), average_ranks(second))
    assert metrics.spearmanr(first, second) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["pearson", "spearmanr", "matthews_correlation", "f1"])
def test_constant_predictions_score_zero_without_a_warning(name: str) -> None:
    truth = [0, 1, 1, 0]
    assert metrics.SCORE_FUNCTIONS[name](truth, truth) == pytest.approx(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.SCORE_FUNCTIONS[name]([0, 0, 0, 0], truth) == 0.0
        assert metrics.SCORE_FUNCTIONS[name]([0], [0]) == 0.0


def test_nearly_constant_predictions_warn_nobody() -> None:
    nearly = [1.0, 1.0 + 2e-16, 1.0 + 4e-16]
    assert nearly[0] != nearly[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert abs(metrics.pearson(nearly, [1, 2, 3])) <= 1.0


@pytest.mark.parametrize(
    ("predictions", "references", "what"),
    [
        ([1, 0], [1], "one length"),
        ([], [], "not empty"),
        ([[1, 0]], [[1, 0]], "vectors"),
        ([1.0, float("nan")], [1, 0], "finite"),
        ([1.0, 2.0], [1.0, float("inf")], "finite"),
    ],
)
def test_scores_refuse_what_has_none(predictions: Any, references: Any, what: str) -> None:
    for function in metrics.SCORE_FUNCTIONS.values():
        with pytest.raises(ValueError, match=what):
            function(predictions, references)


def test_every_task_has_its_main_score() -> None:
    for task in TASKS.values():
        if task.kind != "question-answering":
            assert task.metric_name in metrics.score_names(task)
            assert task.name in metrics.GLUE_SCORES


# SQuAD


def normal_form(text: str) -> str:
    """The official steps one after the other, character by character."""
    lowered = "".join(sign for sign in text.lower() if sign not in set(string.punctuation))
    words = re.sub(r"\b(a|an|the)\b", " ", lowered).split()
    return " ".join(words)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat.", "cat"),
        ("an apple a day", "apple day"),
        ("theme, a-team & U.S.", "theme ateam us"),
        ("the", ""),
        ("Äpfel – «the» 5%", "äpfel – « » 5"),
        ("", ""),
    ],
)
def test_normal_form_of_answers(text: str, expected: str) -> None:
    assert metrics.normalize_answer(text) == expected == normal_form(text)


@given(st.text(alphabet="aAnthe .,-'x\n\t«é", max_size=20))
def test_normal_form_is_the_official_one(text: str) -> None:
    assert metrics.normalize_answer(text) == normal_form(text)


def token_f1(prediction: str, answer: str) -> float:
    predicted, truth = normal_form(prediction).split(), normal_form(answer).split()
    same = sum((Counter(predicted) & Counter(truth)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(predicted), same / len(truth)
    return 2 * precision * recall / (precision + recall)


QUESTIONS = st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), min_size=1)


@given(QUESTIONS)
def test_squad_takes_the_best_reference(questions: list[tuple[str, list[str]]]) -> None:
    scores = metrics.squad_scores(
        [prediction for prediction, _ in questions], [answers for _, answers in questions]
    )
    exact = [max(normal_form(p) == normal_form(a) for a in answers) for p, answers in questions]
    f1 = [max(token_f1(p, a) for a in answers) for p, answers in questions]
    assert scores["exact_match"] == pytest.approx(100 * np.mean(exact))
    assert scores["f1"] == pytest.approx(100 * np.mean(f1))


def test_squad_by_hand() -> None:
    predictions = ["The Broncos", "gold and blue", "x", None]
    references = [["Denver Broncos", "broncos!"], ["blue"], ["y"], ["z"]]
    assert metrics.squad_scores(predictions, references) == pytest.approx(
        {"exact_match": 25.0, "f1": 100 * (1 + 0.5) / 4}
    )
    with pytest.raises(ValueError, match="question 1 has no reference"):
        metrics.squad_scores(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="one length"):
        metrics.squad_scores(["a"], [["a"], ["b"]])


V2_QUESTIONS = st.lists(
    st.tuples(TEXTS, st.lists(TEXTS, max_size=2), st.integers(-2, 2)), min_size=1, max_size=8
)


@given(V2_QUESTIONS, st.integers(-2, 2))
def test_squad_v2_is_the_official_script(
    questions: list[tuple[str, list[str], int]], threshold: int
) -> None:
    predictions, references, no_answer = (list(column) for column in zip(*questions, strict=True))
    scores = metrics.squad_v2_scores(predictions, references, no_answer, threshold)
    expected = literal_squad_v2(predictions, references, no_answer, threshold)
    assert scores == pytest.approx(expected)
    assert list(scores) == list(expected)


def literal_squad_v2(
    predictions: list[str], references: list[list[str]], no_answer: list[int], threshold: float
) -> dict[str, float]:
    """The steps of the official script for 2.0, a question at a time."""
    raw: dict[str, list[float]] = {"exact": [], "f1": []}
    for prediction, answers in zip(predictions, references, strict=True):
        golds = [answer for answer in answers if normal_form(answer)] or [""]
        raw["exact"].append(max(float(normal_form(prediction) == normal_form(g)) for g in golds))
        raw["f1"].append(
            max(
                token_f1(prediction, gold)
                if normal_form(prediction) and normal_form(gold)
                else float(normal_form(prediction) == normal_form(gold))
                for gold in golds
            )
        )
    has_answer = [bool(answers) for answers in references]
    final = {
        key: [
            float(not has) if unsure > threshold else value
            for value, has, unsure in zip(values, has_answer, no_answer, strict=True)
        ]
        for key, values in raw.items()
    }
    expected: dict[str, float] = {}
    for prefix, kinds in (("", (True, False)), ("HasAns_", (True,)), ("NoAns_", (False,))):
        rows = [row for row, has in enumerate(has_answer) if has in kinds]
        if rows:
            for key, values in final.items():
                expected[prefix + key] = 100 * sum(values[row] for row in rows) / len(rows)
            expected[f"{prefix}total"] = len(rows)
    for key, values in raw.items():
        current = best = float(sum(not has for has in has_answer))
        best_threshold = 0.0
        for row in sorted(range(len(values)), key=no_answer.__getitem__):
            if has_answer[row]:
                current += values[row]
            elif predictions[row]:
                current -= 1
            if current > best:
                best, best_threshold = current, no_answer[row]
        expected[f"best_{key}"] = 100 * best / len(values)
        expected[f"best_{key}_thresh"] = best_threshold
    return expected


@given(V2_QUESTIONS)
def test_no_threshold_beats_the_best_one(questions: list[tuple[str, list[str], int]]) -> None:
    # Distinct scores: between equal ones the official script may stop, a threshold cannot.
    predictions, references, _ = (list(column) for column in zip(*questions, strict=True))
    predictions = [prediction or "cat" for prediction in predictions]
    no_answer = [float(row) for row in range(len(predictions))]
    best = metrics.squad_v2_scores(predictions, references, no_answer)["best_f1"]
    every = [
        metrics.squad_v2_scores(predictions, references, no_answer, threshold)["f1"]
        for threshold in [-1.0, *no_answer]
    ]
    readable = all(not answers or any(map(normal_form, answers)) for answers in references)
    if readable and all(map(normal_form, predictions)):
        assert best == pytest.approx(max(every))


# The evaluate modules


def test_importing_the_metrics_leaves_evaluate_alone() -> None:
    loaded = "sys.exit(bool({'evaluate', 'datasets', 'torch'} & {*sys.modules}))"
    code = f"import rfprune.tasks.metrics, sys; {loaded}"
    root = Path(__file__).parents[2]
    finished = subprocess.run([sys.executable, "-c", code], cwd=root, check=False)
    assert finished.returncode == 0


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `evaluate` puts what it writes during the test."""
    evaluate = import_evaluate()
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def import_evaluate() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own imports use what others deprecate
        import evaluate
    return evaluate


SQUAD = {"id": "q1", "answers": {"text": ["Denver Broncos", "broncos"], "answer_start": [0, 7]}}


@pytest.mark.parametrize("loader", ["evaluate.load", "load_metric"])
def test_metric_modules_give_what_the_functions_give(loader: str, caches: Path) -> None:
    evaluate = import_evaluate()

    def metric(name: str) -> Any:
        if loader == "load_metric":
            return metrics.load_metric(name)
        module = name if name.startswith("squad") else "glue"
        return evaluate.load(str(metrics.metric_module(module)), name, keep_in_memory=True)

    predicted, truth = [0, 1, 1, 0, 1], [0, 1, 0, 1, 1]
    for name in ("mrpc", "cola", "mnli_mismatched"):
        expected = metrics.glue_scores(name, predicted, truth)
        assert expected
        assert metric(name).compute(predictions=predicted, references=truth) == expected
    values = [0.5, 1.5, 3.25, 2.0]
    similarity = metric("stsb").compute(predictions=values, references=[0.0, 2.5, 2.0, 3.0])
    assert similarity == pytest.approx(metrics.glue_scores("stsb", values, [0.0, 2.5, 2.0, 3.0]))

    prediction = {"id": "q1", "prediction_text": "the Broncos"}
    found = metric("squad").compute(predictions=[prediction], references=[SQUAD])
    assert found == {"exact_match": 100.0, "f1": 100.0}
    unsure = prediction | {"no_answer_probability": 0.5}
    arguments = {"predictions": [unsure], "references": [SQUAD]}
    assert metric("squad_v2").compute(**arguments)["HasAns_exact"] == 100.0
    assert metric("squad_v2").compute(**arguments, no_answer_threshold=0.4)["exact"] == 0.0
    if loader == "load_metric":
        assert list(caches.iterdir()) == []


def test_squad_modules_go_by_id_not_by_order(caches: Path) -> None:
    second = {"id": "q2", "answers": {"text": ["gold"], "answer_start": [3]}}
    answers = {"q1": "broncos", "q2": "gold"}
    for order in itertools.permutations(answers):
        predictions = [{"id": name, "prediction_text": answers[name]} for name in order]
        scores = metrics.load_metric("squad").compute(
            predictions=predictions, references=[SQUAD, second]
        )
        assert scores["exact_match"] == 100.0
    unsure = [{"id": "q1", "prediction_text": "", "no_answer_probability": 0.0}] * 2
    with pytest.raises(ValueError, match="no prediction for 1 questions, as q2"):
        metrics.load_metric("squad_v2").compute(predictions=unsure, references=[SQUAD, second])


def test_an_unknown_glue_task_is_refused(caches: Path) -> None:
    with pytest.raises(KeyError, match="wnli"):
        metrics.load_metric("glue")


@pytest.mark.network
@pytest.mark.parametrize("name", sorted(metrics.GLUE_SCORES))
def test_glue_equals_the_hub(name: str) -> None:
    generator = np.random.default_rng(0)
    truth, predicted = generator.integers(0, 2, (2, 50)).tolist()
    if name == "stsb":
        truth, predicted = (5 * generator.random((2, 50))).round(2).tolist()
    official = import_evaluate().load("glue", name)
    expected = official.compute(predictions=predicted, references=truth)
    assert expected == pytest.approx(metrics.glue_scores(name, predicted, truth), abs=1e-6)


@pytest.mark.network
@pytest.mark.parametrize("name", ["squad", "squad_v2"])
def test_squad_equals_the_hub(name: str) -> None:
    texts = ["the broncos", "Denver", "gold", "a", ""]
    references = [SQUAD | {"id": f"q{row}"} for row in range(len(texts))]
    predictions = [{"id": f"q{row}", "prediction_text": text} for row, text in enumerate(texts)]
    if name == "squad_v2":
        references[2] = references[2] | {"answers": {"text": [], "answer_start": []}}
        for row, prediction in enumerate(predictions):
            prediction["no_answer_probability"] = row / 5  # type: ignore[assignment]
    arguments = {"predictions": predictions, "references": references}
    official = import_evaluate().load(name).compute(**arguments)
    assert official == pytest.approx(metrics.load_metric(name).compute(**arguments))
