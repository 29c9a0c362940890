"""The table that a run prints at its end, and log.txt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rfprune.report.layers import removed_layers
from rfprune.report.report_json import Report
from rfprune.report.summary import (
    EXPORT_HEADINGS,
    SUMMARY_HEADINGS,
    continuation_lines,
    export_caption,
    export_lines,
    export_rows,
    is_plain,
    latency_lines,
    max_drop_lines,
    reload_line,
    scoring_line,
    seconds_line,
    sparsity_lines,
    summary_rows,
    title,
    vocabulary_lines,
)

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

LOG_FILE = "log.txt"
LOG_WIDTH = 100


def render(report: Report) -> Group:
    """The original beside the pruned model, the time by stage, the warnings and the exports."""
    from rich.console import Group
    from rich.text import Text

    lines = [
        scoring_line(report),
        *continuation_lines(report),
        *latency_lines(report),
        *max_drop_lines(report),
        *sparsity_lines(report),
        *vocabulary_lines(report),
        seconds_line(report["seconds"], report.get("cached", ())),
        *(f"Warning: {warning}" for warning in report["warnings"]),
    ]
    parts: list[Text | Table] = [
        Text(title(report), style="bold"),
        _table(SUMMARY_HEADINGS, summary_rows(report)),
    ]
    parts += map(Text, lines)
    if rows := export_rows(report):
        parts += [Text(export_caption(report), style="bold"), _table(EXPORT_HEADINGS, rows)]
    return Group(*parts, *map(Text, export_lines(report)))


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose first column has the names and is aligned to the left."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def print_report(report: Report, console: Console) -> None:
    """Print the table of a run, and how to load the pruned model."""
    from rich.text import Text

    console.print(render(report))
    if removed := removed_layers(report):
        console.print(f"{removed[0].upper()}{removed[1:]}.", highlight=False)
    code = " and without custom code" if is_plain(report) else ""
    console.print(f"Saved; report.html has figures. To load the model without rfprune{code}:")
    console.print(Text(f"  {reload_line(report)}", style="bold"), soft_wrap=True)


def write_log(report: Report, folder: Path, messages: str = "") -> Path:
    """Write the command, the messages of the run, and its table to folder/log.txt."""
    from rich.console import Console
    from rich.text import Text

    path = folder / LOG_FILE
    with path.open("w", encoding="utf-8") as file:
        console = Console(file=file, width=LOG_WIDTH, color_system=None)
        console.print(Text(f"$ {report['command']}"), soft_wrap=True)
        file.write(messages)
        print_report(report, console)
    return path
