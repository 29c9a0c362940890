"""Does a model beat an answer that needs no model? If not, something is wrong with model or data.

The baselines: the most frequent label for classes, tags and choices; the best fixed set for several
labels; no correlation for numbers; the whole context, or no answer, for questions; equal
probabilities for language models; the texts of other rows for texts that are written.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rfprune.tasks.evaluation import Evaluation, predictions_from_logits
from rfprune.tasks.evaluation_set import EvaluationSet, Questions
from rfprune.tasks.metrics import f1_micro
from rfprune.tasks.registry import Kind
from rfprune.tasks.seq2seq import SourcesAndTargets
from rfprune.tasks.squad_scores import squad_scores, squad_v2_scores
from rfprune.tasks.text_scores import score_of_rows

_LARGEST_CHANCE = 0.2  # a correlation above this is none of chance, however few the examples

_LABELS = (
    "the labels of data and model may be in different orders (id2label in config.json), "
    "--label-column may be the wrong column, or --model a checkpoint that was not fine-tuned on "
    "this task"
)
_NUMBERS = (
    "--label-column may be the wrong column, its numbers may be distances instead of scores, or "
    "--model a checkpoint that was not fine-tuned on this task"
)
_TEXTS = (
    "--model may be a checkpoint that was not trained for this task, its tokenizer another one, or "
    "the columns of the data the wrong ones"
)


def below_baseline(evaluation_set: EvaluationSet, evaluation: Evaluation, model: Any) -> str | None:
    """What a score falls short of, and the likely reasons, as the end of "the model's ...".

    Args:
        evaluation_set: the data that the model was scored on.
        evaluation: of the model.
        model: the model; the vocabulary of a language model is its baseline.

    Returns:
        None if the score is better than the baseline, or there is none: all labels are the same.
    """
    if evaluation_set.questions is not None:
        return _of_questions(evaluation, evaluation_set.questions)
    if evaluation.kind == "language-modeling":
        vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
        if vocabulary is None or evaluation.score < vocabulary:
            return None
        return (
            f"perplexity of {evaluation.score:.2f} is no better than the {vocabulary} of equal "
            f"probabilities for all tokens of the vocabulary: {_TEXTS}"
        )
    if evaluation_set.pairs is not None:
        return _of_texts(evaluation, evaluation_set.pairs)
    assert evaluation_set.labels is not None
    predictions = predictions_from_logits(evaluation_set.task, evaluation.logits)
    compare = _COMPARISONS.get(evaluation.kind, _of_classes)
    return compare(evaluation, predictions, evaluation_set.labels, evaluation_set.task.label_names)


def _of_classes(
    evaluation: Evaluation,
    predictions: NDArray[Any],
    labels: NDArray[Any],
    names: Sequence[str],
) -> str | None:
    ids, counts = np.unique(labels, return_counts=True)
    if len(ids) < 2:
        return None
    name = evaluation.metric_name
    if name in ("matthews_correlation", "f1") and evaluation.score <= 0:
        return f"{name} of {evaluation.score:.2f} is no better than chance: {_LABELS}"
    right, most = int((predictions == labels).sum()), int(counts.max())
    if name == "matthews_correlation" or right >= most:
        return None
    frequent = int(ids[counts.argmax()])
    shown = names[frequent] if frequent < len(names) else str(frequent)
    return (
        f"accuracy of {100 * right / len(labels):.2f} is below the "
        f"{100 * most / len(labels):.2f} of always predicting {shown!r}, the most frequent label: "
        f"{_LABELS}"
    )


def _of_sets(
    evaluation: Evaluation, _: NDArray[Any], labels: NDArray[Any], names: Sequence[str]
) -> str | None:
    order = np.argsort(-labels.mean(axis=0), kind="stable")
    best, number = 0.0, 0
    for size in range(1, len(order) + 1):
        fixed = np.zeros(labels.shape, dtype=np.int64)
        fixed[:, order[:size]] = 1
        if (score := 100 * f1_micro(fixed, labels)) > best:
            best, number = score, size
    if best == 0 or best == 100 or evaluation.score >= best:
        return None
    shown = ", ".join(repr(names[label]) for label in order[: min(number, 3)])
    shown += ", ..." if number > 3 else ""
    return (
        f"{evaluation.metric_name} of {evaluation.score:.2f} is below the {best:.2f} of always "
        f"predicting {shown}: {_LABELS}"
    )


def _of_numbers(
    evaluation: Evaluation, _: NDArray[Any], labels: NDArray[Any], __: Sequence[str]
) -> str | None:
    if (labels == labels[0]).all():
        return None
    chance = min(_LARGEST_CHANCE, 2 / np.sqrt(len(labels)))  # about two standard errors of zero
    if evaluation.score >= 100 * chance:
        return None
    return (
        f"{evaluation.metric_name} of {evaluation.score:.2f} is no better than chance (up to "
        f"{100 * chance:.2f} with {len(labels)} examples): {_NUMBERS}"
    )


def _of_questions(evaluation: Evaluation, questions: Questions) -> str | None:
    contexts, answers = questions.contexts, questions.answers
    if evaluation.metric_name == "f1" and "HasAns_f1" not in evaluation.scores:
        fixed = {"answering with the whole context": squad_scores(contexts, answers)["f1"]}
    else:
        none = [0.0] * len(contexts)
        fixed = {
            "answering with the whole context": squad_v2_scores(contexts, answers, none)["f1"],
            "giving no answer": squad_v2_scores([""] * len(contexts), answers, none)["f1"],
        }
    way, best = max(fixed.items(), key=lambda entry: entry[1])
    if best == 100 or evaluation.score >= best:
        return None
    return (
        f"{evaluation.metric_name} of {evaluation.score:.2f} is below the {best:.2f} of always "
        f"{way}: {_TEXTS}"
    )


def _of_texts(evaluation: Evaluation, pairs: SourcesAndTargets) -> str | None:
    """A text that has to do with its source is closer to its own target than to another."""
    targets = pairs.targets
    if len(set(targets)) == 1:
        return None
    texts, name = pairs.texts(evaluation.logits[0]), evaluation.metric_name
    rows = np.arange(len(targets))
    others = score_of_rows(name, texts, (*targets[1:], targets[0]))(rows)
    if evaluation.score > others:
        return None
    return (
        f"{name} of {evaluation.score:.2f} is no better than the {others:.2f} against the targets "
        f"of other rows: {_TEXTS}"
    )


_Compare = Callable[[Evaluation, NDArray[Any], NDArray[Any], Sequence[str]], str | None]
_COMPARISONS: Mapping[Kind, _Compare] = {
    "multi-label": _of_sets,
    "regression": _of_numbers,
    "similarity": _of_numbers,
}
