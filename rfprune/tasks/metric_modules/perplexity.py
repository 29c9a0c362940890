"""Perplexity from the log-likelihoods of tokens as an `evaluate.Metric`."""

from typing import Any

import datasets
import evaluate

from rfprune.tasks.metrics import perplexity

_INPUTS = """
Args:
    predictions: rows of natural log-likelihoods, one per token, all rows of one length.
Returns:
    perplexity.
"""


class Perplexity(evaluate.Metric):  # type: ignore[misc]
    """exp of the mean negative log-likelihood per token."""

    def _info(self) -> Any:
        log_likelihoods = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description="Perplexity of a language model.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": log_likelihoods}),
        )

    def _compute(self, *, predictions: Any) -> dict[str, float]:
        return {"perplexity": perplexity(predictions)}


METRIC = Perplexity
