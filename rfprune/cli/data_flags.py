"""The flags that say which data is read, and how much of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rfprune.cli import flag_values as value
from rfprune.errors import UserError
from rfprune.tasks.registry import (
    BLOCK_TOKENS,
    CUSTOM,
    LANGUAGE_MODELING,
    OWN_DATA,
    SIMILARITY,
    Task,
    check_columns,
    default_batch_size,
    default_samples,
)

_NOT_BY_EXAMPLE = ("language-modeling", "similarity", "token-classification")
_NOT_EXPORTED = ("multiple-choice", "similarity", "token-classification")
LARGEST_SEED = 2**63 - 1  # what torch takes


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the flags, a group of their own."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-dir",
        type=value.folder("--data-dir"),
        metavar="DIR",
        help="local data, DIR/TASK/{train,validation}.{parquet,csv,tsv,jsonl}; data of your own "
        "also without TASK/, as .txt for language-modeling, and images as "
        "DIR/{train,validation}/CLASS/*.png; else the hub",
    )
    add_columns(group)
    group.add_argument(
        "--samples",
        type=value.whole_number("--samples", 1),
        metavar="N",
        help="calibration examples, drawn without replacement (default: "
        f"{default_samples('')}, of {LANGUAGE_MODELING} {default_samples(LANGUAGE_MODELING)})",
    )
    group.add_argument(
        "--batch-size",
        type=value.whole_number("--batch-size", 1),
        metavar="N",
        help=f"examples a batch (default: {default_batch_size('')}, of {LANGUAGE_MODELING} "
        f"{default_batch_size(LANGUAGE_MODELING)})",
    )
    group.add_argument(
        "--max-length",
        type=value.whole_number("--max-length", 8),
        metavar="N",
        help="tokens an example (default: the task's, for custom 128, for language-modeling "
        f"{BLOCK_TOKENS}, or what the model reads)",
    )
    group.add_argument(
        "--eval-limit",
        type=value.whole_number("--eval-limit", 1),
        metavar="N",
        help="score this many validation examples, not all",
    )
    group.add_argument(
        "--seed",
        type=value.whole_number("--seed", 0, LARGEST_SEED),
        default=0,
        metavar="N",
        help="draws the calibration examples (default: 0)",
    )


def add_columns(parser: argparse._ActionsContainer) -> None:
    """Add the flags of task custom."""
    parser.add_argument(
        "--text-columns",
        nargs="+",
        metavar="NAME",
        help=f"of --task {', '.join(OWN_DATA)}; the column that holds the text, or the two for a "
        "pair (default: sentence1 and sentence2, sentence, or text; tokens; question)",
    )
    parser.add_argument(
        "--label-column",
        metavar="NAME",
        help=f"of --task {CUSTOM} and {SIMILARITY}; the column that holds label ids or names, or "
        "numbers for a regression; training data needs none (default: label; ner_tags; score)",
    )


def check_kind(task: Task, *, exports: Sequence[str], max_drop: float | None) -> None:
    """See that a run of these flags is possible for the kind of a task.

    Raises:
        UserError: it is not; the sentence says why.
    """
    if max_drop is not None and task.kind in _NOT_BY_EXAMPLE:
        raise UserError(
            f"--max-drop counts points of a score that examples add up to, but {task.metric_name} "
            f"of {task.kind} is none: give sizes with --constraint, and compare them."
        )
    if exports and task.kind in _NOT_EXPORTED:
        raise UserError(
            f"--export knows classifiers, questions with an answer and language models, not "
            f"{task.kind}: leave it out; the output is an ordinary model of transformers."
        )


def check_data(
    task: str,
    data_dir: Path | None,
    text_columns: Sequence[str] | None,
    label_column: str | None,
) -> None:
    """See that the flags fit the task.

    Raises:
        UserError: they do not; the sentence says which.
    """
    if task == CUSTOM:
        check_columns(text_columns, label_column)
        if data_dir is None:
            raise UserError(
                "--task custom needs data of yours: give --data-dir DIR, where DIR holds train.csv "
                "and validation.csv (or .tsv, .jsonl, .parquet)."
            )
        return
    flags = {"--text-columns": text_columns, "--label-column": label_column}
    if task in OWN_DATA:
        check_columns(text_columns, label_column)
        del flags["--text-columns"]
    if task == SIMILARITY:
        flags = {}
    for flag, given in flags.items():
        if given is not None:
            raise UserError(
                f"{flag} belongs to --task custom and does nothing for {task}, whose columns are "
                f"known: leave it out."
            )
