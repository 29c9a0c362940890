"""Scoring a model on a task's validation data, and how far two models' outputs are apart.

The data is prepared once and then serves every model: original and pruned see the same batches.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from rfprune.errors import UserError
from rfprune.tasks.data import check_not_single, collate, encode, length_sorted_rows, load_split
from rfprune.tasks.forward import class_logits, span_logits
from rfprune.tasks.metrics import (
    NO_ANSWER_THRESHOLD,
    SCORE_FUNCTIONS,
    score_names,
    squad_scores,
    squad_v2_scores,
)
from rfprune.tasks.registry import Task
from rfprune.tasks.squad import Windows, best_answers, make_windows, null_scores

Logits = tuple[NDArray[np.float32], ...]


@dataclass(frozen=True, eq=False)
class Questions:
    """Q questions to score answers by: contexts, accepted answers, and their W windows."""

    contexts: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    windows: Windows


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """A task's validation data, tokenised and batched once for any number of models.

    `batches`: padded model inputs (B, S), longest rows first. `rows`: for each batch, the numbers
    of its B rows in dataset order; a row is an example, or a window in question answering.
    `split_sizes`: examples of each validation split, in order. `labels`: (N,), or None in
    question answering, which has `questions` instead.
    """

    task: Task
    batches: tuple[Mapping[str, Tensor], ...]
    rows: tuple[NDArray[np.int64], ...]
    split_sizes: Mapping[str, int]
    labels: NDArray[np.generic] | None = None
    questions: Questions | None = None

    @property
    def num_examples(self) -> int:
        """Examples (questions, not windows) over all splits."""
        return sum(self.split_sizes.values())


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model scored, in points of 100, and the logits it scored with.

    `score` is the task's main one, `scores[metric_name]`. A second split's scores end in its name
    (`accuracy_mismatched`); `best_..._thresh` of SQuAD 2.0 are differences of logits, not points.
    `logits`: (N, C) in dataset order, the splits one after the other; question answering: start
    and end logits (W, S) of the windows, -inf where no answer can be (SQuAD 2.0: it can also be
    at the CLS token, meaning none). `seconds`: forward passes and scoring.
    """

    score: float
    metric_name: str
    scores: Mapping[str, float]
    logits: Logits
    num_examples: int
    seconds: float


