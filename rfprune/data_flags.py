"""The flags that say which data is read, and how much of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rfprune import flag_values as value
from rfprune.errors import UserError
from rfprune.tasks.registry import CUSTOM, check_columns

LARGEST_SEED = 2**63 - 1  # what torch takes


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the flags, a group of their own."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-dir",
        type=value.folder("--data-dir"),
        metavar="DIR",
        help="local data, DIR/TASK/{train,validation}.{parquet,csv,tsv,jsonl}, for custom also "
        "without TASK/; else the hub",
    )
    add_columns(group)
    group.add_argument(
        "--samples",
        type=value.whole_number("--samples", 1),
        default=2048,
        metavar="N",
        help="calibration examples, drawn without replacement (default: 2048)",
    )
    group.add_argument(
        "--batch-size",
        type=value.whole_number("--batch-size", 1),
        default=32,
        metavar="N",
        help="examples a batch (default: 32)",
    )
    group.add_argument(
        "--max-length",
        type=value.whole_number("--max-length", 8),
        metavar="N",
        help="tokens an example (default: the task's, for custom 128, or what the model reads)",
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
        help="of --task custom; the column that holds the text, or the two for a pair (default: "
        "sentence1 and sentence2, sentence, or text)",
    )
    parser.add_argument(
        "--label-column",
        metavar="NAME",
        help="of --task custom; the column that holds label ids or names, or numbers for a "
        "regression; training data needs none (default: label)",
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
    for flag, given in flags.items():
        if given is not None:
            raise UserError(
                f"{flag} belongs to --task custom and does nothing for {task}, whose columns are "
                f"known: leave it out."
            )
