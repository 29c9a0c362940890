"""How sure a difference of two scores is: a paired bootstrap over the evaluation's examples.

Both models are scored on the same examples, drawn again and again with replacement. What is an easy
example for one is mostly so for the other, so their difference is far surer than either score
(Efron and Tibshirani 1993, chapter 6; Berg-Kirkpatrick et al. 2012 for scores of tasks like these).
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

RESAMPLES = 200
_ROUNDING = 1e-9  # of scores that are 100 x a fraction


@dataclass(frozen=True)
class Drop:
    """By how many points another model scores lower; negative where it scores higher.

    `standard_error`: of the drop, from the resamples. `within`: the share of the resamples in which
    the drop is at most what is allowed.
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
    """The drop of the task's main score from one model to another, and how sure it is.

    Args:
        evaluation_set: that both were scored on.
        allowed: the points that the drop is compared with.
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
    """Of the first split, which the main score is of."""
    return next(iter(evaluation_set.split_sizes.values()))


def _scorer(
    evaluation_set: EvaluationSet, evaluation: Evaluation
) -> Callable[[NDArray[np.int64]], float]:
    """From numbers of examples to the main score on them, in points of 100."""
    if evaluation_set.questions is not None:
        one_by_one = _scores_of_questions(evaluation_set, evaluation)
        return lambda rows: float(one_by_one[rows].mean())
    assert evaluation_set.labels is not None
    score = SCORE_FUNCTIONS[evaluation_set.task.metric_name]
    predictions = predictions_from_logits(evaluation_set.task, evaluation.logits)
    labels = evaluation_set.labels
    return lambda rows: 100.0 * score(predictions[rows], labels[rows])


def _scores_of_questions(
    evaluation_set: EvaluationSet, evaluation: Evaluation
) -> NDArray[np.floating[Any]]:
    """(Q,): SQuAD's main scores are means over questions, each of which is scored on its own."""
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
