"""SQuAD 1.1's scores as an `evaluate.Metric`, by the same keys and inputs as the hub's."""

from typing import Any

import datasets
import evaluate

from rfprune.tasks.squad_scores import squad_scores

_CITATION = """\
@inproceedings{rajpurkar2016squad,
  title={{SQuAD}: 100,000+ Questions for Machine Comprehension of Text},
  author={Pranav Rajpurkar and Jian Zhang and Konstantin Lopyrev and Percy Liang},
  booktitle={EMNLP},
  year={2016}
}
"""
_INPUTS = """
Args:
    predictions: dicts of `id` and `prediction_text`.
    references: dicts of `id` and `answers`, a dict of the lists `text` and `answer_start`.
Returns:
    exact_match and f1 in points of 100.
"""


class Squad(evaluate.Metric):  # type: ignore[misc]
    """Exact match and F1 of SQuAD 1.1."""

    def _info(self) -> Any:
        text = datasets.Value("string")
        answers = {"text": text, "answer_start": datasets.Value("int32")}
        features = {
            "predictions": {"id": text, "prediction_text": text},
            "references": {"id": text, "answers": datasets.Sequence(answers)},
        }
        return evaluate.MetricInfo(
            description="Exact match and F1 of the SQuAD 1.1 questions.",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        texts = {row["id"]: row["prediction_text"] for row in predictions}
        return squad_scores(
            [texts.get(row["id"]) for row in references],
            [row["answers"]["text"] for row in references],
        )


METRIC = Squad
