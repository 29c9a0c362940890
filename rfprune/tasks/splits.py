"""Find and load one split of a task's data, from local files or from the hub.

Local data is read into memory and checked completely before any work begins. Errors name the file
and the row, counted from 1.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rfprune.errors import UserError, error_summary
from rfprune.tasks import offline
from rfprune.tasks.columns import checked_columns, label_columns
from rfprune.tasks.files import EXTENSIONS, SHOWN_NAMES, Table, read_table, table_of
from rfprune.tasks.image_classification import load_images
from rfprune.tasks.registry import LANGUAGE_MODELING, OWN_DATA, Task

_ID_COLUMNS = ("id", "idx")
_BLANK_LINES = re.compile(r"\n\s*\n")


def load_split(
    task: Task, split: str, data_dir: Path | None, *, labels_required: bool = True
) -> Any:
    """Load one split of a task into memory.

    Args:
        split: such as "train"; with `task.held_out`, "train" or "validation".
        data_dir: see `find_split`; None: the split is loaded from the hub.
        labels_required: False: labels are neither checked nor returned.

    Returns:
        A `datasets.Dataset` with the columns of the task: text, labels, and id or idx if any.

    Raises:
        UserError: data is missing, unreadable or wrong.
    """
    if task.kind == "image-classification":
        assert data_dir is not None
        dataset = load_images(task, split, data_dir, labels_required=labels_required)
    else:
        dataset = _load_table(task, split, data_dir, labels_required and task.label_column != "")
    if task.held_out is None:
        return dataset
    if len(dataset) < 2:
        raise UserError(
            f"'{data_dir}' has {len(dataset)} row, and --validation-fraction needs at least 2, "
            f"better hundreds: give a file with more rows."
        )
    return dataset.select(task.held_out.rows(split, len(dataset)))


def _load_table(task: Task, split: str, data_dir: Path | None, labels_required: bool) -> Any:
    from datasets import Dataset
    from pyarrow import ArrowException

    wanted = [*task.text_columns, *(() if task.name in OWN_DATA else _ID_COLUMNS)]
    if labels_required:
        wanted += label_columns(task)
    if data_dir is None:
        table = _from_hub(task, split, wanted)
    else:
        path = find_split(task, split, data_dir)
        table = read_table(path, wanted)
        if path.suffix == ".txt" and task.held_out is not None:
            table = _paragraphs(table)
    columns = checked_columns(task, table, labels_required)
    try:
        return Dataset.from_dict(columns)
    except (ArrowException, ValueError, TypeError) as error:
        raise UserError(
            f"{table.source} has values that form no table ({error_summary(error)}): every column "
            f"needs values of one type, and texts in Unicode."
        ) from error


def check_more_than_one_row(task: Task, split: str, dataset: Any) -> None:
    """Refuse a split of one row, which must be a mistake."""
    if len(dataset) == 1 and task.kind != "language-modeling":
        raise UserError(
            f"The {split} split of {task.name} has 1 row, too few to calibrate or score a model: "
            f"give at least 2, better hundreds."
        )


def _from_hub(task: Task, split: str, wanted: Iterable[str]) -> Table:
    """The split from the hub or its cache."""
    import datasets

    name = task.hub_path + (f" ({task.hub_config})" if task.hub_config else "")
    with offline.cached_when_unreachable() as is_reachable:
        try:
            dataset = datasets.load_dataset(task.hub_path, task.hub_config, split=split)
        except Exception as error:  # network, hub, cache and disk raise errors of many types
            reason = "no connection, and not in the cache"
            if is_reachable or "split" in str(error):
                reason = error_summary(error)
            raise UserError(
                f"The {split} split of dataset {name} cannot be loaded from the Hugging Face hub "
                f"({reason}): check the connection, name another split with "
                f"{_flag(task, split)} NAME, or give local files with --data-dir DIR, where "
                f"DIR holds {task.name}/{split}.parquet (or .csv, .tsv, .jsonl)."
            ) from error
    return table_of(dataset, list(wanted), f"The {split} split of dataset {name}")


def find_split(task: Task, split: str, data_dir: Path) -> Path:
    """The file, or the folder made by `save_to_disk`, that holds a split.

    Looked for, with EXT one of .parquet, .csv, .tsv, .jsonl, .json (language modelling: also .txt):
    DATA_DIR/TASK/SPLIT.EXT, DATA_DIR/TASK/SPLIT/ and DATA_DIR/SPLIT/; for a task on your own data
    also DATA_DIR/SPLIT.EXT. With `task.held_out`, both splits are rows of one table: DATA_DIR
    itself, or the training split in it.

    Raises:
        UserError: the split is missing (the error lists what is there) or there twice, or
            `task.held_out` is set and there is a validation split.
    """
    try:
        if task.held_out is not None:
            return _find_table_to_split(task, data_dir)
        if not data_dir.is_dir():
            raise _not_a_folder(task, data_dir)
        found = _split_paths(task, split, data_dir)
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(
                f"The {split} split is there twice, '{found[0]}' and '{found[1]}': keep one."
            )
        raise _missing(task, split, data_dir)
    except OSError as error:
        raise UserError(f"'{data_dir}' cannot be read: {error.strerror or error}.") from error


def _find_table_to_split(task: Task, data_dir: Path) -> Path:
    """The one table that --validation-fraction splits."""
    if data_dir.is_file():
        if data_dir.suffix not in _extensions(task):
            raise UserError(
                f"'{data_dir}' is not a table: --data-dir takes {', '.join(_extensions(task))} for "
                f"--validation-fraction; convert the file."
            )
        return data_dir
    if _is_saved_dataset(data_dir):
        return data_dir
    if (
        data_dir.is_dir()
        and task.train_split != "validation"
        and (existing := _split_paths(task, "validation", data_dir))
    ):
        raise UserError(
            f"'{existing[0]}' is a validation split already, and --validation-fraction makes one: "
            f"leave the flag out, or remove the file."
        )
    return find_split(replace(task, held_out=None), task.train_split, data_dir)


def _split_paths(task: Task, split: str, data_dir: Path) -> Sequence[Path]:
    """All places that hold the split."""
    folders = [data_dir / task.name, data_dir]
    with_files = folders if task.name in OWN_DATA else folders[:1]
    files = [folder / f"{split}{ext}" for folder in with_files for ext in _extensions(task)]
    saved = [folder / split for folder in folders]
    return [*filter(Path.is_file, files), *filter(_is_saved_dataset, saved)]


def _extensions(task: Task) -> tuple[str, ...]:
    return (".txt", *EXTENSIONS) if task.name == LANGUAGE_MODELING else EXTENSIONS


def _paragraphs(table: Table) -> Table:
    """A text of one row as a row per paragraph; per line if it has no blank lines."""
    columns = {}
    for name, (text,) in table.columns.items():
        parts = _BLANK_LINES.split(text)
        parts = parts if len(parts) > 1 else text.splitlines()
        columns[name] = [part for part in parts if part.strip()]
    return replace(table, columns=columns)


def _not_a_folder(task: Task, data_dir: Path) -> UserError:
    end = ".txt" if task.name == LANGUAGE_MODELING else ".csv"
    own = task.name in OWN_DATA
    validation = task.validation_splits[0]
    holding = f"{task.train_split}{end} and {validation}{end}" if own else f"{task.name}/"
    if not data_dir.exists():
        return UserError(
            f"The data folder '{data_dir}' does not exist: give one that holds {holding}."
        )
    split = ", or split this file with --validation-fraction 0.2" if own else ""
    return UserError(
        f"The data folder '{data_dir}' is not a folder: give one that holds {holding}{split}."
    )


def _missing(task: Task, split: str, data_dir: Path) -> UserError:
    """The error for a split that is not there: what is there instead, and what to do."""
    own = task.name in OWN_DATA
    folder = data_dir / task.name if (data_dir / task.name).is_dir() else data_dir
    names = sorted(path.name for path in folder.iterdir()) or ["nothing"]
    there = ", ".join(names[:SHOWN_NAMES] + ["..."] * (len(names) > SHOWN_NAMES))
    first, *others = (ext for ext in _extensions(task) if ext != ".json")
    wanted = f"{'' if own else task.name + '/'}{split}{first}"
    return UserError(
        f"'{data_dir}' has no {split} split of {task.name}: needed is {wanted} (or "
        f"{', '.join(others)}, or a save_to_disk folder), or another split named with "
        f"{_flag(task, split)} NAME, but '{folder}' holds {there}"
        f"{_advice(task, split) if own else _one_level_off(task, split, data_dir)}."
    )


def _flag(task: Task, split: str) -> str:
    """The flag that names a split."""
    return "--train-split" if split == task.train_split else "--validation-split"


def _one_level_off(task: Task, split: str, data_dir: Path) -> str:
    """Advice where the files lie in the data folder itself instead of in a folder for the task."""
    if not any((data_dir / f"{split}{extension}").is_file() for extension in EXTENSIONS):
        return ""
    if data_dir.resolve().name == task.name:
        return f": give the folder above, '{data_dir.resolve().parent}'"
    return f": move them to '{data_dir / task.name}'"


def _advice(task: Task, split: str) -> str:
    """What a task on your own data needs the split for."""
    if split != task.train_split:
        advice = "; scores need labelled examples that the model was not trained on"
        if task.name == LANGUAGE_MODELING:
            advice = "; a text to score the models on is needed"
        return f"{advice}: add them, or hold rows out with --validation-fraction 0.2"
    if task.name == LANGUAGE_MODELING:
        return "; a text to calibrate on is needed, .txt will do"
    return "; a few hundred to 2,000 of your training texts are needed, without labels"


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file()
