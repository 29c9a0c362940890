"""The formulas of scores against their definitions written out.

Without these a wrong score would look like a better or worse model.
"""

import re
import string
import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfprune.tasks import metrics, squad_scores

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


def test_nearly_constant_predictions_give_no_warning() -> None:
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
    for name in ("accuracy", "f1", "f1_macro", "matthews_correlation", "pearson", "spearmanr"):
        with pytest.raises(ValueError, match=what):
            metrics.SCORE_FUNCTIONS[name](predictions, references)


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
    assert squad_scores.normalize_answer(text) == expected == normal_form(text)


@given(st.text(alphabet="aAnthe .,-'x\n\t«é", max_size=20))
def test_normal_form_is_the_official_one(text: str) -> None:
    assert squad_scores.normalize_answer(text) == normal_form(text)


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
    scores = squad_scores.squad_scores(
        [prediction for prediction, _ in questions], [answers for _, answers in questions]
    )
    exact = [max(normal_form(p) == normal_form(a) for a in answers) for p, answers in questions]
    f1 = [max(token_f1(p, a) for a in answers) for p, answers in questions]
    assert scores["exact_match"] == pytest.approx(100 * np.mean(exact))
    assert scores["f1"] == pytest.approx(100 * np.mean(f1))


def test_squad_scores_of_a_worked_example() -> None:
    predictions = ["The Broncos", "gold and blue", "x", None]
    references = [["Denver Broncos", "broncos!"], ["blue"], ["y"], ["z"]]
    assert squad_scores.squad_scores(predictions, references) == pytest.approx(
        {"exact_match": 25.0, "f1": 100 * (1 + 0.5) / 4}
    )
    with pytest.raises(ValueError, match="question 1 has no reference"):
        squad_scores.squad_scores(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="one length"):
        squad_scores.squad_scores(["a"], [["a"], ["b"]])


V2_QUESTIONS = st.lists(
    st.tuples(TEXTS, st.lists(TEXTS, max_size=2), st.integers(-2, 2)), min_size=1, max_size=8
)


@given(V2_QUESTIONS, st.integers(-2, 2))
def test_squad_v2_is_the_official_script(
    questions: list[tuple[str, list[str], int]], threshold: int
) -> None:
    predictions, references, no_answer = (list(column) for column in zip(*questions, strict=True))
    scores = squad_scores.squad_v2_scores(predictions, references, no_answer, threshold)
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
