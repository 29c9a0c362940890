"""Score a model on a task's validation data, and compare the outputs of two models."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from rfprune.errors import UserError
from rfprune.tasks.batching import Batch
from rfprune.tasks.divergence import Logits, divergence_of_logits
from rfprune.tasks.evaluation_set import EvaluationSet, Questions, prepare_evaluation
from rfprune.tasks.inference import batch_size as size_of
from rfprune.tasks.inference import class_logits, embeddings, span_logits, token_logits
from rfprune.tasks.language_modeling import token_likelihoods
from rfprune.tasks.metrics import compute_scores
from rfprune.tasks.question_answering import Windows, best_answers, null_scores
from rfprune.tasks.registry import PER_TOKEN_KINDS, Kind, Task
from rfprune.tasks.seq2seq import target_divergence, with_written, written_tokens
from rfprune.tasks.similarity import cosines
from rfprune.tasks.squad_scores import NO_ANSWER_THRESHOLD

__all__ = [
    "Evaluation",
    "EvaluationSet",
    "Logits",
    "Questions",
    "allows_no_answer",
    "answers_from_logits",
    "divergence",
    "divergence_of_logits",
    "evaluate_model",
    "logits_of_batches",
    "predictions_from_logits",
    "prepare_evaluation",
]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of a model and the logits that they were computed from.

    Attributes:
        score: the task's main score, `scores[metric_name]`.
        metric_name: of the main score.
        scores: points of 100, except a perplexity and SQuAD 2.0's `best_..._thresh`, which are
            differences of logits. A second split's scores end in its name (accuracy_mismatched).
        logits: (N, C) in dataset order, the splits one after the other. Question answering: start
            and end logits (W, S) of the windows, -inf where no answer can be (SQuAD 2.0: the CLS
            token stands for no answer). Token classification: (W, C) of the words. Similarity: the
            embeddings (2N, d) of the pairs. Language modelling: log-likelihoods (N, S - 1).
            Seq2seq: instead of logits the ids (N, T) that were written, -1 behind the end.
        num_examples: over all splits; questions, not windows.
        seconds: forward passes and scoring.
        kind: of the task.
        from_reference: language modelling and seq2seq: divergence from the reference model, in
            nats per token.
    """

    score: float
    metric_name: str
    scores: Mapping[str, float]
    logits: Logits
    num_examples: int
    seconds: float
    kind: Kind = "classification"
    from_reference: float | None = None


def evaluate_model(
    model: nn.Module,
    evaluation_set: EvaluationSet,
    *,
    reference: nn.Module | None = None,
    reference_evaluation: Evaluation | None = None,
    progress: bool = False,
    load_or_compute: Callable[[Callable[[], Logits]], Logits] | None = None,
) -> Evaluation:
    """Score a model, original or pruned, on its own device.

    Args:
        model: its training mode is the same afterwards.
        evaluation_set: made by `prepare_evaluation`.
        reference: language modelling and seq2seq: the model to compute the divergence from. It
            runs beside the other, since logits over the vocabulary are too large to keep.
        reference_evaluation: seq2seq: the evaluation of `reference`; the two are compared on the
            texts that it wrote. None: it writes them again.
        progress: whether to show a progress bar.
        load_or_compute: loads cached logits, or calls its argument and caches the result.

    Raises:
        UserError: the model has no head for the task or no embedding for a token, or its logits
            are not finite.
    """
    started = time.perf_counter()
    task, from_reference = evaluation_set.task, None
    if task.kind == "language-modeling" and reference is not None:
        likelihoods, from_reference = token_likelihoods(
            model, evaluation_set.batches, evaluation_set.rows, reference, progress=progress
        )
        logits: Logits = (likelihoods,)
    elif load_or_compute is None:
        logits = _logits(model, evaluation_set, progress)
    else:
        logits = load_or_compute(lambda: _logits(model, evaluation_set, progress))
    if task.kind == "seq2seq" and reference is not None:
        known = reference_evaluation
        (texts,) = _logits(reference, evaluation_set, progress) if known is None else known.logits
        batches = with_written(reference, evaluation_set.batches, evaluation_set.rows, texts)
        from_reference = target_divergence(model, reference, list(batches), progress=progress)
    scores = _scores(logits, evaluation_set)
    return Evaluation(
        score=scores[task.metric_name],
        metric_name=task.metric_name,
        scores=scores,
        logits=logits,
        num_examples=evaluation_set.num_examples,
        seconds=time.perf_counter() - started,
        kind=task.kind,
        from_reference=from_reference,
    )


