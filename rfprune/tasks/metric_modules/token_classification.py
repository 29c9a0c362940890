"""Entity F1 and accuracy of tags as an `evaluate.Metric`, for the inputs that `seqeval` takes."""

from typing import Any

import datasets
import evaluate

from rfprune.tasks.entity_scores import entity_scores
from rfprune.tasks.metrics import accuracy

_CITATION = """\
@inproceedings{tjong-kim-sang-buchholz-2000-introduction,
  title={Introduction to the {CoNLL}-2000 Shared Task Chunking},
  author={Tjong Kim Sang, Erik F. and Buchholz, Sabine},
  booktitle={CoNLL},
  year={2000}
}
"""
_INPUTS = """
Args:
    predictions: rows of tags such as B-PER, I-PER and O, one per word.
    references: the true ones.
Returns:
    f1, precision and recall of entities (not if config_name is "accuracy"), and the accuracy of the
    words, as fractions of 1.
"""


class TokenClassification(evaluate.Metric):  # type: ignore[misc]
    """F1 of whole entities and accuracy of the words; accuracy alone if `config_name` says so."""

    def _info(self) -> Any:
        tags = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description="F1 of whole entities and accuracy of the words.",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": tags, "references": tags}),
        )

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        names = sorted({tag for row in (*predictions, *references) for tag in row})
        ids = {name: number for number, name in enumerate(names)}
        found, wanted = (
            [ids[tag] for row in rows for tag in row] for rows in (predictions, references)
        )
        entities = {}
        if self.config_name != "accuracy":
            entities = entity_scores(predictions, references)
        return {**entities, "accuracy": accuracy(found, wanted)}


METRIC = TokenClassification
