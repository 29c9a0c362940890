"""GLUE's scores as an `evaluate.Metric`, by the same keys and in the same units as the hub's."""

from typing import Any

import datasets
import evaluate

from rfprune.tasks.metrics import GLUE_SCORES, score_labels

_CITATION = """\
@inproceedings{wang2019glue,
  title={{GLUE}: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding},
  author={Wang, Alex and Singh, Amanpreet and Michael, Julian and Hill, Felix and Levy, Omer
          and Bowman, Samuel R.},
  booktitle={ICLR},
  year={2019}
}
"""
_INPUTS = """
Args:
    predictions: label ids, or values for stsb, one a row.
    references: the true ones.
Returns:
    the scores of the task (config_name) as fractions of 1: accuracy, f1, pearson, spearmanr,
    matthews_correlation. An undefined correlation (constant predictions) is 0.
"""


class Glue(evaluate.Metric):  # type: ignore[misc]
    """The scores of the GLUE task that `config_name` names."""

    def _info(self) -> Any:
        if self.config_name not in GLUE_SCORES:
            raise KeyError(f"config_name {self.config_name!r}: one of {', '.join(GLUE_SCORES)}")
        value = datasets.Value("float64" if self.config_name == "stsb" else "int64")
        return evaluate.MetricInfo(
            description="The scores of the GLUE benchmark's tasks.",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, float]:
        return score_labels(GLUE_SCORES[self.config_name], predictions, references)


METRIC = Glue
