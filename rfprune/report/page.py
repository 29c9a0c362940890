"""report.html: a self-contained page about one run, or several, made from report.json alone.

    write_run_page(read_report(folder), folder)  # writes the page of a folder again

No network and no script; works on a phone, in dark mode and with a screen reader.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rfprune.errors import UserError
from rfprune.report.figures import COLOURS
from rfprune.report.layers import kind_name, kinds_of, removed_layers, stack_at
from rfprune.report.plots import Plot, draw_frontier, draw_kept, draw_run, write_plots
from rfprune.report.report_json import Report, read_report
from rfprune.report.summary import (
    EXPORT_HEADINGS,
    METRIC_NAMES,
    SUMMARY_HEADINGS,
    export_caption,
    export_lines,
    export_rows,
    is_plain,
    kept_ratio,
    latency_lines,
    max_drop_lines,
    percent,
    reload_line,
    score_change,
    score_text,
    scoring_line,
    seconds_line,
    sparsity_lines,
    summary_rows,
    title,
    vocabulary_lines,
)

PAGE_FILE = "report.html"
_TEMPLATES = Path(__file__).with_name("templates")
DARK_COLOURS = {
    "ink": "#e6edf3",
    "muted": "#a5b0bc",
    "grid": "#343c46",
    "paper": "#11151a",
    "heads": "#6aa5f5",
    "cross_heads": "#3fb98f",
    "neurons": "#ee9150",
    "removed": "#2a313a",
}


def write_run_page(report: Report, folder: Path) -> tuple[Plot, ...]:
    """Write folder/report.html and folder/plots/*.png of one run; returns the plots."""
    plots = draw_run(report)
    write_plots(plots, folder)
    (folder / PAGE_FILE).write_text(render_run(report, plots), encoding="utf-8")
    return plots


def write_runs_page(
    runs: Sequence[tuple[str, Report]], path: Path, heading: str, *, folders: Sequence[Path] = ()
) -> None:
    """Write a page about several named runs, and one PNG per task beside it.

    The page appears complete or not at all.

    Args:
        folders: the output folders of the runs, for links.
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


def write_family_page(folders: Sequence[Path]) -> Path | None:
    """Write a page about runs that differ only in their constraint, above their folders.

    Returns:
        The path of the page; None for a single run.

    Raises:
        UserError: the page cannot be written.
    """
    if len(folders) < 2:
        return None
    reports = [read_report(folder) for folder in folders]
    first = reports[0]
    # outputs/MODEL/TASK/METRIC-RATIO/seed-N, or DIR/METRIC-RATIO with --output-dir DIR
    depth = 1 if folders[0].name.startswith("seed-") else 0
    path = folders[0].parents[depth] / f"family-{first['metric']}-seed-{first['seed']}.html"
    heading = f"{first['model']} on {first['task']}: {len(reports)} sizes"
    runs = [(percent(report["constraint"]), report) for report in reports]
    try:
        write_runs_page(runs, path, heading, folders=folders)
    except OSError as error:
        raise UserError(
            f"The page '{path}' cannot be written ({error.strerror}), but the pruned models are "
            f"complete: free some space, then run scripts/compare.py on their folders."
        ) from error
    return path


def render_run(report: Report, plots: Sequence[Plot]) -> str:
    """The page of one run."""
    return _render(
        "run.html.jinja",
        title=title(report),
        report=report,
        plots=plots,
        tiles=_tiles(report),
        headings=SUMMARY_HEADINGS,
        rows=_fixed_rows(summary_rows(report)),
        scoring=scoring_line(report),
        search=[
            *latency_lines(report),
            *max_drop_lines(report),
            *sparsity_lines(report),
            *vocabulary_lines(report),
        ],
        seconds=seconds_line(report["seconds"]),
        exports=_fixed_rows(export_rows(report)),
        exports_caption=export_caption(report),
        export_headings=EXPORT_HEADINGS,
        export_lines=export_lines(report),
        is_plain=is_plain(report),
        with_code=reload_line(report),
        without_code=f"rfprune.load_pruned({json.dumps(report['output_dir'], ensure_ascii=False)})",
        layers=_layers(report),
        removed_layers=removed_layers(report),
        kinds=[*(kind_name(report, kind) for kind in kinds_of(report)), *_density_heading(report)],
        settings=_settings(report),
    )


def render_runs(
    runs: Sequence[tuple[str, Report]],
    plots: Sequence[Plot],
    heading: str,
    links: Sequence[str] = (),
) -> str:
    """The page of several named runs: one table and one figure per task."""
    tasks = dict.fromkeys(report["task"] for _, report in runs)
    tables = []
    for task in tasks:
        rows = [_row(name, report) for name, report in runs if report["task"] == task]
        tables.append((f"Runs on {task}", list(rows[0]), [list(row.values()) for row in rows]))
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
    return (
        page.render(light=COLOURS, dark=DARK_COLOURS, version=version("rfprune"), **values) + "\n"
    )


def _fixed_rows(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """The rows without a line break between a number and its unit."""
    pattern = r"(?<=\d) (?=(?:G|M|k|MB|ms)\b)"
    return [[re.sub(pattern, "\N{NO-BREAK SPACE}", cell) for cell in row] for row in rows]


def _tiles(report: Report) -> list[tuple[str, str]]:
    """The headline numbers, each with a short text."""
    before, after, achieved = report["original"], report["pruned"], report["achieved"]
    tiles = []
    if before["score"] is not None and after["score"] is not None:
        change = score_change(report, before["score"], after["score"])
        tiles.append((change, f"{report['metric_name']}, now {after['score']:.2f}"))
    tiles.append((f"{achieved['mac']:.1%}", "of the MACs"))
    tiles.append((f"{after['bytes'] / before['bytes']:.1%}", "of the weight bytes"))
    tiles.append((f"{before['latency_ms'] / after['latency_ms']:.2f}x", "speedup, measured"))
    return tiles


def _layers(report: Report) -> list[tuple[str, ...]]:
    """One row per layer: its name, the units it keeps of each kind, and its density."""
    before = report.get("original_layers") or [{}] * len(report["layers"])
    rows = []
    for position, (after, had) in enumerate(zip(report["layers"], before, strict=True)):
        cells = [_kept_of(after, had, kind) for kind in kinds_of(report)]
        if zeros := report.get("sparsity"):
            cells.append(f"{zeros['layers'][position]:.1%}")
        if position in report.get("removed_layers", ()):
            cells = ["removed" for _ in cells]
        rows.append((stack_at(report, position).layer_name(position), *cells))
    return rows


def _density_heading(report: Report) -> list[str]:
    """The heading of the densities in `_layers`; empty without zeros."""
    return ["weights that are not zero"] if report.get("sparsity") else []


def _kept_of(after: Mapping[str, int], had: Mapping[str, int], kind: str) -> str:
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
    shape = f"{conditions['batch_size']} x {conditions['sequence_length']}"
    rows.append(("latency: batch x length", shape))
    if "threads" in conditions:
        rows.append(
            ("latency: threads, rounds", f"{conditions['threads']}, {conditions['rounds']}")
        )
    return rows + list(report["versions"].items())


def _row(name: str, report: Report) -> dict[str, str]:
    """One run in the table of several, by heading."""
    before, after, achieved = report["original"], report["pruned"], report["achieved"]
    divergence = report["divergence"]
    return {
        "run": name,
        report["metric_name"]: score_text(after["score"]),
        "change": score_change(report, before["score"], after["score"]).removesuffix(" points"),
        "divergence": "" if divergence is None else f"{divergence:.4f}",
        "kept": f"{kept_ratio(report):.1%} of "
        f"{METRIC_NAMES.get(report['metric'], report['metric'])}",
        "MACs": f"{achieved['mac']:.1%}",
        "parameters": f"{achieved['params']:.1%}",
        "weights": f"{after['bytes'] / 1e6:.2f} MB",
        "speedup": f"{before['latency_ms'] / after['latency_ms']:.2f}x",
        "pruning": f"{report['seconds']['prune_total']:.1f} s",
    }


def _not_comparable(runs: Sequence[tuple[str, Report]]) -> list[str]:
    """Differences that make a comparison of runs on one task unfair."""
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
            f"The runs on {task} have different {name}, so their numbers are not comparable."
            for name, values in differing.items()
            if len(values) > 1
        ]
    return warnings


def _link(page: Path, start: Path) -> str:
    """A relative link, which still works after the folders were moved together."""
    from urllib.parse import quote

    return quote(Path(os.path.relpath(page, start)).as_posix())
