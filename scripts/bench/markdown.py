"""Markdown tables, and the marks of lines that this version cannot measure again as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from rfprune.settings import Settings
from scripts.bench.harness import Line

NO_DIGEST, OTHER_SETTINGS = "†", "‡"
_SETTINGS: set[str] = {field.name for field in dataclasses.fields(Settings)}

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
    settings = line.get("settings")
    return OTHER_SETTINGS if settings and set(settings) != _SETTINGS else NO_DIGEST


def marked(lines: Sequence[Line], make: Callable[[Mark], str]) -> str:
    """A table and the legend of its marks; a mark that all lines share stands in the legend alone.

    Args:
        make: the table, given the function that marks its cells or rows.
    """
    found = sorted({mark_of(line) for line in lines})
    if found == [""]:
        return make(lambda _: "")
    if len(found) == 1:
        return f"{make(lambda _: '')}\nAll numbers measured here are {_legend(found[0], lines)}.\n"
    text = make(lambda own: "".join(sorted({mark_of(line) for line in own})))
    legend = "; ".join(f"{mark} {_legend(mark, lines)}" for mark in found if mark)
    return f"{text}\n{legend}.\n"


def _legend(mark: str, lines: Sequence[Line]) -> str:
    if mark == NO_DIGEST:
        return "from before results recorded their code; this version may give others"
    asked: list[set[str]] = [
        set(line["settings"]) for line in lines if mark_of(line) == OTHER_SETTINGS
    ]
    removed = sorted(set.union(*asked) - _SETTINGS)
    added = sorted(name for name in _SETTINGS if not all(name in own for own in asked))
    changes = [
        f"{what} {', '.join(f'`{name}`' for name in names)}"
        for what, names in (("removed since:", removed), ("added since:", added))
        if names
    ]
    return f"from a version with other settings ({'; '.join(changes)}); this one cannot repeat them"


def device_of(line: Line) -> str:
    """The hardware of a timing, with the threads of a CPU."""
    place: Line = line.get("machine", line)
    name: str = place.get("device_name") or f"CPU of {place['cores']} cores"
    if line.get("device", "cpu") != "cpu" or "threads" not in place:
        return name
    threads = int(place["threads"])
    return f"{name}, {threads} thread" + "s" * (threads > 1)
