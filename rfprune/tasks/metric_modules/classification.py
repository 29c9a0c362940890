"""Accuracy and macro F1 of a classifier as an `evaluate.Metric`."""

from typing import Any

import datasets
import evaluate

from rfprune.tasks.metrics import score_labels

_INPUTS = """
Args:
    predictions: label ids, one per row.
    references: the true ones.
Returns:
    accuracy, and f1_macro unless config_name is "accuracy", as fractions of 1. f1_macro is the mean
    over the classes that are predicted or in the references.
"""


class Classification(evaluate.Metric):  # type: ignore[misc]
    """Accuracy, and the mean F1 of the classes unless `config_name` is accuracy."""

    def _info(self) -> Any:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Accuracy and macro F1 of a classifier.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": label, "references": label}),
            format="numpy",
        )

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        names = ("accuracy",) if self.config_name == "accuracy" else ("accuracy", "f1_macro")
        return score_labels(names, predictions, references)


METRIC = Classification
