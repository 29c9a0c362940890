"""The table a run ends with: original against pruned, drawn from the contents of report.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rfprune.report.exports_table import HEADINGS, export_caption, export_lines, export_rows
from rfprune.report.promise_text import promise_lines
from rfprune.report.search_text import search_lines
from rfprune.tasks.registry import AUTO_CLASSES

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

LOG_FILE = "log.txt"
LOG_WIDTH = 100
_PRUNING = ("collect", "search", "rearrange", "compact", "verify", "tune")
METRIC_NAMES = {"mac": "MACs", "params": "parameters", "memory": "memory", "latency": "latency"}
# SQuAD 2.0 has a dozen scores; those of its halves and thresholds are in the report alone.
_DETAILS = ("HasAns_", "NoAns_", "best_")


def render(report: Mapping[str, Any]) -> Group:
    """Table, seconds by stage, and warnings of one run."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("")
    for name in ("original", "pruned", "pruned / original"):
        table.add_column(name, justify="right")
    for row in summary_rows(report):
        table.add_row(*(Text(cell) for cell in row))
    lines = [scoring(report), *written_lines(report), *promise_lines(report)]
    lines += search_lines(report)
    lines.append(seconds_line(report["seconds"], report.get("cached", ())))
    lines += [f"Warning: {warning}" for warning in report["warnings"]]
    texts = [Text(line) for line in lines]
    return Group(Text(title(report), style="bold"), table, *texts, *_exports(report))


def _exports(report: Mapping[str, Any]) -> list[Table | Text]:
    """What `--export` added, if anything."""
    from rich.table import Table
    from rich.text import Text

    parts: list[Table | Text] = []
    if rows := export_rows(report):
        table = Table()
        for place, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if place else "left")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        parts += [Text(export_caption(report), style="bold"), table]
    return parts + [Text(line) for line in export_lines(report)]


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Show one run on the screen, and how to load what it made."""
    from rich.text import Text

    console.print(render(report))
    alone = " and without any code of its own" if is_plain(report) else ""
    console.print(f"Saved, with report.html to look at. It loads without rfprune{alone}:")
    console.print(Text(f"  {reload_line(report)}", style="bold"), soft_wrap=True)


def reload_line(report: Mapping[str, Any]) -> str:
    """The one line that loads the pruned model."""
    folder = json.dumps(report["output_dir"], ensure_ascii=False)
    code = "" if is_plain(report) else ", trust_remote_code=True"
    if is_embedder(report):
        return f"sentence_transformers.SentenceTransformer({folder}{code})"
    return f"transformers.{auto_class(report)}.from_pretrained({folder}{code})"


def auto_class(report: Mapping[str, Any]) -> str:
    """The class of transformers that loads the pruned model; reports once had no kind of task."""
    kind: Any = report.get("kind")
    if kind is None:
        kind = "question-answering" if "squad" in report["task"] else "classification"
    found: str = AUTO_CLASSES[kind]
    return found


def is_embedder(report: Mapping[str, Any]) -> bool:
    """Whether the files of sentence-transformers lie beside the pruned model."""
    return bool(report.get("embedder"))


def is_plain(report: Mapping[str, Any]) -> bool:
    """Whether the pruned model is a plain architecture, which needs no code of its own."""
    return bool(report.get("settings", {}).get("uniform"))


def write_log(report: Mapping[str, Any], folder: Path, told: str = "") -> Path:
    """Write the command, what it told on its way, and what it showed to folder/log.txt."""
    from rich.console import Console
    from rich.text import Text

    path = folder / LOG_FILE
    with path.open("w", encoding="utf-8") as file:
        console = Console(file=file, width=LOG_WIDTH, color_system=None)
        console.print(Text(f"$ {report['command']}"), soft_wrap=True)
        file.write(told)
        print_report(report, console)
    return path


def title(report: Mapping[str, Any]) -> str:
    """What was pruned, to what, and how."""
    # 0.125 is 12.5%, and 0.07 not 7.000000000000001%
    percent = f"{100 * report['constraint']:.6g}%"
    return (
        f"{report['model']} on {report['task']}, pruned to {percent} of its "
        f"{METRIC_NAMES[report['metric']]} ({_method(report)}, "
        f"{_number(report['samples'], 'calibration example')})"
    )


def _method(report: Mapping[str, Any]) -> str:
    """The method's name; of the classical criteria, which one it was."""
    if report["method"] != "importance":
        return str(report["method"])
    settings = report["settings"]
    return f"{settings['importance']} importance, {settings['allocation']} allocation"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def summary_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Name, original, pruned and their quotient or difference, as text."""
    original, pruned = report["original"], report["pruned"]
    conditions = report["latency"]
    size = f"{conditions['batch_size']} x {conditions['sequence_length']}"
    return [
        *_score_rows(report),
        _costs(f"MACs ({report['mean_tokens']:.0f} tokens)", original, pruned, "macs", _count),
        _costs("parameters", original, pruned, "params", _count),
        _costs(f"weights ({report['stored_dtype']})", original, pruned, "bytes", _megabytes),
        _costs(f"latency (batch {size})", original, pruned, "latency_ms", _milliseconds),
    ]


def _score_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The task's main score first."""
    main, scores = report["metric_name"], report["scores"]
    names = [name for name in scores["original"] if not name.startswith(_DETAILS)]
    rows = []
    for name in sorted(names, key=lambda name: name != main):
        before, after = scores["original"][name], scores["pruned"].get(name)
        rows.append((name, _points(before), _points(after), score_change(report, before, after)))
    return rows


