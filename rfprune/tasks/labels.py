"""Labels in data, ids or names, to the label ids of a checkpoint."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rfprune.errors import UserError
from rfprune.tasks.registry import Task

SHOWN_LABELS = 10
"""How many labels an error shows."""
_LONGEST_LABEL = 40


def class_ids(task: Task, labels: Sequence[Any], source: str) -> list[int]:
    """The label id of each row of a column of label ids or names.

    Names match regardless of case and of the separators of their words. Numbers are ids, unless
    the names are numbers themselves and differ from the ids: then every number is a name.

    Raises:
        UserError: a label is missing, or not among `task.label_names`.
    """
    return [ids[0] for ids in class_ids_of_lists(task, [[label] for label in labels], source)]


def class_ids_of_lists(task: Task, lists: Sequence[Sequence[Any]], source: str) -> list[list[int]]:
    """The label ids of rows with any number of labels each; see `class_ids`."""
    find_id = id_finder(task.label_names)
    found: list[list[int]] = []
    unknown: list[tuple[int, Any]] = []
    for row, labels in enumerate(lists, start=1):
        ids = [find_id(label) for label in labels]
        if any(map(_is_missing, labels)):
            what = "is" if len(labels) == 1 else "has a label that is"
            raise UserError(
                f"{source}, row {row}: {task.label_column} {what} missing; fill or drop the row."
            )
        unknown += [(row, label) for label, one in zip(labels, ids, strict=True) if one is None]
        found.append([label_id for label_id in ids if label_id is not None])
    if unknown:
        raise _unknown(task, unknown, len(lists), source)
    return found


def label_names(labels: Sequence[Any]) -> tuple[str, ...] | None:
    """The class names in a column of labels, by id; None for numbers that are not whole.

    Missing labels are skipped.
    """
    present = [label for label in labels if not _is_missing(label)]
    numbers = {_number(label) for label in present}
    if None in numbers:
        return tuple(sorted({str(label).strip() for label in present}))
    whole = sorted(int(number) for number in numbers if number is not None and number % 1 == 0)
    if len(whole) < len(numbers):
        return None
    if whole == list(range(len(whole))):
        return tuple(f"LABEL_{label_id}" for label_id in whole)
    return tuple(str(number) for number in whole)


def id_finder(names: Sequence[str]) -> Callable[[Any], int | None]:
    """A function from a label to its id, None for unknown labels."""
    by_name = _ids_by(names, str.strip)
    by_form = _ids_by(names, _normal_form)
    numbers = {label_id: _number(name) for label_id, name in enumerate(names)}
    ids_are_known = all(number in (None, label_id) for label_id, number in numbers.items())

    def find_id(label: Any) -> int | None:
        number = _number(label)
        name = str(label).strip()
        whole = str(int(number)) if number is not None and number.is_integer() else name
        for known, text in ((by_name, name), (by_form, _normal_form(name)), (by_name, whole)):
            if text in known:
                return known[text]
        if ids_are_known and number is not None and number in numbers:
            return int(number)
        return None

    return find_id


def _ids_by(names: Sequence[str], form: Callable[[str], str]) -> Mapping[str, int]:
    """Ids by the names in a form, without forms that two names share."""
    forms = [form(name) for name in names]
    times = Counter(forms)
    return {text: label_id for label_id, text in enumerate(forms) if times[text] == 1}


def _normal_form(name: str) -> str:
    """One form for Very_Good, very good and very-good, but two for -1 and 1."""
    return re.sub(r"[\s_-]+", "_", name.strip().casefold())


def _number(label: Any) -> float | None:
    """A label as a finite number, also from its text; None if it is none."""
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
    """The error for unknown labels, given with their row numbers from 1."""
    different = list(dict.fromkeys(repr(label)[:_LONGEST_LABEL] for _, label in unknown))
    rows = list(dict.fromkeys(row for row, _ in unknown))
    known = [f"{label_id} {name}" for label_id, name in enumerate(task.label_names)]
    return UserError(
        f"{source}, row {rows[0]}: the model does not know the {task.label_column} "
        f"{listed(different)} (in {len(rows)} of {num_rows} rows): its labels are "
        f"{listed(known)}; write these ids or names, or correct id2label in its config.json."
    )


def listed(names: Sequence[str]) -> str:
    """The names, or the first ones and how many more there are."""
    more = len(names) - SHOWN_LABELS
    return ", ".join(names[:SHOWN_LABELS]) + (f" and {more} more" if more > 0 else "")