def divergence(reference: Evaluation, other: Evaluation) -> float:
    """Divergence of `other` from `reference` in nats per row; see `divergence_of_logits`.

    A row is a word in token classification and a token in language modelling and seq2seq.

    Raises:
        ValueError: the evaluations are of different data, or, in language modelling and seq2seq,
            `other` was evaluated without the reference.
    """
    if reference.kind not in PER_TOKEN_KINDS:
        return divergence_of_logits(reference.logits, other.logits, reference.kind)
    if reference is other:
        return 0.0
    if other.from_reference is None:
        raise ValueError("evaluate a model of text with reference= to know its divergence")
    return other.from_reference


def logits_of_batches(model: nn.Module, task: Task, batches: Sequence[Batch]) -> Logits:
    """The logits of padded batches without an evaluation set, such as calibration batches.

    Rows are in the order of the batches. Otherwise as in `Evaluation`, except that answers may be
    at any token. Raises the UserErrors of `evaluate_model`.
    """
    sizes = [size_of(batch) for batch in batches]
    rows = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    if task.kind == "question-answering":
        start, end = span_logits(model, batches, rows, progress=False)
        for logits in (start, end):
            _check_finite(logits, ~np.isneginf(logits))  # -inf stands behind shorter rows
        return start, end
    return (_one_array(model, task, batches, rows, progress=False),)


def _one_array(
    model: nn.Module,
    task: Task,
    batches: Sequence[Batch],
    rows: Sequence[NDArray[np.int64]],
    *,
    progress: bool,
) -> NDArray[np.float32]:
    """Finite logits (N, C) for tasks with one prediction or one embedding per row."""
    if task.kind == "similarity":
        logits = embeddings(model, batches, rows, progress=progress)
    else:
        choice = task.kind == "multiple-choice"
        number = batches[0]["input_ids"].shape[1] if choice else task.num_labels
        logits = class_logits(model, batches, rows, number, progress=progress)
    _check_finite(logits, np.ones_like(logits, dtype=bool))
    return logits


def _logits(model: nn.Module, evaluation_set: EvaluationSet, progress: bool) -> Logits:
    """The logits of `Evaluation`; UserError if they are not finite."""
    task, batches, rows = evaluation_set.task, evaluation_set.batches, evaluation_set.rows
    if task.kind == "language-modeling":
        return (token_likelihoods(model, batches, rows, progress=progress)[0],)
    if task.kind == "seq2seq":
        return (written_tokens(model, batches, rows, task.writing, progress=progress),)
    if evaluation_set.positions is not None:
        words = evaluation_set.positions
        logits = token_logits(model, batches, rows, words, task.num_labels, progress=progress)
        _check_finite(logits, np.ones_like(logits, dtype=bool))
        return (logits,)
    if evaluation_set.questions is None:
        return (_one_array(model, task, batches, rows, progress=progress),)
    candidates = _candidates(task, evaluation_set.questions.windows)
    both = span_logits(model, batches, rows, progress=progress)
    for logits in both:
        _check_finite(logits, candidates)
    return tuple(np.where(candidates, logits, np.float32(-np.inf)) for logits in both)


def _candidates(task: Task, windows: Windows) -> NDArray[np.bool_]:
    """(W, S), True where an answer can start or end, and at a CLS token that means no answer."""
    candidates = windows.in_context.copy()
    if allows_no_answer(task):
        candidates[np.arange(len(candidates)), windows.null_position] = True
    return candidates


