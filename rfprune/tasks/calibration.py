"""Calibration: a seeded sample of a task's training set as padded batches, labels not needed."""

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

_WITHOUT_LABELS = ("language-modeling", "similarity")


def sample(dataset: Any, num_samples: int, seed: int) -> Any:
    """`num_samples` rows of a `datasets.Dataset`, drawn without replacement.

    A smaller sample of the same seed is the beginning of a larger one. Where there are fewer
    rows, all of them and a RfpruneWarning. UserError if `num_samples` is below 1.
    """
    if num_samples < 1:
        raise UserError(f"{num_samples} calibration samples are not possible: ask for 1 or more.")
    if num_samples > len(dataset):
        warnings.warn(
            f"{num_samples} calibration samples were asked for, but there are only "
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
    """Batches of `num_samples` examples of the task's training split.

    An example of question answering is a window: of so many questions drawn, so many windows; of
    similarity it is one of the two texts, of language modelling a block. Only what is drawn is
    tokenised, but for a running text; without `with_labels` the data needs no label column. See
    `load_split`, `encode` and `make_batches` for the shapes and for what is refused.
    """
    if with_labels and task.kind in _WITHOUT_LABELS:
        raise UserError(
            f"--use-labels is of no use for task {task.name}, which has no labels that the model "
            f"predicts: leave it out."
        )
    train = load_split(task, task.train_split, data_dir, labels_required=with_labels)
    check_more_than_one_row(task, task.train_split, train)
    running = task.kind == "language-modeling"
    drawn = train if running else sample(train, num_samples, seed)
    encoded = encode(task, tokenizer, drawn, max_length)
    if len(encoded) > num_samples or running:
        encoded = sample(encoded, num_samples, seed)
    return make_batches(encoded, tokenizer, batch_size, with_labels=with_labels)
