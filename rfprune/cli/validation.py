"""Checks of the flags that need the tasks, the hub or the installed packages.

What the choices alone decide is checked where they are declared, in `rfprune.settings`.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from pathlib import Path

from rfprune.errors import UserError, check_imports, check_installed
from rfprune.settings import HubSettings, WritingSettings
from rfprune.tasks.registry import (
    CUSTOM,
    OWN_DATA,
    SEQ2SEQ,
    SIMILARITY,
    TASK_NAMES,
    Task,
    check_columns,
)

EXPORT_PACKAGES = {
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "openvino": ("openvino", "onnx", "onnxscript"),
    "gguf": ("gguf",),
}
"""Format -> packages that it needs: its runtime, which checks the export, and those that write it.
The extra of pyproject.toml with the name of the format has them."""

_RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino"}
_COMPRESSION = ("nncf",)
"""What --quantize needs for openvino."""

_KINDS_WITHOUT_MAX_DROP = ("language-modeling", "similarity", "token-classification")
_KINDS_WITHOUT_EXPORT = ("multiple-choice",)


def check_task(name: str) -> None:
    """Raise a UserError, with the nearest known name, unless the task is known."""
    if name in TASK_NAMES:
        return
    close = difflib.get_close_matches(name.lower(), TASK_NAMES, n=1)
    guess = f", did you mean {close[0]}" if close else ""
    raise UserError(f"Unknown task {name!r}{guess}: the tasks are {', '.join(TASK_NAMES)}")


def check_data(
    task: str,
    data_dir: Path | None,
    text_columns: Sequence[str] | None,
    label_column: str | None,
    validation_fraction: float | None = None,
) -> None:
    """Raise a UserError unless the flags of the data fit the task."""
    if validation_fraction is not None and (task not in OWN_DATA or data_dir is None):
        problem = "has no data to split" if task in OWN_DATA else f"does nothing for {task}"
        raise UserError(
            f"--validation-fraction {validation_fraction:g} {problem} without your own data: leave "
            f"it out, or give --data-dir FILE with --task {', '.join(OWN_DATA)}"
        )
    if task in (CUSTOM, SEQ2SEQ):
        check_columns(text_columns, label_column, most=1 if task == SEQ2SEQ else 2)
        if data_dir is None:
            raise UserError(
                f"--task {task} needs your own data: give --data-dir DIR, where DIR holds "
                "train.csv and validation.csv (or .tsv, .jsonl, .parquet), or --data-dir FILE with "
                "--validation-fraction 0.2"
            )
        return
    if task in OWN_DATA:
        check_columns(text_columns, label_column)
    flags = {
        "--text-columns": text_columns if task not in OWN_DATA else None,
        "--label-column": label_column if task != SIMILARITY else None,
    }
    for flag, given in flags.items():
        if given is not None:
            raise UserError(
                f"{flag} belongs to --task custom and does nothing for {task}, whose columns are "
                f"known: leave it out"
            )


def check_writing(task: str, writing: WritingSettings) -> None:
    """Raise a UserError for flags of text generation with a task that generates none."""
    if writing.given and task != SEQ2SEQ:
        raise UserError(
            f"{', '.join(writing.given)} would do nothing for {task}, which generates no texts: "
            f"leave it out, or give --task {SEQ2SEQ}"
        )


def check_vocabulary(paths: Sequence[Path]) -> None:
    """Raise a UserError unless all files of --vocabulary are there."""
    for path in paths:
        if not path.is_file():
            problem = "is a folder" if path.is_dir() else "does not exist"
            raise UserError(f"--vocabulary {path} {problem}: give text files")


def check_kind(
    task: Task, *, exports: Sequence[str], max_drop: float | None, vocabulary: Sequence[Path] = ()
) -> None:
    """Raise a UserError unless a task of this kind has a search, the exports and tokens."""
    if vocabulary and task.kind == "image-classification":
        raise UserError(
            "--vocabulary does nothing for an image model, which has no tokens: leave it out"
        )
    if max_drop is not None and task.kind in _KINDS_WITHOUT_MAX_DROP:
        raise UserError(
            f"--max-drop resamples the examples, which {task.metric_name} of {task.kind} does not "
            "allow: give several sizes with --constraint instead, and compare them"
        )
    if "gguf" in exports and task.kind != "language-modeling":
        raise UserError(
            f"--export gguf is for language models, whose task is language-modeling, and not for "
            f"{task.kind}: leave gguf out of --export"
        )
    if exports and task.kind in _KINDS_WITHOUT_EXPORT:
        raise UserError(
            f"--export does not support {task.kind}, whose inputs have one more dimension: leave "
            f"it out; the output is an ordinary transformers model"
        )


def check_exports(formats: Collection[str], *, quantize: bool = False) -> None:
    """Raise a UserError if a package for a format of --export is missing or does not run."""
    for name in formats:
        flag = f"--export {name}"
        check_installed(flag, EXPORT_PACKAGES.get(name, ()), f"leave {flag} out", extra=name)
        if quantize and name == "openvino":
            feature, alternative = f"{flag} --quantize", "leave --quantize out"
            check_installed(feature, _COMPRESSION, alternative, extra=name)
        if name in _RUNTIMES:
            check_imports(flag, _RUNTIMES[name], f"leave {flag} out")


def check_new_file(flag: str, path: Path) -> None:
    """Raise a UserError unless a new file can be written there."""
    if path.exists():
        raise UserError(f"{flag} {path} already exists: give the name of a new file")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"{flag} {path}: the folder {folder} does not exist; create it")


def check_hub(hub: HubSettings) -> None:
    """Raise a UserError unless an upload can begin: the name is valid and there is a token."""
    if hub.push_to_hub is None:
        return
    from rfprune.hub.upload import check_access, check_repository

    check_repository(hub.push_to_hub)
    if not hub.hub_dry_run:
        check_access()
