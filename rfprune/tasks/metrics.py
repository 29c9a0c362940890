"""Every score that is reported: the formulas of labels and values, and the metric of each task.

Scores are computed by `evaluate.Metric` modules (metric_modules/), made in memory and without the
network by `load_metric`. Their formulas are plain functions, here and in `squad_scores.py` and
`entity_scores.py`: scikit-learn's and scipy's wherever these have them. The bootstrap of a score
calls the functions directly, hundreds of times.
"""

import importlib
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rfprune.tasks.entity_scores import names_entities
from rfprune.tasks.registry import Kind, Task

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
"""The scores of each GLUE task, by the keys of the hub's `glue` metric."""

_MODULE_OF_KIND: Mapping[Kind, tuple[str, str | None]] = MappingProxyType(
    {
        "classification": ("classification", None),
        "image-classification": ("classification", None),
        "multiple-choice": ("classification", "accuracy"),
        "regression": ("correlation", None),
        "similarity": ("correlation", None),
        "multi-label": ("multi_label", None),
        "token-classification": ("token_classification", None),
        "language-modeling": ("perplexity", None),
        "seq2seq": ("translation", None),
    }
)
"""File and configuration of the metric of a task that is neither GLUE's nor SQuAD's."""

_NOT_FRACTIONS = ("squad", "squad_v2", "perplexity", "translation")
"""Metrics whose scores are points of 100 already, or no points at all."""


def metric_module(name: str) -> Path:
    """The file that `evaluate.load(file, config_name)` loads.

    Args:
        name: classification, correlation, glue, multi_label, perplexity, rouge, squad, squad_v2,
            token_classification or translation.

    Example:
        >>> metric_module("glue").name
        'glue.py'
    """
    return Path(__file__).parent / "metric_modules" / f"{name}.py"


def metric_of_task(task: Task) -> tuple[str, str | None]:
    """The metric module of a task and its `config_name`."""
    if task.name in GLUE_SCORES:
        return "glue", task.name
    if task.kind == "question-answering":
        return task.name, None
    if task.kind == "token-classification" and not names_entities(task.label_names):
        return "token_classification", "accuracy"
    if task.metric_name == "rougeL":
        return "rouge", None
    return _MODULE_OF_KIND[task.kind]


def load_metric(name: str, config_name: str | None = None) -> Any:
    """An `evaluate.Metric` of ours that keeps everything in memory and needs no network.

    Args:
        name: see `metric_module`.
        config_name: the task, for glue; "accuracy" for accuracy alone, for classification and
            token_classification.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # evaluate imports names that others have deprecated
        module = importlib.import_module(f"rfprune.tasks.metric_modules.{name}")
    # evaluate makes a cache folder even for a metric that is kept in memory.
    with tempfile.TemporaryDirectory() as folder:
        return module.METRIC(config_name, keep_in_memory=True, cache_dir=folder)


def compute_scores(
    task: Task, predictions: Any, references: Any = None, **arguments: Any
) -> dict[str, float]:
    """All scores of a task by its metric: points of 100, except a perplexity.

    Args:
        task: decides the metric, see `metric_of_task`.
        predictions: inputs of the metric module, one per example.
        references: the same; None for a perplexity.
        arguments: further arguments of the metric, such as `no_answer_threshold`.

    Raises:
        ValueError: no examples, columns of different lengths, NaN or infinity.
    """
    name, config_name = metric_of_task(task)
    metric = load_metric(name, config_name)
    scores = metric.compute(predictions=predictions, references=references, **arguments)
    scale = 1.0 if name in _NOT_FRACTIONS else 100.0
    return {key: scale * value for key, value in scores.items()}


def accuracy(predictions: ArrayLike, references: ArrayLike) -> float:
    """Fraction of the predicted label ids, (N,), that equal the references, (N,)."""
    from sklearn.metrics import accuracy_score

    predicted, truth = _pair(predictions, references)
    return float(accuracy_score(truth, predicted))


def f1(predictions: ArrayLike, references: ArrayLike) -> float:
    """F1 of label id 1 from label ids (N,); 0 if no row has it, in either column."""
    from sklearn.metrics import f1_score

    predicted, truth = _pair(predictions, references)
    return float(f1_score(truth, predicted, zero_division=0))


def f1_macro(predictions: ArrayLike, references: ArrayLike) -> float:
    """Mean F1 of the classes that are predicted or in the references, from label ids (N,)."""
    from sklearn.metrics import f1_score

    predicted, truth = _pair(predictions, references)
    return float(f1_score(truth, predicted, average="macro", zero_division=0))


def f1_micro(predictions: ArrayLike, references: ArrayLike) -> float:
    """F1 over all labels of all rows together, from 0 or 1 per label, (N, L)."""
    predicted, truth = (np.asarray(values).ravel() for values in (predictions, references))
    return f1(predicted, truth.astype(np.int64))


def f1_labels(predictions: ArrayLike, references: ArrayLike) -> float:
    """Mean F1 of the L labels from 0 or 1 per label, (N, L); 0 for a label that never occurs."""
    columns = (np.asarray(values).astype(np.int64).T for values in (predictions, references))
    return float(np.mean([f1(*pair) for pair in zip(*columns, strict=True)]))


def matthews_correlation(predictions: ArrayLike, references: ArrayLike) -> float:
    """Matthews correlation of label ids (N,); 0 if either column is constant."""
    from sklearn.metrics import matthews_corrcoef

    predicted, truth = _pair(predictions, references)
    if _is_constant(predicted) or _is_constant(truth):
        return 0.0
    return float(matthews_corrcoef(truth, predicted))


def pearson(predictions: ArrayLike, references: ArrayLike) -> float:
    """Pearson correlation of values (N,); 0 if either column is constant."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, references)


def spearmanr(predictions: ArrayLike, references: ArrayLike) -> float:
    """Spearman's rank correlation of values (N,); 0 if either column is constant."""
    from scipy.stats import spearmanr as scipy_spearmanr

    return _correlation(scipy_spearmanr, predictions, references)


def perplexity(log_likelihoods: ArrayLike) -> float:
    """exp of the mean negative log-likelihood per token; infinite where that overflows."""
    with np.errstate(over="ignore"):
        return float(np.exp(-np.asarray(log_likelihoods).astype(np.float64).mean()))


SCORE_FUNCTIONS: Mapping[str, Callable[[ArrayLike, ArrayLike], float]] = MappingProxyType(
    {
        "accuracy": accuracy,
        "f1": f1,
        "f1_macro": f1_macro,
        "f1_micro": f1_micro,
        "f1_labels": f1_labels,
        "matthews_correlation": matthews_correlation,
        "pearson": pearson,
        "spearmanr": spearmanr,
    }
)
"""Scores as fractions of 1 from predictions and references, (N,), or (N, L) for several labels per
example (f1_micro and f1_labels)."""


def score_labels(
    names: tuple[str, ...], predictions: ArrayLike, references: ArrayLike
) -> dict[str, float]:
    """The scores of these names, as fractions of 1; see `SCORE_FUNCTIONS`."""
    return {name: SCORE_FUNCTIONS[name](predictions, references) for name in names}


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
        # scipy warns of values that are constant up to rounding.
        warnings.simplefilter("ignore")
        value = float(function(predicted, truth)[0])
    return value if np.isfinite(value) else 0.0


def _is_constant(values: NDArray[np.generic]) -> bool:
    return bool((values == values[0]).all())
