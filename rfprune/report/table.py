"""The table a run ends with: original against pruned, drawn from the contents of report.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, Group

LOG_FILE = "log.txt"
_STAGE_ORDER = ("load", "collect", "search", "rearrange", "compact", "tune", "evaluate")


def render(report: Mapping[str, Any]) -> Group:
    """Table, seconds by stage, and warnings of one run."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("")
    for name in ("original", "pruned", "pruned / original"):
        table.add_column(name, justify="right")
    for row in _rows(report):
        table.add_row(*row)
    lines = [f"Seconds: {_seconds(report['seconds'])}"]
    if report["divergence"] is not None:
        lines.insert(0, f"{_divergence_name(report)}: {report['divergence']:.4f}")
    lines += [f"Warning: {warning}" for warning in report["warnings"]]
    return Group(Text(_title(report), style="bold"), table, *(Text(line) for line in lines))


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Show one run on the screen, and how to load what it made."""
    console.print(render(report))
    console.print("Load it, with no need of rfprune:")
    console.print(f"  {reload_line(report)}", style="bold", soft_wrap=True, highlight=False)


def reload_line(report: Mapping[str, Any]) -> str:
    """The one line that loads the pruned model."""
    head = "QuestionAnswering" if "squad" in report["task"] else "SequenceClassification"
    return (
        f'transformers.AutoModelFor{head}.from_pretrained("{report["output_dir"]}", '
        f"trust_remote_code=True)"
    )


def write_log(report: Mapping[str, Any], folder: Path) -> Path:
    """Write the command and what it showed to folder/log.txt."""
    from rich.console import Console

    path = folder / LOG_FILE
    with path.open("w", encoding="utf-8") as file:
        console = Console(file=file, width=100, color_system=None)
        console.print(f"$ {report['command']}", soft_wrap=True, highlight=False, markup=False)
        print_report(report, console)
    return path


def _title(report: Mapping[str, Any]) -> str:
    return (
        f"{report['model']} on {report['task']}, {report['constraint']:.0%} of its "
        f"{_METRIC_NAMES[report['metric']]} ({report['method']}, {report['samples']} samples)"
    )


_METRIC_NAMES = {"mac": "MACs", "params": "parameters", "latency": "latency"}


def _rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    original, pruned = report["original"], report["pruned"]
    conditions = report["latency"]
    size = f"{conditions['batch_size']} x {conditions['sequence_length']}"
    return [
        (
            report["metric_name"],
            _points(original["score"]),
            _points(pruned["score"]),
            _difference(original["score"], pruned["score"]),
        ),
        _costs(f"MACs ({report['mean_tokens']:.0f} tokens)", original, pruned, "macs", _count),
        _costs("parameters", original, pruned, "params", _count),
        _costs(f"weights ({report['dtype']})", original, pruned, "bytes", _megabytes),
        _costs(f"latency (batch {size})", original, pruned, "latency_ms", _milliseconds),
    ]


def _costs(
    name: str, original: Mapping[str, float], pruned: Mapping[str, float], key: str, show: Any
) -> tuple[str, str, str, str]:
    before, after = original[key], pruned[key]
    ratio = f"{after / before:.1%}"
    if key == "latency_ms":
        ratio += f" ({before / after:.2f}x faster)"
    return (name, show(before), show(after), ratio)


def _points(score: float | None) -> str:
    return "undefined" if score is None else f"{score:.2f}"


def _difference(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"{after - before:+.2f} points"


def _count(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"


def _megabytes(number: float) -> str:
    return f"{number / 1e6:.2f} MB"


def _milliseconds(number: float) -> str:
    return f"{number:.2f} ms"


def _seconds(seconds: Mapping[str, float]) -> str:
    shown = [f"{stage} {seconds[stage]:.1f}" for stage in _STAGE_ORDER if stage in seconds]
    return f"{', '.join(shown)}; pruning in all {seconds['prune_total']:.1f}"


def _divergence_name(report: Mapping[str, Any]) -> str:
    regression = report["task"] == "stsb"
    return "Mean squared difference / 2" if regression else "KL(original || pruned) an example"
