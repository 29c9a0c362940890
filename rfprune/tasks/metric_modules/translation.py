"""chrF and BLEU of texts as an `evaluate.Metric`."""

from typing import Any

import datasets
import evaluate

from rfprune.tasks.text_scores import translation_scores

_INPUTS = """
Args:
    predictions: texts.
    references: the texts that they should be, one each.
Returns:
    chrf and bleu of sacrebleu, in points of 100.
"""


class Translation(evaluate.Metric):  # type: ignore[misc]
    """chrF and BLEU over all texts together."""

    def _info(self) -> Any:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="chrF and BLEU by sacrebleu.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        return translation_scores(predictions, references)


METRIC = Translation
