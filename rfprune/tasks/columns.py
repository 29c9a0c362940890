"""Check the columns of a split completely; errors name the file and the row, counted from 1."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rfprune.errors import UserError
from rfprune.tasks.class_names import by_name
from rfprune.tasks.files import Table
from rfprune.tasks.labels import class_ids, class_ids_of_lists
from rfprune.tasks.multiple_choice import LISTED
from rfprune.tasks.registry import OWN_DATA, Kind, Task

_Check = Callable[[Task, Sequence[Any], str], Any]
_KINDS_WITH_NUMBERS = ("regression", "similarity")


def checked_columns(task: Task, table: Table, labels_required: bool) -> dict[str, list[Any]]:
    """The columns of a task, complete and of the right types, with labels as numbers.

    Raises:
        UserError: a column or value is missing, or of the wrong type.
    """
    columns = dict(table.columns)
    if labels_required:
        for name in filter(table.class_names.__contains__, label_columns(task)):
            names = table.class_names[name]
            columns[name] = by_name(task, name, names, columns[name], table.source)
    if labels_required and task.kind == "multi-label":
        columns = with_one_label_column(task, columns)
    needed = [*task.text_columns, *([task.label_column] if labels_required else [])]
    missing = [name for name in needed if name not in columns]
    if missing:
        raise UserError(
            f"{table.source} has no column {', '.join(missing)}: {task.name} needs "
            f"{', '.join(needed)}, found {', '.join(table.names) or 'none'}."
        )
    if not columns[needed[0]]:
        raise UserError(f"{table.source} is empty: it has no rows.")
    for name in task.text_columns:
        is_list = name == LISTED or _has_words(task)
        (_check_lists if is_list else _check_texts)(columns[name], name, table.source)
    if labels_required:
        check: _Check = _LABEL_CHECKS.get(task.kind, _checked_labels)
        columns[task.label_column] = check(task, columns[task.label_column], table.source)
        if _has_words(task):
            _check_one_label_per_word(task, columns, table.source)
    return {name: columns[name] for name in columns if name in needed or name in table.columns}


def _has_words(task: Task) -> bool:
    return task.kind == "token-classification"


def _check_lists(rows: Sequence[Any], column: str, source: str) -> None:
    for row, words in enumerate(rows, start=1):
        if words == []:
            raise UserError(f"{source}, row {row}: {column} is an empty list; drop the row.")
        if not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
            raise UserError(
                f"{source}, row {row}: {column} is {_shown(words)}, not a list of texts; use a "
                f"jsonl or parquet file, which can hold lists."
            )


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value)[:60]


def _check_one_label_per_word(task: Task, columns: dict[str, list[Any]], source: str) -> None:
    words, labels = columns[task.text_columns[0]], columns[task.label_column]
    for row, (own, names) in enumerate(zip(words, labels, strict=True), start=1):
        if len(own) != len(names):
            raise UserError(
                f"{source}, row {row}: {len(own)} {task.text_columns[0]} but {len(names)} "
                f"{task.label_column}; give one label per word."
            )


def _checked_lists(task: Task, labels: Sequence[Any], source: str) -> list[list[int]]:
    """Label ids of rows that are lists of label ids or names."""
    for row, own in enumerate(labels, start=1):
        if not isinstance(own, list):
            raise UserError(
                f"{source}, row {row}: {task.label_column} is {_shown(own)}, not a list; use a "
                f"jsonl or parquet file, which can hold lists."
            )
    return class_ids_of_lists(task, labels, source)


def _checked_sets(task: Task, labels: Sequence[Any], source: str) -> list[list[float]]:
    """Rows with any number of labels as 1.0 or 0.0 for every label, (L,) each."""
    if all(_is_multi_hot(own, task.num_labels) for own in labels):
        return [[float(value) for value in own] for own in labels]
    numbers = range(task.num_labels)
    return [
        [float(label in ids) for label in numbers] for ids in _checked_lists(task, labels, source)
    ]


def _is_multi_hot(own: Any, num_labels: int) -> bool:
    """Whether a row has 0 or 1 for every label already."""
    return (
        isinstance(own, list) and len(own) == num_labels and all(value in (0, 1) for value in own)
    )


def label_columns(task: Task) -> list[str]:
    """All columns that may hold labels; several labels may have one column each."""
    return [task.label_column, *(task.label_names if task.kind == "multi-label" else ())]


def with_one_label_column(task: Task, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The columns with one column per label joined to lists of 0 and 1."""
    if task.label_column in columns or not set(task.label_names) <= columns.keys():
        return columns
    rows = zip(*(columns[name] for name in task.label_names), strict=True)
    return columns | {task.label_column: [[_zero_or_one(value) for value in row] for row in rows]}


