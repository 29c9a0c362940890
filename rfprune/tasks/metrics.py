"""Scores by their official definitions, as pure functions of predictions and references.

GLUE's are computed by scikit-learn and scipy and given as fractions of 1, SQuAD's follow the
rules of its official scripts and are given in points of 100, exactly as the hub's metrics of the
same names. `metric_modules/` wraps them as `evaluate.Metric` for whoever wants that interface.
"""

import re
import string
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rfprune.tasks.registry import Kind, Task

# The scores of each GLUE task, by the keys of the hub's `glue` metric.
GLUE_SCORES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "mrpc": ("accuracy", "f1"),
        "sst2": ("accuracy",),
        "stsb": ("pearson", "spearmanr"),
        "cola": ("matthews_correlation",),
        "rte": ("accuracy",),
        "qnli": ("accuracy",),
        "qqp": ("accuracy", "f1"),
        "mnli": ("accuracy",),
        "mnli_matched": ("accuracy",),
        "mnli_mismatched": ("accuracy",),
        "wnli": ("accuracy",),
    }
)
_SCORES_OF_KIND: Mapping[Kind, tuple[str, ...]] = MappingProxyType(
    {
        "regression": ("pearson", "spearmanr"),
        "similarity": ("pearson", "spearmanr"),
        "multi-label": ("f1_micro", "f1_labels"),
        "multiple-choice": ("accuracy",),
    }
)
# A question goes unanswered when its no-answer score is above its best span's by more than this.
NO_ANSWER_THRESHOLD = 0.0

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def accuracy(predictions: ArrayLike, references: ArrayLike) -> float:
    """Fraction of the predicted label ids, (N,), that equal the references, (N,)."""
    from sklearn.metrics import accuracy_score

    predicted, truth = _pair(predictions, references)
    return float(accuracy_score(truth, predicted))


def f1(predictions: ArrayLike, references: ArrayLike) -> float:
    """F1 of label id 1, from label ids (N,); 0 where no row is or is said to be 1."""
    from sklearn.metrics import f1_score

    predicted, truth = _pair(predictions, references)
    return float(f1_score(truth, predicted, zero_division=0))


def f1_macro(predictions: ArrayLike, references: ArrayLike) -> float:
    """Mean F1 of the classes that are there or predicted, from label ids (N,)."""
    from sklearn.metrics import f1_score

    predicted, truth = _pair(predictions, references)
    return float(f1_score(truth, predicted, average="macro", zero_division=0))


def f1_micro(predictions: ArrayLike, references: ArrayLike) -> float:
    """F1 over all labels of all rows together, from 0 and 1 for every label, (N, L); 0 where none
    is or is said to be there."""
    predicted, truth = (np.asarray(values).ravel() for values in (predictions, references))
    return f1(predicted, truth.astype(np.int64))


def f1_labels(predictions: ArrayLike, references: ArrayLike) -> float:
    """Mean F1 of the L labels, from 0 and 1 for every label, (N, L); of a label that never is or is
    said to be there it is 0."""
    columns = (np.asarray(values).astype(np.int64).T for values in (predictions, references))
    return float(np.mean([f1(*pair) for pair in zip(*columns, strict=True)]))


def matthews_correlation(predictions: ArrayLike, references: ArrayLike) -> float:
    """Matthews correlation of label ids (N,); 0 where either side is constant."""
    from sklearn.metrics import matthews_corrcoef

    predicted, truth = _pair(predictions, references)
    if _is_constant(predicted) or _is_constant(truth):
        return 0.0
    return float(matthews_corrcoef(truth, predicted))


def pearson(predictions: ArrayLike, references: ArrayLike) -> float:
    """Pearson correlation of values (N,); 0 where it is undefined: either side constant."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, references)


def spearmanr(predictions: ArrayLike, references: ArrayLike) -> float:
    """Spearman's rank correlation of values (N,); 0 where it is undefined: either side constant."""
    from scipy.stats import spearmanr as scipy_spearmanr

    return _correlation(scipy_spearmanr, predictions, references)


SCORE_FUNCTIONS: Mapping[str, Callable[[ArrayLike, ArrayLike], float]] = MappingProxyType(
    {
        "accuracy": accuracy,
        "f1": f1,
        "f1_macro": f1_macro,
        "matthews_correlation": matthews_correlation,
        "pearson": pearson,
        "spearmanr": spearmanr,
    }
)

_OF_LABEL_SETS = MappingProxyType({"f1_micro": f1_micro, "f1_labels": f1_labels})


def score_function(name: str) -> Callable[[ArrayLike, ArrayLike], float]:
    """What computes a score, as a fraction of 1, from predictions and references (N,), or, of
    several labels at once, (N, L)."""
    return _OF_LABEL_SETS.get(name) or SCORE_FUNCTIONS[name]