def allows_no_answer(task: Task) -> bool:
    """Whether a question of this task may have no answer."""
    return task.name == "squad_v2"


def _check_finite(logits: NDArray[np.float32], needed: NDArray[np.bool_]) -> None:
    """Raise a UserError for NaN or infinity where a number is needed."""
    bad = needed & ~np.isfinite(logits)
    rows = np.flatnonzero(bad.any(axis=1))
    if len(rows):
        raise UserError(
            f"The model's logits are not finite ({logits[bad][0]} in row {rows[0]}, and in "
            f"{len(rows)} of {len(logits)} rows): its weights are damaged, or too large for its "
            f"dtype; try --dtype float32, or download the checkpoint again."
        )


def _scores(logits: Logits, evaluation_set: EvaluationSet) -> dict[str, float]:
    """All scores of the task, see `Evaluation`."""
    task = evaluation_set.task
    if evaluation_set.questions is not None:
        return _answer_scores(logits, task, evaluation_set.questions)
    if task.kind == "language-modeling":
        return compute_scores(task, logits[0])
    if evaluation_set.pairs is not None:
        pairs = evaluation_set.pairs
        return compute_scores(task, pairs.texts(logits[0]), list(pairs.targets))
    assert evaluation_set.labels is not None
    predictions = predictions_from_logits(task, logits)
    if evaluation_set.positions is not None:
        names = np.array(task.label_names)
        ends = np.cumsum([len(row) for row in evaluation_set.positions])[:-1]
        tags = (
            [row.tolist() for row in np.split(names[ids], ends)]
            for ids in (predictions, evaluation_set.labels)
        )
        return compute_scores(task, *tags)
    scores: dict[str, float] = {}
    first = 0
    for number, (split, size) in enumerate(evaluation_set.split_sizes.items()):
        suffix = f"_{split.removeprefix('validation_')}" if number else ""
        rows = slice(first, first + size)
        found = compute_scores(task, predictions[rows], evaluation_set.labels[rows])
        scores |= {name + suffix: value for name, value in found.items()}
        first += size
    return scores


def predictions_from_logits(task: Task, logits: Logits) -> NDArray[Any]:
    """Predictions from logits (N, C): label ids (N,); the values of a regression (N,); 0 or 1 for
    every one of several labels (N, C); the cosines of pairs of embeddings (N,)."""
    (outputs,) = logits
    if task.kind == "similarity":
        return cosines(outputs)
    if task.kind == "multi-label":
        return (outputs > 0).astype(np.int64)
    return outputs[:, 0] if task.kind == "regression" else outputs.argmax(axis=1)


def _answer_scores(logits: Logits, task: Task, questions: Questions) -> dict[str, float]:
    texts, no_answer = answers_from_logits(task, logits, questions)
    ids = list(map(str, range(len(texts))))
    references = [
        {"id": one, "answers": {"text": list(answers), "answer_start": [0] * len(answers)}}
        for one, answers in zip(ids, questions.answers, strict=True)  # the texts alone are compared
    ]
    predictions = [{"id": one, "prediction_text": t} for one, t in zip(ids, texts, strict=True)]
    if not allows_no_answer(task):
        return compute_scores(task, predictions, references)
    unsure = [
        {**prediction, "no_answer_probability": score}
        for prediction, score in zip(predictions, no_answer.tolist(), strict=True)
    ]
    scores = compute_scores(task, unsure, references, no_answer_threshold=NO_ANSWER_THRESHOLD)
    return {name: value for name, value in scores.items() if not name.endswith("total")}


def answers_from_logits(
    task: Task, logits: Logits, questions: Questions
) -> tuple[list[str], NDArray[np.float64]]:
    """The best answers to Q questions, and the scores of giving no answer, (Q,)."""
    start, end = logits
    texts, best = best_answers(start, end, questions.windows, questions.contexts)
    if not allows_no_answer(task):
        return texts, np.full(len(texts), -np.inf)
    return texts, null_scores(start, end, questions.windows) - best
