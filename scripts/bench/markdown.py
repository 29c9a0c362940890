"""Markdown tables, and the names of machines in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scripts.bench.harness import Line


def table(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def device_of(line: Line) -> str:
    """The hardware of a timing, with the threads of a CPU."""
    place: Line = line.get("machine", line)
    name: str = place.get("device_name") or f"CPU of {place['cores']} cores"
    if line.get("device", "cpu") != "cpu" or "threads" not in place:
        return name
    threads = int(place["threads"])
    return f"{name}, {threads} thread" + "s" * (threads > 1)
