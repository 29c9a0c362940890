"""Check a task's columns as a whole: what is wrong is a UserError naming file and row (from 1)."""

import math
from collections.abc import Sequence
from typing import Any

from rfprune.errors import UserError
from rfprune.tasks.files import Table
from rfprune.tasks.labels import class_ids
from rfprune.tasks.registry import CUSTOM, Task


def checked_columns(task: Task, table: Table, labels_required: bool) -> dict[str, list[Any]]:
    """The table's columns, complete and of the right types, labels as numbers; else UserError."""
    needed = [*task.text_columns, *([task.label_column] if labels_required else [])]
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise UserError(
            f"{table.source} has no column {', '.join(missing)}: {task.name} needs "
            f"{', '.join(needed)}, found {', '.join(table.names) or 'none'}."
        )
    if not table.columns[needed[0]]:
        raise UserError(f"{table.source} is empty: it has no rows.")
    for name in task.text_columns:
        _check_texts(table.columns[name], name, table.source)
    columns = dict(table.columns)
    if labels_required:
        checked = _checked_answers if task.kind == "question-answering" else _checked_labels
        columns[task.label_column] = checked(task, columns[task.label_column], table.source)
    return columns


def _check_texts(texts: Sequence[Any], column: str, source: str) -> None:
    for row, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            problem = "is missing" if text is None else f"is {text!r}, not text"
            raise UserError(f"{source}, row {row}: {column} {problem}; fill or drop the row.")


def _checked_labels(task: Task, labels: Sequence[Any], source: str) -> list[int] | list[float]:
    """Class ids or scores as numbers (a csv file gives text), all in range."""
    if task.name == CUSTOM and task.kind == "classification":
        return class_ids(task, labels, source)
    if task.kind == "regression":
        low, high = task.label_range or (-math.inf, math.inf)
        wanted = f"a number from {low:g} to {high:g}" if task.label_range else "a number"
    else:
        low, high = 0, task.num_labels - 1
        meanings = (f"{label} {name}" for label, name in enumerate(task.label_names))
        wanted = f"a label id ({', '.join(meanings)})"
    numbers = []
    for row, label in enumerate(labels, start=1):
        try:
            number = float(label)
        except (TypeError, ValueError):
            number = math.nan
        whole = math.isfinite(number) and (task.kind == "regression" or number.is_integer())
        if not (whole and low <= number <= high):
            shown = "missing" if label is None else repr(label)
            raise UserError(
                f"{source}, row {row}: {task.label_column} is {shown}, but {task.name} takes "
                f"{wanted}."
            )
        numbers.append(number)
    return numbers if task.kind == "regression" else [int(number) for number in numbers]


def _checked_answers(task: Task, answers: Sequence[Any], source: str) -> list[dict[str, Any]]:
    """Answers as {text: [...], answer_start: [...]}; none at all only where the task has such."""
    for row, answer in enumerate(answers, start=1):
        if not _is_answer(answer):
            raise UserError(
                f"{source}, row {row}: {task.label_column} must be "
                f'{{"text": [...], "answer_start": [...]}} with lists of one length, in a parquet '
                f"or jsonl file, not {str(answer)[:60]!r}."
            )
        if task.name == "squad" and not answer["text"]:
            raise UserError(
                f"{source}, row {row}: the question has no answer, which task squad does not "
                f"know; use --task squad_v2."
            )
    return [{name: list(answer[name]) for name in ("text", "answer_start")} for answer in answers]


def _is_answer(answer: Any) -> bool:
    if not isinstance(answer, dict):
        return False
    texts, starts = answer.get("text"), answer.get("answer_start")
    return (
        isinstance(texts, list)
        and isinstance(starts, list)
        and len(texts) == len(starts)
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(start, int) and start >= 0 for start in starts)
    )
