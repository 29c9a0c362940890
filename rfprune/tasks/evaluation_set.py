"""A task's validation data, prepared once so that all models are scored on the same batches."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rfprune.errors import UserError
from rfprune.tasks.batching import TOKEN_LABELS, Batch, LazyBatches, length_sorted_rows
from rfprune.tasks.encoding import encode
from rfprune.tasks.image_classification import IMAGE
from rfprune.tasks.question_answering import Windows, make_windows
from rfprune.tasks.registry import PER_TOKEN_KINDS, Task
from rfprune.tasks.seq2seq import SourcesAndTargets
from rfprune.tasks.splits import check_more_than_one_row, load_split
from rfprune.tasks.token_classification import IGNORED


@dataclass(frozen=True, eq=False)
class Questions:
    """Q questions: contexts, accepted answers, and their W windows."""

    contexts: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    windows: Windows


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """A task's validation data, tokenised and batched once for any number of models.

    Attributes:
        task: see `rfprune.tasks.registry`.
        batches: padded model inputs (B, S), longest rows first.
        rows: for each batch, the numbers of its B rows in dataset order. A row is an example; a
            window in question answering, one of the two texts in similarity, a block in language
            modelling.
        split_sizes: examples of each validation split, in order.
        labels: (N,); (N, L) for several labels per row; (W,) of the words in token classification;
            None in language modelling, question answering and seq2seq.
        questions: of question answering.
        pairs: of seq2seq.
        positions: of token classification: for each row, the positions of its words' first tokens.
    """

    task: Task
    batches: Sequence[Batch]
    rows: tuple[NDArray[np.int64], ...]
    split_sizes: Mapping[str, int]
    labels: NDArray[np.generic] | None = None
    questions: Questions | None = None
    pairs: SourcesAndTargets | None = None
    positions: tuple[NDArray[np.int64], ...] | None = None

    @property
    def num_examples(self) -> int:
        """Examples (questions, not windows) over all splits."""
        return sum(self.split_sizes.values())


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
    """Load, tokenise and batch the task's validation splits.

    Args:
        task: see `rfprune.tasks.registry`.
        tokenizer: or the image processor.
        data_dir: see `rfprune.tasks.splits.find_split`; None: the hub.
        batch_size: rows per batch.
        max_length: tokens per row; None: the task's own.
        limit: number of examples to draw from each split; they keep their order. None: all.
        seed: of the draw.

    Raises:
        UserError: data is missing or wrong, or a number is not allowed.
    """
    if limit is not None and limit < 1:
        raise UserError(f"A limit of {limit} examples is too small: choose 1 or more.")
    if seed < 0:
        raise UserError(f"A seed of {seed} is not allowed: choose 0 or more.")
    splits = {}
    for split in task.validation_splits:
        dataset = load_split(task, split, data_dir)
        check_more_than_one_row(task, split, dataset)
        splits[split] = dataset if task.kind == "language-modeling" else _draw(dataset, limit, seed)
    sizes = {split: len(dataset) for split, dataset in splits.items()}
    if task.kind == "question-answering":
        (dataset,) = splits.values()
        inputs, questions = _questions(task, tokenizer, dataset, max_length)
        batches, rows = _batched(inputs, tokenizer, batch_size)
        return EvaluationSet(task, batches, rows, sizes, questions=questions)
    encoded = [encode(task, tokenizer, dataset, max_length) for dataset in splits.values()]
    if task.kind == "language-modeling":  # its examples are blocks of text
        encoded = [_draw(blocks, limit, seed) for blocks in encoded]
        sizes = dict(zip(splits, map(len, encoded), strict=True))
    columns = {
        name: [row for split in encoded for row in split[name]] for name in encoded[0].column_names
    }
    labels, positions = None, None
    if task.kind == "token-classification":
        per_row = [np.array(row) for row in columns.pop(TOKEN_LABELS)]
        positions = tuple(np.flatnonzero(row != IGNORED) for row in per_row)
        labels = np.concatenate([row[row != IGNORED] for row in per_row])
    elif task.kind == "similarity":
        labels = np.concatenate([split[task.label_column][:] for split in splits.values()])
    elif task.kind not in PER_TOKEN_KINDS:
        labels = np.array(columns.pop("labels"))
    batches, rows = _batched(columns, tokenizer, batch_size)
    pairs = _pairs(task, tokenizer, splits.values()) if task.kind == "seq2seq" else None
    return EvaluationSet(
        task, batches, rows, sizes, labels=labels, pairs=pairs, positions=positions
    )


def _draw(dataset: Any, limit: int | None, seed: int) -> Any:
    """`limit` rows of a dataset without replacement, in their order; all if there are fewer."""
    if limit is None or limit >= len(dataset):
        return dataset
    drawn = np.random.default_rng(seed).choice(len(dataset), size=limit, replace=False)
    return dataset.select(np.sort(drawn).tolist())


def _pairs(task: Task, tokenizer: Any, splits: Iterable[Any]) -> SourcesAndTargets:
    names = (*task.text_columns, task.label_column)
    sources, targets = (
        tuple(text for dataset in splits for text in dataset[name]) for name in names
    )
    return SourcesAndTargets(sources, targets, tokenizer)


def _questions(
    task: Task, tokenizer: Any, dataset: Any, max_length: int | None
) -> tuple[Mapping[str, Sequence[Any]], Questions]:
    """Model inputs of the W windows by name, and the questions that their answers belong to."""
    questions, contexts = (list(dataset[name]) for name in task.text_columns)
    inputs, windows = make_windows(task, tokenizer, questions, contexts, max_length)
    answers = tuple(tuple(answer["text"]) for answer in dataset[task.label_column])
    return inputs, Questions(tuple(contexts), answers, windows)


def _batched(
    columns: Mapping[str, Sequence[Any]], tokenizer: Any, batch_size: int
) -> tuple[Sequence[Batch], tuple[NDArray[np.int64], ...]]:
    """Padded batches of encoded columns, and the row numbers of each batch."""
    rows = length_sorted_rows(columns, batch_size)
    lazy = LazyBatches(columns, rows, tokenizer)
    numbers = tuple(np.array(batch) for batch in rows)
    return (lazy if IMAGE in columns else tuple(lazy)), numbers
