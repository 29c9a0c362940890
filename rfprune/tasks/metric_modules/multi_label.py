"""F1 of several labels per example as an `evaluate.Metric`."""

from typing import Any

import datasets
import evaluate

from rfprune.tasks.metrics import score_labels

_INPUTS = """
Args:
    predictions: rows of 0 or 1 for every label.
    references: the true ones.
Returns:
    f1_micro (over all labels together) and f1_labels (the mean of the labels' F1), as fractions
    of 1.
"""


class MultiLabel(evaluate.Metric):  # type: ignore[misc]
    """F1 over all labels together, and the mean F1 of the labels."""

    def _info(self) -> Any:
        labels = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description="F1 of several labels per example.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": labels, "references": labels}),
        )

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        return score_labels(("f1_micro", "f1_labels"), predictions, references)


METRIC = MultiLabel
