"""Pearson and Spearman correlation as an `evaluate.Metric`."""

from typing import Any

import datasets
import evaluate

from rfprune.tasks.metrics import score_labels

_INPUTS = """
Args:
    predictions: values, one per row.
    references: the true ones.
Returns:
    pearson and spearmanr, from -1 to 1; 0 where a correlation is undefined (constant values).
"""


class Correlation(evaluate.Metric):  # type: ignore[misc]
    """Both correlations of predicted values with the true ones."""

    def _info(self) -> Any:
        value = datasets.Value("float64")
        return evaluate.MetricInfo(
            description="Pearson and Spearman correlation.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        return score_labels(("pearson", "spearmanr"), predictions, references)


METRIC = Correlation
