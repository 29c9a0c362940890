"""Standard error of a drop in score: a paired bootstrap over the validation examples.

Both models are scored on the same resamples of the examples. Examples that are easy for one are
mostly easy for the other, so the difference has a much smaller error than either score (Efron and
Tibshirani 1993, chapter 6; Berg-Kirkpatrick et al. 2012 for language tasks).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rfprune.tasks.evaluation import (
    Evaluation,
    EvaluationSet,
    allows_no_answer,
    answers_from_logits,
    predictions_from_logits,
)
from rfprune.tasks.metrics import SCORE_FUNCTIONS
from rfprune.tasks.squad_scores import squad_scores, squad_v2_scores
from rfprune.tasks.text_scores import score_of_rows

RESAMPLES = 200
_ROUNDING = 1e-9  # points: rounding errors of scores that are 100 x a fraction


@dataclass(frozen=True)
class Drop:
    """How many points another model scores lower.

    Attributes:
        points: negative if it scores higher.
        standard_error: of `points`, in points.
        within: fraction of the resamples with at most the allowed drop.
    """

    points: float
    standard_error: float
    within: float


def paired_drop(
    evaluation_set: EvaluationSet,
    original: Evaluation,
    other: Evaluation,
    allowed: float,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Drop:
    """The drop of the main score from one model to another, with its standard error.

    Args:
        evaluation_set: the data that both models were scored on.
        original: evaluation of the first model.
        other: evaluation of the second model.
        allowed: drop in points that `Drop.within` compares with.
        resamples: number of bootstrap samples.
        seed: of the resampling.
    """
    before, after = (_scorer(evaluation_set, one) for one in (original, other))
    num_examples = _num_examples(evaluation_set)
    generator = np.random.default_rng(seed)
    drops = np.empty(resamples)
    for i in range(resamples):
        rows = generator.integers(num_examples, size=num_examples)
        drops[i] = before(rows) - after(rows)
    return Drop(
        points=original.score - other.score,
        standard_error=float(drops.std(ddof=1)),
        within=float((drops <= allowed + _ROUNDING).mean()),
    )


def _num_examples(evaluation_set: EvaluationSet) -> int:
    """Examples of the first split, on which the main score is computed."""
    return next(iter(evaluation_set.split_sizes.values()))


def _scorer(
    evaluation_set: EvaluationSet, evaluation: Evaluation
) -> Callable[[NDArray[np.int64]], float]:
    """A function from row numbers to the main score on these rows, in points of 100."""
    if evaluation_set.questions is not None:
        per_question = _scores_of_questions(evaluation_set, evaluation)
        return lambda rows: float(per_question[rows].mean())
    if evaluation_set.pairs is not None:
        texts = evaluation_set.pairs.texts(evaluation.logits[0])
        return score_of_rows(evaluation_set.task.metric_name, texts, evaluation_set.pairs.targets)
    assert evaluation_set.labels is not None
    score = SCORE_FUNCTIONS[evaluation_set.task.metric_name]
    predictions = predictions_from_logits(evaluation_set.task, evaluation.logits)
    labels = evaluation_set.labels
    return lambda rows: 100.0 * score(predictions[rows], labels[rows])


def _scores_of_questions(
    evaluation_set: EvaluationSet, evaluation: Evaluation
) -> NDArray[np.floating[Any]]:
    """The score of each question, (Q,): SQuAD's main scores are their means."""
    task, questions = evaluation_set.task, evaluation_set.questions
    assert questions is not None
    texts, no_answer = answers_from_logits(task, evaluation.logits, questions)
    scores = []
    for text, score, answers in zip(texts, no_answer, questions.answers, strict=True):
        if allows_no_answer(task):
            found = squad_v2_scores([text], [answers], [score])
        else:
            found = squad_scores([text], [answers])
        scores.append(found[task.metric_name])
    return np.array(scores)
