"""From a task's data, on disk or on the hub, to rows of tokens.

Local data is read into memory and checked as a whole before anything else happens; what is wrong
with it is a UserError that names the file and the row (counted from 1).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rfprune.errors import UserError, error_summary
from rfprune.tasks import offline
from rfprune.tasks.columns import checked_columns, label_columns
from rfprune.tasks.files import (
    EXTENSIONS,
    SHOWN_NAMES,
    Table,
    read_table,
    table_of,
)
from rfprune.tasks.image_classification import load_images
from rfprune.tasks.registry import LANGUAGE_MODELING, OWN_DATA, Task

# Rows tokenised at a time: enough for the tokenizer's threads, little as Python objects.
ROWS_AT_A_TIME = 4096
_KEPT_AS_THEY_ARE = ("id", "idx")


def load_split(
    task: Task, split: str, data_dir: Path | None, *, labels_required: bool = True
) -> Any:
    """One split of a task as a `datasets.Dataset` in memory: texts, label, and id or idx if any.

    From DATA_DIR/TASK/SPLIT.{parquet,csv,tsv,jsonl,json} (`custom`: DATA_DIR/SPLIT... as well),
    from a `save_to_disk` folder at DATA_DIR/TASK, DATA_DIR/TASK/SPLIT or DATA_DIR, or from the hub
    where `data_dir` is None.
    Without `labels_required` labels are neither needed nor checked nor returned. UserError for
    whatever is missing, unreadable or wrong in the data.
    """
    from datasets import Dataset
    from pyarrow import ArrowException

    if task.kind == "image-classification":
        assert data_dir is not None
        return load_images(task, split, data_dir, labels_required=labels_required)
    wanted = [*task.text_columns, *(() if task.name in OWN_DATA else _KEPT_AS_THEY_ARE)]
    labels_required = labels_required and task.label_column != ""
    if labels_required:
        wanted += label_columns(task)
    if data_dir is None:
        table = _from_hub(task, split, wanted)
    else:
        try:
            path = find_split(task, split, data_dir)
        except OSError as error:
            raise UserError(f"'{data_dir}' cannot be read: {error.strerror or error}.") from error
        table = read_table(path, wanted)
    columns = checked_columns(task, table, labels_required)
    try:
        return Dataset.from_dict(columns)
    except (ArrowException, ValueError, TypeError) as error:
        raise UserError(
            f"{table.source} has values that make no table ({error_summary(error)}): one type a "
            f"column, and text in Unicode, is wanted."
        ) from error


def check_more_than_one_row(task: Task, split: str, dataset: Any) -> None:
    """UserError for a split of one row, which must be a mistake."""
    if len(dataset) == 1 and task.kind != "language-modeling":
        raise UserError(
            f"The {split} split of {task.name} has 1 row: no model can be calibrated or scored on "
            f"a single example; give at least 2, better hundreds."
        )


def _from_hub(task: Task, split: str, wanted: Iterable[str]) -> Table:
    """The split as the hub, or its cache, has it."""
    import datasets

    name = task.hub_path + (f" ({task.hub_config})" if task.hub_config else "")
    with offline.cached_when_unreachable() as may_ask:
        try:
            dataset = datasets.load_dataset(task.hub_path, task.hub_config, split=split)
        except Exception as error:  # network, hub, cache and disk each have their own
            reason = error_summary(error) if may_ask else "no connection, and not in the cache"
            raise UserError(
                f"The {split} split of dataset {name} could not be had from the Hugging Face hub "
                f"({reason}): connect to it, or give local files with --data-dir DIR, holding "
                f"DIR/{task.name}/{split}.parquet (or .csv, .tsv, .jsonl)."
            ) from error
    return table_of(dataset, list(wanted), f"The {split} split of dataset {name}")


def find_split(task: Task, split: str, data_dir: Path) -> Path:
    """The file or saved dataset that holds the split; UserError says what is there instead."""
    custom = task.name in OWN_DATA
    extensions = (".txt", *EXTENSIONS) if task.name == LANGUAGE_MODELING else EXTENSIONS
    usual, others = (".txt", ".parquet, ") if len(extensions) > len(EXTENSIONS) else (".csv", "")
    if not data_dir.is_dir():
        problem = "is not a folder" if data_dir.exists() else "does not exist"
        holding = f"train{usual} and validation{usual}" if custom else f"{task.name}/"
        raise UserError(f"The data folder '{data_dir}' {problem}: give one that holds {holding}.")
    folders = [data_dir / task.name, data_dir]
    with_files = folders if custom else folders[:1]
    found = [folder / f"{split}{extension}" for folder in with_files for extension in extensions]
    found = [path for path in found if path.is_file()]
    found += [folder / split for folder in folders if _is_saved_dataset(folder / split)]
    if len(found) > 1:
        raise UserError(
            f"The {split} split is there twice, '{found[0]}' and '{found[1]}': keep one."
        )
    if not found:
        folder = folders[0] if folders[0].is_dir() else data_dir
        names = sorted(path.name for path in folder.iterdir()) or ["nothing"]
        there = ", ".join(names[:SHOWN_NAMES] + ["..."] * (len(names) > SHOWN_NAMES))
        raise UserError(
            f"'{data_dir}' has no {split} split of {task.name}: wanted "
            f"{'' if custom else task.name + '/'}{split}{extensions[0]} (or {others}.csv, .tsv, "
            f".jsonl, or a save_to_disk folder), but '{folder}' holds {there}"
            f"{_what_for(task, split) if custom else _one_level_off(task, split, data_dir)}."
        )
    return found[0]


def _one_level_off(task: Task, split: str, data_dir: Path) -> str:
    """What to do where the files lie in the data folder itself, and not in one for the task."""
    if not any((data_dir / f"{split}{extension}").is_file() for extension in EXTENSIONS):
        return ""
    if data_dir.resolve().name == task.name:
        return f": give the folder above, '{data_dir.resolve().parent}'"
    return f": move them to '{data_dir / task.name}'"


def _what_for(task: Task, split: str) -> str:
    """What somebody's own data needs the split for, and how it comes about."""
    if task.name == LANGUAGE_MODELING:
        return "; a text to calibrate on and another one to score are wanted, .txt will do"
    if split == "train":
        return "; prune with a few hundred to 2,000 of your training texts, which need no labels"
    return "; to be scored, the model needs labelled examples that it was not trained on"


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file()
