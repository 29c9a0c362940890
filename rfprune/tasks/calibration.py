"""Calibration batches: a seeded sample of a task's training split, without labels by default."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rfprune.errors import RfpruneWarning, UserError
from rfprune.tasks.batching import make_batches
from rfprune.tasks.encoding import encode
from rfprune.tasks.registry import Task
from rfprune.tasks.splits import check_more_than_one_row, load_split

_WITHOUT_LABELS = ("language-modeling", "similarity", "seq2seq")


def sample(dataset: Any, num_samples: int, seed: int) -> Any:
    """Draw rows of a `datasets.Dataset` without replacement.

    A smaller sample is the beginning of a larger one of the same seed. If there are fewer rows,
    all are returned, with a RfpruneWarning.

    Raises:
        UserError: `num_samples` is below 1.
    """
    if num_samples < 1:
        raise UserError(
            f"{num_samples} calibration samples are too few: choose --samples 1 or more."
        )
    if num_samples > len(dataset):
        warnings.warn(
            f"{num_samples} calibration samples were requested, but there are only "
            f"{len(dataset)}: all of them are used.",
            RfpruneWarning,
            stacklevel=2,
        )
    order = np.random.default_rng(seed).permutation(len(dataset))
    return dataset.select(order[:num_samples].tolist())


def calibration_batches(
    task: Task,
    tokenizer: Any,
    data_dir: Path | None,
    *,
    num_samples: int,
    batch_size: int,
    max_length: int | None,
    seed: int,
    with_labels: bool,
) -> list[dict[str, Tensor]]:
    """Batches of examples drawn from the task's training split.

    An example is a window in question answering, one of the two texts in similarity, a block in
    language modelling, and a source in seq2seq, whose targets
    `rfprune.tasks.seq2seq.generate_targets` adds. Only drawn rows are tokenised, except for
    language modelling.

    Args:
        task: see `rfprune.tasks.registry`.
        tokenizer: or the image processor.
        data_dir: see `rfprune.tasks.splits.find_split`; None: the hub.
        num_samples: number of examples.
        batch_size: examples per batch.
        max_length: tokens per example; None: the task's own.
        seed: of the draw.
        with_labels: whether batches have labels; without, the data needs none.

    Returns:
        Batches as made by `rfprune.tasks.batching.make_batches`.

    Raises:
        UserError: data is missing or wrong, or a number is not allowed.
    """
    if with_labels and task.kind in _WITHOUT_LABELS:
        raise UserError(
            f"--use-labels does nothing for task {task.name}, whose model predicts no labels: "
            f"leave it out."
        )
    train = load_split(task, task.train_split, data_dir, labels_required=with_labels)
    check_more_than_one_row(task, task.train_split, train)
    is_text = task.kind == "language-modeling"
    drawn = train if is_text else sample(train, num_samples, seed)
    encoded = encode(task, tokenizer, drawn, max_length)
    if len(encoded) > num_samples or is_text:
        encoded = sample(encoded, num_samples, seed)
    return make_batches(encoded, tokenizer, batch_size, with_labels=with_labels)