def prepare_evaluation(
    task: Task,
    tokenizer: Any,
    data_dir: Path | None,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> EvaluationSet:
    """Load, tokenise and batch the task's validation splits (data_dir None: from the hub).

    `max_length`: tokens a row, the task's own if None. `limit`: so many rows of each split, drawn
    with `seed` and kept in their order. UserError for whatever is wrong with data or numbers.
    """
    if limit is not None and limit < 1:
        raise UserError(f"A limit of {limit} examples is not possible: it must be at least 1.")
    if seed < 0:
        raise UserError(f"A seed of {seed} is not possible: it must be at least 0.")
    splits = {}
    for split in task.validation_splits:
        dataset = load_split(task, split, data_dir)
        check_not_single(task, split, dataset)
        splits[split] = _draw(dataset, limit, seed)
    sizes = {split: len(dataset) for split, dataset in splits.items()}
    if task.kind == "question-answering":
        (dataset,) = splits.values()
        inputs, questions = _questions(task, tokenizer, dataset, max_length)
        batches, rows = _batched(inputs, tokenizer, batch_size)
        return EvaluationSet(task, batches, rows, sizes, questions=questions)
    encoded = [encode(task, tokenizer, dataset, max_length) for dataset in splits.values()]
    columns = {
        name: [row for split in encoded for row in split[name]] for name in encoded[0].column_names
    }
    labels = np.array(columns.pop("labels"))
    batches, rows = _batched(columns, tokenizer, batch_size)
    return EvaluationSet(task, batches, rows, sizes, labels=labels)


def evaluate_model(
    model: nn.Module,
    evaluation_set: EvaluationSet,
    *,
    progress: bool = False,
    remember: Callable[[Callable[[], Logits]], Logits] | None = None,
) -> Evaluation:
    """Score a model, dense or pruned, on its own device; it comes back in the modes it was in.

    `remember` may know what the logits are, or ask the function that it is given.

    UserError for a model without the task's head, for tokens that it has no embedding for, and
    for logits that are NaN or infinite.
    """
    started = time.perf_counter()
    if remember is None:
        logits = _logits(model, evaluation_set, progress)
    else:
        logits = remember(lambda: _logits(model, evaluation_set, progress))
    scores = _scores(logits, evaluation_set)
    task = evaluation_set.task
    return Evaluation(
        score=scores[task.metric_name],
        metric_name=task.metric_name,
        scores=scores,
        logits=logits,
        num_examples=evaluation_set.num_examples,
        seconds=time.perf_counter() - started,
    )


def divergence(reference: Evaluation, other: Evaluation) -> float:
    """How far `other`'s outputs are from `reference`'s on the same data, in nats a row.

    The mean over rows of KL(reference || other), in float64; in question answering a row is a
    window and the KLs of start and end are added. One output (regression): half the mean squared
    difference, the KL of two normal distributions of unit variance. ValueError unless both come
    from one evaluation set.
    """
    return divergence_of_logits(reference.logits, other.logits)


def divergence_of_logits(reference: Logits, other: Logits) -> float:
    """As `divergence`, from logits of the same rows; see `logits_on`."""
    pairs = list(zip(reference, other, strict=True))
    for first, second in pairs:
        same_shape = first.shape == second.shape
        if not same_shape or (np.isfinite(first) != np.isfinite(second)).any():
            raise ValueError("divergence needs two evaluations of the same evaluation set")
    if len(pairs) == 1 and pairs[0][0].shape[1] == 1:
        first, second = pairs[0]
        return float(np.mean((first.astype(np.float64) - second) ** 2) / 2)
    return float(sum(_mean_kl(first, second) for first, second in pairs))


def logits_on(model: nn.Module, task: Task, batches: Sequence[Mapping[str, Tensor]]) -> Logits:
    """The logits of padded inputs that nothing is known of, such as calibration batches.

    Rows are in the order of the batches; else as in `Evaluation`, but that answers may be at any
    token. Raises the UserErrors of `evaluate_model`.
    """
    sizes = [len(batch["input_ids"]) for batch in batches]
    rows = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    if task.kind == "question-answering":
        start, end = span_logits(model, batches, rows, progress=False)
        for logits in (start, end):
            _check_finite(logits, ~np.isneginf(logits))  # which is behind shorter rows
        return start, end
    logits = class_logits(model, batches, rows, task.num_labels, progress=False)
    _check_finite(logits, np.ones_like(logits, dtype=bool))
    return (logits,)


def _draw(dataset: Any, limit: int | None, seed: int) -> Any:
    """`limit` rows of a dataset, without replacement, in their order; all if there are no more."""
    if limit is None or limit >= len(dataset):
        return dataset
    drawn = np.random.default_rng(seed).choice(len(dataset), size=limit, replace=False)
    return dataset.select(np.sort(drawn).tolist())


def _questions(
    task: Task, tokenizer: Any, dataset: Any, max_length: int | None
) -> tuple[Mapping[str, Sequence[Any]], Questions]:
    """Model inputs of the windows, W rows by name, and what their answers are scored by."""
    questions, contexts = (list(dataset[name]) for name in task.text_columns)
    inputs, windows = make_windows(task, tokenizer, questions, contexts, max_length)
    answers = tuple(tuple(answer["text"]) for answer in dataset[task.label_column])
    return inputs, Questions(tuple(contexts), answers, windows)


def _batched(
    columns: Mapping[str, Sequence[Any]], tokenizer: Any, batch_size: int
) -> tuple[tuple[Mapping[str, Tensor], ...], tuple[NDArray[np.int64], ...]]:
    """Padded batches of columns of token lists, and the row numbers in each."""
    rows = length_sorted_rows(columns, batch_size)
    batches = tuple(
        collate(
            {name: [values[row] for row in batch] for name, values in columns.items()}, tokenizer
        )
        for batch in rows
    )
    return batches, tuple(np.array(batch) for batch in rows)


def _logits(model: nn.Module, evaluation_set: EvaluationSet, progress: bool) -> Logits:
    """The model's logits as `Evaluation` has them; UserError where they are not finite."""
    task, batches, rows = evaluation_set.task, evaluation_set.batches, evaluation_set.rows
    if evaluation_set.questions is None:
        logits = class_logits(model, batches, rows, task.num_labels, progress=progress)
        _check_finite(logits, np.ones_like(logits, dtype=bool))
        return (logits,)
    candidates = _candidates(task, evaluation_set.questions.windows)
    both = span_logits(model, batches, rows, progress=progress)
    for logits in both:
        _check_finite(logits, candidates)
    return tuple(np.where(candidates, logits, np.float32(-np.inf)) for logits in both)


def _candidates(task: Task, windows: Windows) -> NDArray[np.bool_]:
    """(W, S), True where an answer can start or end, or be declared missing."""
    candidates = windows.in_context.copy()
    if _allows_no_answer(task):
        candidates[np.arange(len(candidates)), windows.null_position] = True
    return candidates


def _allows_no_answer(task: Task) -> bool:
    return task.name == "squad_v2"


def _check_finite(logits: NDArray[np.float32], wanted: NDArray[np.bool_]) -> None:
    """UserError for NaN or infinity where there should be a number."""
    bad = wanted & ~np.isfinite(logits)
    rows = np.flatnonzero(bad.any(axis=1))
    if len(rows):
        raise UserError(
            f"The model's logits are not finite: {logits[bad][0]} in row {rows[0]}, and so in "
            f"{len(rows)} of {len(logits)} rows; its weights are damaged, or too large for its "
            f"dtype."
        )


def _scores(logits: Logits, evaluation_set: EvaluationSet) -> dict[str, float]:
    """All scores of the task in points of 100, see `Evaluation`."""
    if evaluation_set.questions is not None:
        return _answer_scores(logits, evaluation_set)
    assert evaluation_set.labels is not None
    task = evaluation_set.task
    predictions = predicted(task, logits)
    scores, first = {}, 0
    for number, (split, size) in enumerate(evaluation_set.split_sizes.items()):
        suffix = f"_{split.removeprefix('validation_')}" if number else ""
        rows = slice(first, first + size)
        for name in score_names(task):
            value = SCORE_FUNCTIONS[name](predictions[rows], evaluation_set.labels[rows])
            scores[name + suffix] = 100.0 * value
        first += size
    return scores


def predicted(task: Task, logits: Logits) -> NDArray[Any]:
    """What logits (N, C) say of each row, (N,): label ids, or the values of a regression."""
    (outputs,) = logits
    return outputs[:, 0] if task.kind == "regression" else outputs.argmax(axis=1)


def _answer_scores(logits: Logits, evaluation_set: EvaluationSet) -> dict[str, float]:
    task, questions = evaluation_set.task, evaluation_set.questions
    assert questions is not None
    return answer_scores(task, *answered(task, logits, questions), questions.answers)


def answered(
    task: Task, logits: Logits, questions: Questions
) -> tuple[list[str], NDArray[np.float64]]:
    """The best answers to Q questions, and what speaks for giving none, (Q,)."""
    start, end = logits
    texts, best = best_answers(start, end, questions.windows, questions.contexts)
    if not _allows_no_answer(task):
        return texts, np.full(len(texts), -np.inf)
    return texts, null_scores(start, end, questions.windows) - best


def answer_scores(
    task: Task,
    texts: Sequence[str],
    no_answer: NDArray[np.float64],
    answers: Sequence[Sequence[str]],
) -> dict[str, float]:
    """All scores, in points of 100, of what `answered` gives."""
    if not _allows_no_answer(task):
        return squad_scores(texts, answers)
    scores = squad_v2_scores(texts, answers, no_answer.tolist(), NO_ANSWER_THRESHOLD)
    return {name: value for name, value in scores.items() if not name.endswith("total")}


def _mean_kl(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Mean over rows of KL(reference || other) of logits (N, C); -inf in both: not a class."""
    log_p, log_q = _log_softmax(reference), _log_softmax(other)
    differences = np.zeros_like(log_p)
    np.subtract(log_p, log_q, out=differences, where=np.isfinite(log_p))
    return float((np.exp(log_p) * differences).sum(axis=1).mean())


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-softmax of each row in float64; -inf stays, also where a row has nothing else."""
    values = logits.astype(np.float64)
    peak = values.max(axis=1, keepdims=True)
    values -= np.where(np.isfinite(peak), peak, 0.0)
    total = np.exp(values).sum(axis=1, keepdims=True)
    return values - np.log(np.where(total > 0, total, 1.0))
