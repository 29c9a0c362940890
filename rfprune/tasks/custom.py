"""Task `custom`: somebody's own checkpoint on their own table, made into a `Task` row.

What is asked and how it is scored comes from the checkpoint's configuration, columns from the data.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rfprune.errors import RfpruneWarning, UserError
from rfprune.tasks.data import find_split
from rfprune.tasks.files import Table, read_table
from rfprune.tasks.labels import label_names
from rfprune.tasks.registry import CUSTOM, Task, check_columns, names_in_order

USUAL_TEXTS = (("sentence1", "sentence2"), ("sentence",), ("text",))
"""Columns that are taken for the text, or the two texts, where none are named."""

USUAL_LABEL = "label"
# With more rows than this that reach the default length, somebody should hear of it.
_CUT_SHARE = 0.05
_SINGLE_LABEL = "single_label_classification"


def unread() -> Task:
    """The task before checkpoint and data are looked at: no columns, no labels yet."""
    return Task(CUSTOM, "classification", "", None, (), "", (), "accuracy")


def custom_task(labels: Any, problem_type: Any, source: str) -> Task:
    """The task of a checkpoint with these labels (`id2label`), as transformers understands them.

    One output is a regression, several are classes of which one is right.

    Raises:
        UserError: several labels at once, several regressions, one class, or gaps in the ids.
    """
    names = names_in_order(labels)
    regression = problem_type == "regression" or (not problem_type and len(names) == 1)
    if problem_type not in (None, "", "regression", _SINGLE_LABEL):
        raise UserError(
            f"The checkpoint '{source}' is for {str(problem_type).replace('_', ' ')}, but task "
            f"{CUSTOM} takes one label, or one number, an example: choose another checkpoint."
        )
    if regression and len(names) != 1:
        raise UserError(
            f"The checkpoint '{source}' is a regression with {len(names)} outputs, but task "
            f"{CUSTOM} takes one number an example: choose another checkpoint."
        )
    if not regression and len(names) < 2:
        raise UserError(
            f"The checkpoint '{source}' tells apart {len(names)} class, which is nothing to "
            f"score: choose one with two or more, or with problem_type regression."
        )
    if regression:
        return replace(unread(), kind="regression", metric_name="spearmanr")
    return replace(unread(), label_names=tuple(names))


def with_columns(
    task: Task,
    data_dir: Path | None,
    text_columns: Sequence[str] | None,
    label_column: str | None,
) -> Task:
    """The task with the columns of its data: those that are named, else the usual ones.

    Texts are needed in both splits, labels only where they are scored, in the validation split.

    Raises:
        UserError: no data, or not these columns in it; the sentence lists those that there are.
    """
    if data_dir is None:
        raise UserError(
            f"Task {CUSTOM} needs data of yours: give --data-dir DIR, where DIR holds train.csv "
            f"and validation.csv (or .tsv, .jsonl, .parquet)."
        )
    train, validation = (_columns(task, split, data_dir) for split in ("train", "validation"))
    texts = tuple(text_columns) if text_columns else _usual_texts(validation)
    label = label_column or USUAL_LABEL
    check_columns(texts, label)
    for table in (train, validation):
        missing = [name for name in texts if name not in table.names]
        if missing:
            raise UserError(
                f"{table.source} has no column {', '.join(map(repr, missing))} for the text: name "
                f"one or two of its columns ({_listed(table)}) with --text-columns."
            )
    if label not in validation.names:
        raise UserError(
            f"{validation.source} has no column {label!r} for the labels, which a score needs (the "
            f"train split does without): name one of its columns ({_listed(validation)}) with "
            f"--label-column, or add it."
        )
    return replace(task, text_columns=texts, label_column=label)


def task_to_learn(
    data_dir: Path | None,
    text_columns: Sequence[str] | None,
    label_column: str | None,
    *,
    regression: bool = False,
) -> Task:
    """The task that training data makes, where there is no checkpoint yet.

    Labels 0, 1, ... to the last are ids of LABEL_0, LABEL_1, ...; others are the names, in their
    order. `regression`: they are numbers to predict; numbers that are not whole always are.

    Raises:
        UserError: as `with_columns`, or no labels, or one class only, in the training data.
    """
    task = with_columns(unread(), data_dir, text_columns, label_column)
    assert data_dir is not None
    table = read_table(find_split(task, "train", data_dir), [task.label_column])
    labels = table.columns.get(task.label_column)
    if labels is None:
        raise UserError(
            f"{table.source} has no column {task.label_column!r} for the labels, and nothing can "
            f"be learned without: name one of its columns ({_listed(table)}) with --label-column."
        )
    names = label_names(labels)
    if regression or names is None:
        return replace(task, kind="regression", metric_name="spearmanr")
    if len(names) < 2:
        raise UserError(
            f"{table.source} has {len(names)} different label in {task.label_column}: there is "
            f"nothing to tell apart with less than two."
        )
    return replace(task, label_names=names)


def warn_of_cuts(batches: Sequence[Mapping[str, Tensor]], max_length: int) -> None:
    """Say so where many rows are as long as the length that nobody has chosen."""
    lengths = [int(length) for batch in batches for length in batch["attention_mask"].sum(dim=1)]
    full = sum(length >= max_length for length in lengths)
    if full > _CUT_SHARE * len(lengths):
        warnings.warn(
            f"{full} of {len(lengths)} validation examples fill the {max_length} tokens that are "
            f"read by default, and may be cut: --max-length reads more.",
            RfpruneWarning,
            stacklevel=2,
        )


def _columns(task: Task, split: str, data_dir: Path) -> Table:
    """A split's column names alone."""
    try:
        path = find_split(task, split, data_dir)
    except OSError as error:
        raise UserError(f"'{data_dir}' cannot be read: {error.strerror or error}.") from error
    return read_table(path, ())


def _usual_texts(table: Table) -> tuple[str, ...]:
    found = [names for names in USUAL_TEXTS if set(names) <= set(table.names)]
    if len(found) != 1:
        usual = ", ".join(" and ".join(names) for names in USUAL_TEXTS)
        problem = "more than one" if found else "none"
        raise UserError(
            f"{table.source} has {problem} of the usual columns for the text ({usual}): name one "
            f"or two of its columns ({_listed(table)}) with --text-columns."
        )
    return found[0]


def _listed(table: Table) -> str:
    return ", ".join(table.names) or "there are none"
