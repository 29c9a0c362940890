"""Multiple choice: a question, or the beginning of a text, with each of its choices."""

import re
from collections.abc import Sequence
from typing import Any

from rfprune.errors import UserError
from rfprune.tasks.max_length import checked_length
from rfprune.tasks.registry import Task

LISTED = "choices"
"""The column with the list of choices of each row."""

_ONE_EACH = re.compile(r"(ending|choice|option|answer)_?(\d+)")


def choice_columns(names: Sequence[str]) -> tuple[str, ...]:
    """The columns of a table that hold choices: one per choice, by number, or `choices` with lists.

    Empty if there are neither.
    """
    if LISTED in names:
        return (LISTED,)
    found = {int(match[2]): name for name in names if (match := _ONE_EACH.fullmatch(name))}
    return tuple(found[number] for number in sorted(found)) if len(found) > 1 else ()


def encode_choices(
    task: Task, tokenizer: Any, chunk: Any, max_length: int | None
) -> dict[str, Any]:
    """Columns with C lists of tokens per row: the question with each of its choices.

    With two text columns, as in SWAG, the second is the beginning of every choice.

    Raises:
        UserError: rows have different numbers of choices.
    """
    length = checked_length(task, tokenizer, max_length)
    of_choices = choice_columns(task.text_columns)
    asked = [name for name in task.text_columns if name not in of_choices]
    rows = range(len(chunk[asked[0]]))
    choices = [_choices(chunk, of_choices, row) for row in rows]
    number = len(choices[0])
    for row, own in enumerate(choices):
        if len(own) != number or number < 2:
            raise UserError(
                f"Row {row + 1} has {len(own)} choices, the first one {number}: give all rows of "
                f"{task.name} the same number of choices, at least 2."
            )
    starts = [f"{chunk[asked[1]][row]} " if len(asked) == 2 else "" for row in rows]
    firsts = [chunk[asked[0]][row] for row in rows for _ in range(number)]
    seconds = [f"{starts[row]}{choice}" for row in rows for choice in choices[row]]
    flat = tokenizer(firsts, seconds, truncation=True, max_length=length)
    columns: dict[str, Any] = {
        name: [values[at : at + number] for at in range(0, len(values), number)]
        for name, values in flat.items()
    }
    if task.label_column in chunk:
        columns["labels"] = chunk[task.label_column]
    return columns


def _choices(chunk: Any, columns: Sequence[str], row: int) -> list[str]:
    if tuple(columns) == (LISTED,):
        return list(chunk[LISTED][row])
    return [chunk[name][row] for name in columns]