def _costs(
    name: str,
    original: Mapping[str, float],
    pruned: Mapping[str, float],
    key: str,
    show: Callable[[float, float], str],
) -> tuple[str, str, str, str]:
    before, after = original[key], pruned[key]
    ratio = f"{after / before:.1%}"
    if key == "latency_ms":
        ratio += f" (speedup {before / after:.2f}x)"
    largest = max(before, after)
    return (name, show(before, largest), show(after, largest), ratio)


def _points(score: float | None) -> str:
    return "undefined" if score is None else f"{score:.2f}"


def score_change(report: Mapping[str, Any], before: float | None, after: float | None) -> str:
    """In points, or of what is none (a perplexity) in percent; the sum with 0.0 takes the sign from
    what rounds to -0.00."""
    if before is None or after is None:
        return ""
    if not report.get("higher_is_better", True):
        return f"{round(100 * (after / before - 1), 1) + 0.0:+.1f}%"
    return f"{round(after - before, 2) + 0.0:+.2f} points"


def _count(number: float, largest: float) -> str:
    """In the unit that suits the largest of the numbers side by side."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"


def _megabytes(number: float, _: float) -> str:
    return f"{number / 1e6:.2f} MB"


def _milliseconds(number: float, largest: float) -> str:
    """About three digits: there are no more in a measurement of time."""
    return f"{number:.{0 if largest >= 100 else 1 if largest >= 10 else 2}f} ms"


def scoring(report: Mapping[str, Any]) -> str:
    """On how much was scored, and how far the predictions have moved."""
    examples = _number(report["evaluated_examples"], "validation example")
    if report["divergence"] is None:
        return f"Scored on {examples}."
    name = "KL divergence from the original's predictions"
    if report["task"] == "stsb" or report.get("kind") == "regression":
        name = "half the mean squared difference from the original's outputs"
    if report.get("kind") == "language-modeling":
        name += ", in nats a token"
    if report.get("kind") == "similarity":
        name = "half the mean squared distance from the original's embeddings"
    return f"Scored on {examples}; {name}: {report['divergence']:.4f}."


def written_lines(report: Mapping[str, Any]) -> list[str]:
    """What language models write after the same words, for a look."""
    written = report.get("continuations") or {}
    if not written:
        return []
    return [
        f"After {written['prompt']!r}",
        f"  the original goes on {written['original']!r}",
        f"  the pruned model {written['pruned']!r}.",
    ]


def seconds_line(seconds: Mapping[str, float], cached: Collection[str] = ()) -> str:
    """Stages that were left out took exactly none; of `cached` ones only the reading took time."""
    stages = ", ".join(
        f"{name} {seconds[name]:.1f}" + " (cached)" * (name in cached)
        for name in _PRUNING
        if seconds.get(name)
    )
    known = " (the original's: cached)" if "evaluate" in cached else ""
    return (
        f"Pruning took {seconds['prune_total']:.1f} s ({stages}), besides {seconds['load']:.1f} s "
        f"of loading and {seconds['evaluate']:.1f} s of scoring{known}."
    )