def glue_scores(name: str, predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
    """The scores of one GLUE task as fractions of 1, keyed as the hub's `glue` metric keys them.

    `predictions` and `references` are label ids, or values for stsb, both (N,). KeyError for an
    unknown name; ValueError for no rows, unequal lengths, NaN or infinity.
    """
    return {score: SCORE_FUNCTIONS[score](predictions, references) for score in GLUE_SCORES[name]}


def score_names(task: Task) -> tuple[str, ...]:
    """The scores of a classification or regression task; by its kind where it is not GLUE's."""
    return GLUE_SCORES.get(task.name, _SCORES_OF_KIND.get(task.kind, ("accuracy", "f1_macro")))


def squad_scores(
    predictions: Sequence[str | None], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """`exact_match` and `f1` of SQuAD 1.1 in points of 100, by its official script's rules.

    `references[i]` holds the accepted answers to question i, of which the best counts. A
    prediction of None (not answered) scores 0. ValueError for a question without references.
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
    """The scores of SQuAD 2.0 by its official script's rules and keys, in points of 100.

    `predictions[i]` is the best answer to question i whether or not it is to be given:
    `no_answer_scores[i]`, any number that grows with the belief that there is none, above
    `threshold` makes it unanswered. `references[i]` is empty for an unanswerable question.
    Besides `exact`, `f1` and `total`: `HasAns_` and `NoAns_` for the two kinds of question where
    there are any, and `best_exact`, `best_f1` with the threshold, `..._thresh`, that gives them.
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
    """Lower case without ASCII punctuation and articles, single spaces: SQuAD's normal form."""
    bare = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def metric_module(name: str) -> Path:
    """The file that `evaluate.load(file, config_name)` loads: name is glue, squad or squad_v2."""
    return Path(__file__).parent / "metric_modules" / f"{name}.py"


def load_metric(task_name: str) -> Any:
    """The task's `evaluate.Metric`, ready to use, that keeps everything in memory."""
    import importlib

    module_name = task_name if task_name in ("squad", "squad_v2") else "glue"
    module = importlib.import_module(f"rfprune.tasks.metric_modules.{module_name}")
    # The library makes a folder for its cache even when it keeps everything in memory.
    with tempfile.TemporaryDirectory() as folder:
        return module.METRIC(task_name, keep_in_memory=True, cache_dir=folder)


def _pair(
    predictions: ArrayLike, references: ArrayLike
) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """Both as arrays (N,) of one length, all numbers finite."""
    predicted, truth = np.asarray(predictions), np.asarray(references)
    if predicted.ndim != 1 or predicted.shape != truth.shape or len(predicted) == 0:
        raise ValueError(
            f"predictions and references must be vectors of one length, not empty: "
            f"got {predicted.shape} and {truth.shape}"
        )
    if not (np.isfinite(predicted).all() and np.isfinite(truth).all()):
        raise ValueError("predictions and references must be finite: got NaN or infinity")
    return predicted, truth


def _correlation(
    function: Callable[..., Any], predictions: ArrayLike, references: ArrayLike
) -> float:
    predicted, truth = (values.astype(np.float64) for values in _pair(predictions, references))
    if _is_constant(predicted) or _is_constant(truth):
        return 0.0
    with warnings.catch_warnings():
        # scipy warns where values are so nearly constant that rounding may rule the result.
        warnings.simplefilter("ignore")
        value = float(function(predicted, truth)[0])
    return value if np.isfinite(value) else 0.0


def _is_constant(values: NDArray[np.generic]) -> bool:
    return bool((values == values[0]).all())


def _check_lengths(*columns: Sequence[Any]) -> None:
    lengths = [len(column) for column in columns]
    if len(set(lengths)) != 1 or lengths[0] == 0:
        raise ValueError(f"SQuAD columns must have one length, not empty: got {lengths}")


def _points(values: ArrayLike) -> float:
    return 100.0 * float(np.mean(np.asarray(values, dtype=np.float64)))


def _exact_match(prediction: str, answer: str) -> float:
    return float(normalize_answer(prediction) == normalize_answer(answer))


def _token_f1(prediction: str, answer: str) -> float:
    """F1 of the bags of words of the two normal forms; 0 without a word in common."""
    predicted, truth = normalize_answer(prediction).split(), normalize_answer(answer).split()
    num_common = sum((Counter(predicted) & Counter(truth)).values())
    return 2.0 * num_common / (len(predicted) + len(truth)) if num_common else 0.0


def _token_f1_or_both_empty(prediction: str, answer: str) -> float:
    """As `_token_f1`, but SQuAD 2.0 counts nothing against nothing as agreement."""
    if not normalize_answer(prediction) and not normalize_answer(answer):
        return 1.0
    return _token_f1(prediction, answer)


def _best_over_answers(
    score: Callable[[str, str], float],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
) -> NDArray[np.float64]:
    """Each question's score against its best answer; with no answer left, against nothing."""
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
    """The best mean score, in points, over all thresholds, and the first threshold that gives it.

    Start from answering nothing, which is right for every unanswerable question, and answer the
    questions in the order of their no-answer scores (ties: as they come).
    """
    order = np.argsort(no_answer, kind="stable")
    gains = np.where(answerable, raw, -given.astype(np.float64))[order]
    totals = np.cumsum(np.concatenate([[(~answerable).sum()], gains]))
    best = int(np.argmax(totals))
    threshold = 0.0 if best == 0 else float(no_answer[order][best - 1])
    return 100.0 * float(totals[best]) / len(raw), threshold
