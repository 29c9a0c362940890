"""SQuAD's scores by the rules of its official scripts, in points of 100.

Exact match and word F1 after removing case, punctuation and articles; each prediction is compared
with every accepted answer and its best score counts.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

NO_ANSWER_THRESHOLD = 0.0
"""A question is left unanswered where its no-answer score exceeds its best span's by more."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_scores(
    predictions: Sequence[str | None], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """The scores of SQuAD 1.1, in points of 100.

    Args:
        predictions: one answer per question; None (not answered) scores 0.
        references: the accepted answers to each question; the best one counts.

    Returns:
        `exact_match` and `f1`.

    Raises:
        ValueError: no questions, different lengths, or a question without accepted answers.
    """
    _check_lengths(predictions, references)
    exact_matches, token_f1s = [], []
    for number, (prediction, answers) in enumerate(zip(predictions, references, strict=True)):
        if not answers:
            raise ValueError(f"question {number} has no reference answer: SQuAD 1.1 needs one")
        answered = [] if prediction is None else [(prediction, answer) for answer in answers]
        exact_matches.append(max((_exact_match(*pair) for pair in answered), default=0.0))
        token_f1s.append(max((_token_f1(*pair) for pair in answered), default=0.0))
    return {"exact_match": _points(exact_matches), "f1": _points(token_f1s)}


def squad_v2_scores(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    no_answer_scores: Sequence[float],
    threshold: float = NO_ANSWER_THRESHOLD,
) -> dict[str, float]:
    """The scores of SQuAD 2.0 by the keys of its official script, in points of 100.

    Args:
        predictions: the best answer to each question, whether or not it is given.
        references: the accepted answers to each question; empty for an unanswerable one.
        no_answer_scores: higher for questions that more likely have no answer.
        threshold: a question with a higher score is left unanswered.

    Returns:
        `exact`, `f1` and `total` of all questions; with `HasAns_` and `NoAns_` those of answerable
        and unanswerable ones, if there are any; and `best_exact`, `best_f1` over all thresholds,
        with the threshold as `..._thresh`.

    Raises:
        ValueError: no questions, or different lengths.
    """
    _check_lengths(predictions, references, no_answer_scores)
    answerable = np.array([len(answers) > 0 for answers in references])
    no_answer = np.asarray(no_answer_scores, dtype=np.float64)
    given = np.array([prediction != "" for prediction in predictions])
    raw = {
        "exact": _best_over_answers(_exact_match, predictions, references),
        "f1": _best_over_answers(_token_f1_or_both_empty, predictions, references),
    }
    final = {key: np.where(no_answer > threshold, ~answerable, raw[key]) for key in raw}

    scores: dict[str, float] = {}
    for prefix, rows in (("", answerable | True), ("HasAns_", answerable), ("NoAns_", ~answerable)):
        if rows.any():
            scores |= {f"{prefix}{key}": _points(final[key][rows]) for key in final}
            scores[f"{prefix}total"] = int(rows.sum())
    for key, values in raw.items():
        best, best_threshold = _best_threshold(values, no_answer, answerable, given)
        scores |= {f"best_{key}": best, f"best_{key}_thresh": best_threshold}
    return scores


@lru_cache(maxsize=65536)
def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and articles, with single spaces."""
    bare = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def _check_lengths(*columns: Sequence[Any]) -> None:
    lengths = [len(column) for column in columns]
    if len(set(lengths)) != 1 or lengths[0] == 0:
        raise ValueError(f"SQuAD columns must have one length, not empty: got {lengths}")


def _points(values: ArrayLike) -> float:
    return 100.0 * float(np.mean(np.asarray(values, dtype=np.float64)))


def _exact_match(prediction: str, answer: str) -> float:
    return float(normalize_answer(prediction) == normalize_answer(answer))


def _token_f1(prediction: str, answer: str) -> float:
    """F1 of the words of the two normalised texts; 0 without a common word."""
    predicted, truth = normalize_answer(prediction).split(), normalize_answer(answer).split()
    num_common = sum((Counter(predicted) & Counter(truth)).values())
    return 2.0 * num_common / (len(predicted) + len(truth)) if num_common else 0.0


def _token_f1_or_both_empty(prediction: str, answer: str) -> float:
    """As `_token_f1`, but 1 for two empty texts, as in SQuAD 2.0."""
    if not normalize_answer(prediction) and not normalize_answer(answer):
        return 1.0
    return _token_f1(prediction, answer)


def _best_over_answers(
    score: Callable[[str, str], float],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
) -> NDArray[np.float64]:
    """The best score over each question's accepted answers; without any, against ""."""
    best = []
    for prediction, answers in zip(predictions, references, strict=True):
        kept = [answer for answer in answers if normalize_answer(answer)] or [""]
        best.append(max(score(prediction, answer) for answer in kept))
    return np.array(best)


def _best_threshold(
    raw: NDArray[np.float64],
    no_answer: NDArray[np.float64],
    answerable: NDArray[np.bool_],
    given: NDArray[np.bool_],
) -> tuple[float, float]:
    """The best mean score over all thresholds, in points, and the first threshold that has it.

    Starts from answering no question, which is right for every unanswerable one, and answers the
    questions by ascending no-answer score (ties in the order of the data).
    """
    order = np.argsort(no_answer, kind="stable")
    gains = np.where(answerable, raw, -given.astype(np.float64))[order]
    totals = np.cumsum(np.concatenate([[(~answerable).sum()], gains]))
    best = int(np.argmax(totals))
    threshold = 0.0 if best == 0 else float(no_answer[order][best - 1])
    return 100.0 * float(totals[best]) / len(raw), threshold
