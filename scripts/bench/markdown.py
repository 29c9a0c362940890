"""Markdown tables, and the marks of lines that this version cannot measure again as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from rfprune.settings import Settings
from scripts.bench.harness import Line

NO_DIGEST, OTHER_SETTINGS = "†", "‡"
_SETTINGS: set[str] = {field.name for field in dataclasses.fields(Settings)}

AS_BEFORE = {
    *("importance", "allocation", "uniform", "depth", "round_to", "protect"),
    *("min_heads", "min_neurons", "rounds", "sparsity", "sparsity_criterion", "sparsity_scope"),
}
"""Settings that earlier versions lacked, and whose default does what those versions did. (The
default of `round_to` is that of `scripts.bench.models.settings_of`.) So this version repeats a line
without them. A new setting belongs here if the same holds for it."""

OFF: tuple[object, ...] = (False, None, "off", [])
"""Values with which a setting that is gone did nothing."""

Mark = Callable[[Iterable[Line]], str]
"""The marks of the lines that a cell or a row is made of."""


def table(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def mark_of(line: Line) -> str:
    """Why this version may not repeat a line, "" if it recorded its code."""
    if line.get("code"):
        return ""
    return OTHER_SETTINGS if any(_changed_settings(line)) else NO_DIGEST


def _changed_settings(line: Line) -> tuple[set[str], set[str]]:
    """Settings of a line that are gone, and today's that it had no way to choose as it did."""
    settings: dict[str, object] = line.get("settings") or dict.fromkeys(_SETTINGS)
    gone = {name for name in settings if name not in _SETTINGS and settings[name] not in OFF}
    return gone, _SETTINGS - set(settings) - AS_BEFORE


def marked(lines: Sequence[Line], make: Callable[[Mark], str]) -> str:
    """A table and the legend of its marks; a mark that all lines share stands in the legend alone.

    Args:
        make: the table, given the function that marks its cells or rows.
    """
    found = sorted({mark_of(line) for line in lines})
    if found == [""]:
        return make(lambda _: "")
    if len(found) == 1:
        return f"{make(lambda _: '')}\nAll of our numbers were {_legend(found[0], lines)}.\n"
    text = make(lambda own: "".join(sorted({mark_of(line) for line in own})))
    legend = "; ".join(f"{mark} {_legend(mark, lines)}" for mark in found if mark)
    return f"{text}\n{legend}.\n"


def _legend(mark: str, lines: Sequence[Line]) -> str:
    if mark == NO_DIGEST:
        return (
            "measured by an earlier, unrecorded version of the code; the current one may give "
            "different numbers"
        )
    changed = [_changed_settings(line) for line in lines if mark_of(line) == OTHER_SETTINGS]
    removed, added = (sorted(set.union(*each)) for each in zip(*changed, strict=True))
    changes = [
        f"{what} {', '.join(f'`{name}`' for name in names)}"
        for what, names in (("removed since:", removed), ("added since:", added))
        if names
    ]
    return (
        f"measured by a version with other settings ({'; '.join(changes)}); the current one "
        "cannot repeat them"
    )


def device_of(line: Line) -> str:
    """The hardware of a timing, with the threads of a CPU."""
    place: Line = line.get("machine", line)
    name: str = place.get("device_name") or f"CPU of {place['cores']} cores"
    if line.get("device", "cpu") != "cpu" or "threads" not in place:
        return name
    threads = int(place["threads"])
    return f"{name}, {threads} thread" + "s" * (threads > 1)
