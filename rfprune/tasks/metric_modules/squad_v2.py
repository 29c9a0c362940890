"""SQuAD 2.0's scores as an `evaluate.Metric`, by the same keys and inputs as the hub's."""

from typing import Any

import datasets
import evaluate

from rfprune.tasks.squad_scores import squad_v2_scores

_CITATION = """\
@inproceedings{rajpurkar2018squad2,
  title={Know What You Don't Know: Unanswerable Questions for {SQuAD}},
  author={Pranav Rajpurkar and Robin Jia and Percy Liang},
  booktitle={ACL},
  year={2018}
}
"""
_INPUTS = """
Args:
    predictions: dicts of `id`, `prediction_text` and `no_answer_probability`.
    references: dicts of `id` and `answers`, a dict of the lists `text` and `answer_start`,
        both empty for an unanswerable question.
    no_answer_threshold: a no_answer_probability above it means that there is no answer.
Returns:
    exact, f1 and total; the same for answerable (HasAns_) and unanswerable (NoAns_) questions;
    best_exact and best_f1 over all thresholds, and these thresholds (..._thresh).
"""


class SquadV2(evaluate.Metric):  # type: ignore[misc]
    """Exact match and F1 of SQuAD 2.0, overall and for its two kinds of question."""

    def _info(self) -> Any:
        text = datasets.Value("string")
        answers = {"text": text, "answer_start": datasets.Value("int32")}
        prediction = {
            "id": text,
            "prediction_text": text,
            "no_answer_probability": datasets.Value("float64"),
        }
        features = {
            "predictions": prediction,
            "references": {"id": text, "answers": datasets.Sequence(answers)},
        }
        return evaluate.MetricInfo(
            description="Exact match and F1 of the SQuAD 2.0 questions.",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(
        self, *, predictions: Any, references: Any, no_answer_threshold: float = 1.0
    ) -> dict[str, float]:
        answers = {row["id"]: row["answers"]["text"] for row in references}
        # In the order of the predictions: it decides between equal probabilities.
        rows = [row for row in predictions if row["id"] in answers]
        missing = answers.keys() - {row["id"] for row in rows}
        if missing:
            raise ValueError(f"no prediction for {len(missing)} questions, as {min(missing)}")
        return squad_v2_scores(
            [row["prediction_text"] for row in rows],
            [answers[row["id"]] for row in rows],
            [row["no_answer_probability"] for row in rows],
            no_answer_threshold,
        )


METRIC = SquadV2
