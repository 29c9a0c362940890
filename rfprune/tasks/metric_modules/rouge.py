"""ROUGE of texts as an `evaluate.Metric`."""

from typing import Any

import datasets
import evaluate

from rfprune.tasks.text_scores import rouge_scores

_INPUTS = """
Args:
    predictions: texts.
    references: the texts that they should be, one each.
Returns:
    rouge1, rouge2 and rougeL, from 0 to 1.
"""


class Rouge(evaluate.Metric):  # type: ignore[misc]
    """Mean F-measures of single words, pairs of words and longest common subsequences."""

    def _info(self) -> Any:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="ROUGE by rouge-score.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        return rouge_scores(predictions, references)


METRIC = Rouge
