"""report.html: one run, or several, on one self-contained page made from report.json alone.

    write_run_page(read_report(folder), folder)      # makes the page of a folder again

No network, no script; readable on a phone, in dark mode and by a screen reader.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rfprune.report.exports_table import HEADINGS, export_caption, export_lines, export_rows
from rfprune.report.figures import COLOURS
from rfprune.report.frontier import kept
from rfprune.report.layers import kind_name, kinds_of, part_of
from rfprune.report.plots import Plot, draw_frontier, draw_kept, draw_run, write_plots
from rfprune.report.promise_text import promise_lines
from rfprune.report.search_text import search_lines
from rfprune.report.table import (
    METRIC_NAMES,
    is_plain,
    reload_line,
    score_change,
    scoring,
    seconds_line,
    summary_rows,
    title,
)

PAGE_FILE = "report.html"
_TEMPLATES = Path(__file__).with_name("templates")
_DARK = {
    "ink": "#e6edf3",
    "muted": "#a5b0bc",
    "grid": "#343c46",
    "paper": "#11151a",
    "heads": "#6aa5f5",
    "cross_heads": "#3fb98f",
    "neurons": "#ee9150",
    "removed": "#2a313a",
}

Report = Mapping[str, Any]


def write_run_page(report: Report, folder: Path) -> tuple[Plot, ...]:
    """Write folder/report.html and folder/plots/*.png of one run; gives the plots."""
    plots = draw_run(report)
    write_plots(plots, folder)
    (folder / PAGE_FILE).write_text(render_run(report, plots), encoding="utf-8")
    return plots


def write_runs_page(
    runs: Sequence[tuple[str, Report]], path: Path, heading: str, *, folders: Sequence[Path] = ()
) -> None:
    """Write a page of several named runs, in one step, and beside it a PNG a task.

    Args:
        folders: of the runs, which the page links to.
    """
    plots = draw_frontier(runs)
    for plot in plots:
        path.with_name(f"{path.stem}-{plot.name}.png").write_bytes(plot.png)
    links = [_link(folder / PAGE_FILE, path.parent) for folder in folders]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_text(render_runs(runs, plots, heading, links), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def render_run(report: Report, plots: Sequence[Plot]) -> str:
    """The page of one run."""
    return _render(
        "run.html.jinja",
        title=title(report),
        report=report,
        plots=plots,
        tiles=_tiles(report),
        rows=[[_together(cell) for cell in row] for row in summary_rows(report)],
        scoring=scoring(report),
        search=[*promise_lines(report), *search_lines(report)],
        seconds=seconds_line(report["seconds"]),
        exports=export_rows(report),
        exports_label=export_caption(report),
        export_headings=HEADINGS,
        export_lines=export_lines(report),
        is_plain=is_plain(report),
        with_code=reload_line(report),
        without_code=f"rfprune.load_pruned({json.dumps(report['output_dir'], ensure_ascii=False)})",
        layers=_layers(report),
        kinds=[kind_name(report, kind) for kind in kinds_of(report)],
        settings=_settings(report),
    )


def render_runs(
    runs: Sequence[tuple[str, Report]],
    plots: Sequence[Plot],
    heading: str,
    links: Sequence[str] = (),
) -> str:
    """The page of several named runs: a table and a figure a task."""
    tasks = dict.fromkeys(report["task"] for _, report in runs)
    tables = []
    for task in tasks:
        own = [(name, report) for name, report in runs if report["task"] == task]
        tables.append((f"Runs on {task}", _columns(own), [_row(*run) for run in own]))
    links = links or [""] * len(runs)
    return _render(
        "runs.html.jinja",
        title=heading,
        warnings=_not_comparable(runs),
        tables=tables,
        plots=plots,
        kept=[(name, plot) for name, report in runs for plot in draw_kept(report)],
        commands=[
            (name, link, report["command"])
            for (name, report), link in zip(runs, links, strict=True)
        ],
    )


def _render(template: str, **values: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template)
    return page.render(light=COLOURS, dark=_DARK, version=version("rfprune"), **values) + "\n"


def _together(cell: str) -> str:
    """A number stays on one line with its unit."""
    return re.sub(r"(?<=\d) (?=(?:G|M|k|MB|ms)\b)", "\N{NO-BREAK SPACE}", cell)


def _tiles(report: Report) -> list[tuple[str, str]]:
    """What a reader wants to know first."""
    before, after, achieved = report["original"], report["pruned"], report["achieved"]
    tiles = []
    if before["score"] is not None and after["score"] is not None:
        change = score_change(report, before["score"], after["score"])
        tiles.append((change, f"{report['metric_name']}, now {after['score']:.2f}"))
    tiles.append((f"{achieved['mac']:.1%}", "of the multiply-accumulates"))
    tiles.append((f"{after['bytes'] / before['bytes']:.1%}", "of the bytes of weights"))
    tiles.append((f"{before['latency_ms'] / after['latency_ms']:.2f}x", "as fast, measured"))
    return tiles


def _layers(report: Report) -> list[tuple[str, ...]]:
    """A row a layer: its name, and the units of every kind that it keeps."""
    before = report.get("original_layers") or [{}] * len(report["layers"])
    rows = []
    for place, (after, had) in enumerate(zip(report["layers"], before, strict=True)):
        cells = [_of(after, had, kind) for kind in kinds_of(report)]
        rows.append((part_of(report, place).called(place), *cells))
    return rows


def _of(after: Mapping[str, int], had: Mapping[str, int], kind: str) -> str:
    if kind not in after:
        return "\N{EN DASH}"
    return f"{after[kind]} of {had[kind]}" if kind in had else f"{after[kind]}"


def _settings(report: Report) -> list[tuple[str, str]]:
    rows = [
        (name, str(report[name]))
        for name in ("source", "task", "metric", "constraint", "samples", "device", "dtype")
    ]
    rows += [(name, str(value)) for name, value in report["settings"].items()]
    conditions = report["latency"]
    rows.append(("latency: batch x length", f"{conditions['batch_size']} x "
                 f"{conditions['sequence_length']}"))  # fmt: skip
    if "threads" in conditions:
        rows.append(
            ("latency: threads, rounds", f"{conditions['threads']}, {conditions['rounds']}")
        )
    return rows + list(report["versions"].items())


def _columns(runs: Sequence[tuple[str, Report]]) -> list[str]:
    metric = runs[0][1]["metric_name"]
    return [
        *("run", f"{metric}", "change", "divergence", "kept", "MACs", "parameters", "weights"),
        *("speedup", "pruning"),
    ]


def _row(name: str, report: Report) -> list[str]:
    before, after, achieved = report["original"], report["pruned"], report["achieved"]
    far = report["divergence"]
    return [
        name,
        f"{after['score']:.2f}" if after["score"] is not None else "undefined",
        score_change(report, before["score"], after["score"]).removesuffix(" points"),
        "" if far is None else f"{far:.4f}",
        f"{kept(report):.1%} of {METRIC_NAMES.get(report['metric'], report['metric'])}",
        f"{achieved['mac']:.1%}",
        f"{achieved['params']:.1%}",
        f"{after['bytes'] / 1e6:.2f} MB",
        f"{before['latency_ms'] / after['latency_ms']:.2f}x",
        f"{report['seconds']['prune_total']:.1f} s",
    ]


def _not_comparable(runs: Sequence[tuple[str, Report]]) -> list[str]:
    """What keeps runs on one task from being compared fairly."""
    warnings = []
    for task in dict.fromkeys(report["task"] for _, report in runs):
        own = [report for _, report in runs if report["task"] == task]
        differing = {
            "numbers of validation examples": {r["evaluated_examples"] for r in own},
            "devices": {r["device"] for r in own},
            "shapes of the timed batch": {
                (r["latency"]["batch_size"], r["latency"]["sequence_length"]) for r in own
            },
        }
        warnings += [
            f"the runs on {task} have different {what}." for what, seen in differing.items()
            if len(seen) > 1
        ]  # fmt: skip
    return warnings


def _link(page: Path, start: Path) -> str:
    """A relative link, so that the folders can be moved together."""
    from urllib.parse import quote

    return quote(Path(os.path.relpath(page, start)).as_posix())