def _zero_or_one(value: Any) -> Any:
    """0 or 1 from the text of a csv file; anything else unchanged."""
    known = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
    return known.get(str(value).strip().lower(), value)


def _check_texts(texts: Sequence[Any], column: str, source: str) -> None:
    for row, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            problem = "is missing" if text is None else f"is {text!r}, not text"
            raise UserError(f"{source}, row {row}: {column} {problem}; fill or drop the row.")


def _checked_labels(task: Task, labels: Sequence[Any], source: str) -> list[int] | list[float]:
    """Label ids or numbers, in range, from numbers or the text of a csv file."""
    if task.name in OWN_DATA and task.kind == "classification":
        return class_ids(task, labels, source)
    if task.kind == "multiple-choice":
        return _checked_choices(task, labels, source)
    if task.kind in _KINDS_WITH_NUMBERS:
        low, high = task.label_range or (-math.inf, math.inf)
        wanted = (
            f"a number from {low:g} to {high:g}" if task.label_range else "a number (such as 0.5)"
        )
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
        whole = math.isfinite(number) and (task.kind in _KINDS_WITH_NUMBERS or number.is_integer())
        if not (whole and low <= number <= high):
            shown = "missing" if label is None else repr(label)
            raise UserError(
                f"{source}, row {row}: {task.label_column} is {shown}, but {task.name} takes "
                f"{wanted}; correct or drop the row."
            )
        numbers.append(number)
    return numbers if task.kind in _KINDS_WITH_NUMBERS else [int(number) for number in numbers]


def _checked_choices(task: Task, labels: Sequence[Any], source: str) -> list[int]:
    """The number of the right choice in each row, from 0."""
    for row, label in enumerate(labels, start=1):
        if not re.fullmatch(r"\d+(\.0)?", str(label)):
            raise UserError(
                f"{source}, row {row}: {task.label_column} is {_shown(label)}, but the number of "
                f"the right choice is needed, 0 for the first; correct or drop the row."
            )
    return [int(float(label)) for label in labels]


def _checked_targets(task: Task, targets: Sequence[Any], source: str) -> list[str]:
    """Target texts, none of them empty."""
    _check_texts(targets, task.label_column, source)
    for row, text in enumerate(targets, start=1):
        if not text.strip():
            raise UserError(
                f"{source}, row {row}: {task.label_column} is empty, and no text can be scored "
                f"against it; fill or drop the row."
            )
    return list(targets)


def _checked_answers(task: Task, answers: Sequence[Any], source: str) -> list[dict[str, Any]]:
    """Answers as {text: [...], answer_start: [...]}; both lists empty for no answer (SQuAD 2.0)."""
    for row, answer in enumerate(answers, start=1):
        if not _is_answer(answer):
            raise UserError(
                f"{source}, row {row}: {task.label_column} must be "
                f'{{"text": [...], "answer_start": [...]}} with lists of one length, in a parquet '
                f"or jsonl file, not {str(answer)[:60]!r}."
            )
        if task.name == "squad" and not answer["text"]:
            raise UserError(
                f"{source}, row {row}: the question has no answer, but every question of task "
                f"squad has one; use --task squad_v2."
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


_LABEL_CHECKS: Mapping[Kind, _Check] = MappingProxyType(
    {
        "question-answering": _checked_answers,
        "token-classification": _checked_lists,
        "multi-label": _checked_sets,
        "seq2seq": _checked_targets,
    }
)
