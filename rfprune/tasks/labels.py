"""Labels as people write them, ids or names, to the ids that a checkpoint gives its classes."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rfprune.errors import UserError
from rfprune.tasks.registry import Task

# Labels named in an error.
SHOWN_LABELS = 10
_LONGEST_LABEL = 40


def class_ids(task: Task, labels: Sequence[Any], source: str) -> list[int]:
    """The label id of each row of a column of ids or of names of `task.label_names`.

    Case, and what separates the words of a name, do not count. Numbers are ids, unless the names
    are numbers themselves, and others than the ids: they are names then, in every row.
    UserError for labels that are missing and for those that the model does not know.
    """
    return [ids[0] for ids in class_ids_of_lists(task, [[label] for label in labels], source)]


def class_ids_of_lists(task: Task, lists: Sequence[Sequence[Any]], source: str) -> list[list[int]]:
    """The label ids of rows of any number of labels each; as `class_ids`."""
    read = _reader(task.label_names)
    found: list[list[int]] = []
    unknown: list[tuple[int, Any]] = []
    for row, labels in enumerate(lists, start=1):
        ids = [read(label) for label in labels]
        if any(map(_is_missing, labels)):
            what = "is" if len(labels) == 1 else "has one that is"
            raise UserError(
                f"{source}, row {row}: {task.label_column} {what} missing; fill or drop the row."
            )
        unknown += [(row, label) for label, one in zip(labels, ids, strict=True) if one is None]
        found.append([label_id for label_id in ids if label_id is not None])
    if unknown:
        raise _unknown(task, unknown, len(lists), source)
    return found


def label_names(labels: Sequence[Any]) -> tuple[str, ...] | None:
    """The names of the classes in a column of labels, by id; None for numbers that are not whole.

    What is missing has no name.
    """
    there = [label for label in labels if not _is_missing(label)]
    numbers = {_number(label) for label in there}
    if None in numbers:
        return tuple(sorted({str(label).strip() for label in there}))
    whole = sorted(int(number) for number in numbers if number is not None and number % 1 == 0)
    if len(whole) < len(numbers):
        return None
    if whole == list(range(len(whole))):
        return tuple(f"LABEL_{label_id}" for label_id in whole)
    return tuple(str(number) for number in whole)


def _reader(names: Sequence[str]) -> Callable[[Any], int | None]:
    """What finds a label's id; None for a label that is neither."""
    by_name = _ids_by(names, str.strip)
    by_form = _ids_by(names, _normal_form)
    numbers = {label_id: _number(name) for label_id, name in enumerate(names)}
    ids_are_known = all(number in (None, label_id) for label_id, number in numbers.items())

    def read(label: Any) -> int | None:
        number = _number(label)
        name = str(label).strip()
        whole = str(int(number)) if number is not None and number.is_integer() else name
        for known, text in ((by_name, name), (by_form, _normal_form(name)), (by_name, whole)):
            if text in known:
                return known[text]
        if ids_are_known and number is not None and number in numbers:
            return int(number)
        return None

    return read


def _ids_by(names: Sequence[str], form: Callable[[str], str]) -> Mapping[str, int]:
    """Ids by the names in a form; without those that are the same for two of them."""
    forms = [form(name) for name in names]
    times = Counter(forms)
    return {text: label_id for label_id, text in enumerate(forms) if times[text] == 1}


def _normal_form(name: str) -> str:
    """Very_Good, very good and very-good are one name; -1 and 1 are two."""
    return re.sub(r"[\s_-]+", "_", name.strip().casefold())


def _number(label: Any) -> float | None:
    """The finite number that a label is, or that its text says."""
    try:
        number = float(label)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _is_missing(label: Any) -> bool:
    is_nan = isinstance(label, float) and math.isnan(label)
    return label is None or is_nan or (isinstance(label, str) and not label.strip())


def _unknown(
    task: Task, unknown: Sequence[tuple[int, Any]], num_rows: int, source: str
) -> UserError:
    """`unknown`: labels that the model does not know, and the numbers of their rows, from 1."""
    different = list(dict.fromkeys(repr(label)[:_LONGEST_LABEL] for _, label in unknown))
    rows = list(dict.fromkeys(row for row, _ in unknown))
    known = [f"{label_id} {name}" for label_id, name in enumerate(task.label_names)]
    return UserError(
        f"{source}, row {rows[0]}: the model does not know the {task.label_column} "
        f"{_listed(different)} (in {len(rows)} of {num_rows} rows): its labels are "
        f"{_listed(known)}; write these ids or names, or mend id2label in its config.json."
    )


def _listed(names: Sequence[str]) -> str:
    """The names, or the first ones where there are many."""
    more = len(names) - SHOWN_LABELS
    return ", ".join(names[:SHOWN_LABELS]) + (f" and {more} more" if more > 0 else "")
