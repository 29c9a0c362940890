"""A dataset's own class names (`ClassLabel`): ids of the data to ids of the task, by name.

Data and model number the same classes in their own order. Where both have names, the names decide;
ids alone would score a good model below chance.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rfprune.errors import UserError
from rfprune.tasks.label_order import is_plural, same_class
from rfprune.tasks.labels import id_finder, listed
from rfprune.tasks.multiple_choice import choice_columns
from rfprune.tasks.registry import OWN_DATA, Task

ClassNames = Mapping[str, tuple[str, ...]]
"""The class names by id of each column that has them."""

_NUMBERED = re.compile(r"(?:label|class)?[\s_-]*(\d+)", re.IGNORECASE)
_MEANINGS = {
    **dict.fromkeys(("0", "false", "no", "absent", "negative"), 0),
    **dict.fromkeys(("1", "true", "yes", "present", "positive"), 1),
}


def class_names_of(features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The class names of the columns of a dataset, also of columns with lists.

    Args:
        features: of the library datasets as plain values, `Features.to_dict()`; as in the metadata
            of parquet files.
    """
    found = {}
    for column, feature in features.items():
        inner = feature
        while isinstance(inner, list) or (isinstance(inner, dict) and "feature" in inner):
            inner = inner[0] if isinstance(inner, list) else inner["feature"]
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel" and inner.get("names"):
            found[column] = tuple(map(str, inner["names"]))
    return found


def are_ids(names: Sequence[str]) -> bool:
    """Whether names say nothing but the id: LABEL_0, class 1, or 2."""
    matches = map(_NUMBERED.fullmatch, map(str.strip, names))
    return all(match and int(match[1]) == position for position, match in enumerate(matches))


def by_name(
    task: Task, column: str, names: Sequence[str], values: Sequence[Any], source: str
) -> list[Any]:
    """The labels of a column with class names, as the task knows them.

    Args:
        column: its name, for errors.
        names: the dataset's class names, by its ids.
        values: the dataset's ids; one per row, or a list of them per row.
        source: of the data, for errors.

    Returns:
        Names of the checkpoint for a task on your own data, label ids for GLUE, numbers for a
        regression and for choices. Ids stay what they are where the names of either side say no
        more than the id.

    Raises:
        UserError: a class in the data is none of the task's.
    """
    if column != task.label_column:  # one column per label
        return _translated(values, [_zero_or_one(column, name) for name in names])
    if task.kind in ("regression", "similarity"):
        known, wanted = [_or_none(float, name) for name in names], f"{task.kind} takes numbers"
    elif task.kind == "multiple-choice":
        known, wanted = _choices(task, names), "a choice is a number, a letter or a column"
    else:
        known = _classes(task, names)
        wanted = f"the model's labels are ({listed(task.label_names)})"
        if are_ids(names) and (None in known or are_ids(task.label_names)):
            return list(values)
        if are_ids(task.label_names) and all(one is None for one in known):
            return list(values)
    used = {value for row in values for value in (row if isinstance(row, list) else [row])}
    unknown = [name for value, name in enumerate(names) if value in used and known[value] is None]
    if unknown:
        raise UserError(
            f"{source} names the classes of {column} ({listed(names)}), but {wanted}: "
            f"{listed(list(map(repr, unknown)))} is unknown; give both the same names (ClassLabel "
            f"in the data, id2label in config.json), or save {column} as plain numbers, which are "
            f"taken as the model's ids."
        )
    return _translated(values, known)


def _translated(values: Sequence[Any], known: Sequence[Any]) -> list[Any]:
    """Each id replaced; None for -1, with which datasets marks a missing label."""

    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(part) for part in value]
        if not isinstance(value, int):
            return value
        if 0 <= value < len(known):
            return known[value]
        return None if value == -1 else value

    return [one(value) for value in values]


def _classes(task: Task, names: Sequence[str]) -> list[Any]:
    """The task's name (GLUE: its id) of each of the dataset's names; None if there is none."""
    find = id_finder(task.label_names)
    ids = [find(name) for name in names]
    if None in ids:
        ids = [_found(task.label_names, name) if one is None else one
               for one, name in zip(ids, names, strict=True)]  # fmt: skip
    ids = [one if ids.count(one) == 1 else None for one in ids]
    if task.name not in OWN_DATA:
        return ids
    return [None if one is None else task.label_names[one] for one in ids]


def _found(known: Sequence[str], name: str) -> int | None:
    """The only one of the known names that means the same: a plural, or a synonym."""
    for same in (is_plural, same_class):
        ids = [number for number, one in enumerate(known) if same(one, name)]
        if len(ids) == 1:
            return ids[0]
    return None


def _choices(task: Task, names: Sequence[str]) -> list[Any]:
    """The number of the choice that each name means: 0, 1, ...; 1, 2, ...; A, B, ...; a column."""
    numbers = [_or_none(int, name) for name in names]
    if None not in numbers:
        first = 1 if min(numbers) == 1 else 0
        return [number - first for number in numbers]
    columns = choice_columns(task.text_columns)
    known = {name: number for number, name in enumerate(columns)}
    letters = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    return [known.get(name, letters.get(name.strip("() .").lower())) for name in names]


def _zero_or_one(column: str, name: str) -> Any:
    """0 or 1 for yes and no, and for toxic and not_toxic of the column toxic; else the name."""
    form = name.strip().casefold()
    if form == column.casefold():
        return 1
    if re.fullmatch(rf"(not?|non)[\s_-]*{re.escape(column.casefold())}", form):
        return 0
    return _MEANINGS.get(form, name)


def _or_none(number: Callable[[str], Any], text: str) -> Any:
    try:
        return number(text)
    except ValueError:
        return None
