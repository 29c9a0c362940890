"""The figure of several runs: score and divergence against the share that each keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rfprune.report.figures import (
    COLOURS,
    WIDTH_INCHES,
    FigureSpec,
    joined,
    legend_above,
    literal,
    scale_axis,
)
from rfprune.report.report_json import Report
from rfprune.report.summary import METRIC_NAMES, kept_ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SERIES_COLOURS = tuple(COLOURS[name] for name in ("heads", "neurons", "ink", "muted"))
_MARKERS = "osD^vPX*"


def frontier(runs: Sequence[tuple[str, Report]]) -> FigureSpec | None:
    """Score and divergence of named runs on one task; one line per model and method."""
    runs = [(name, report) for name, report in runs if report["pruned"]["score"] is not None]
    if not runs:
        return None
    reports = [report for _, report in sorted(runs, key=lambda run: -kept_ratio(run[1]))]
    series = _series(reports)
    metric, task = reports[0]["metric_name"], reports[0]["task"]
    better = "higher" if reports[0].get("higher_is_better", True) else "lower"
    texts = joined(
        f"{metric} {report['pruned']['score']:.2f} with {100 * kept_ratio(report):.3g}% kept "
        f"({label})"
        for label, own in series.items()
        for report in own
    )

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True)
        _draw(above, below, series)
        above.set_title(f"{literal(metric)} (dotted: the original)")
        below.set_title("divergence from the original")
        below.set_xlabel(f"{_cost_name(reports)} kept (%)")
        scale_axis(below, [report["divergence"] or 0.0 for report in reports])
        legend_above(figure, above)

    return FigureSpec(
        f"frontier-{task}",
        f"Score by size: {task}",
        f"Line charts of {metric} and divergence against the share kept: {texts}.",
        f"Smaller models are on the left. A {better} {metric} and a lower divergence are better.",
        (WIDTH_INCHES, 4.2 + 0.2 * (len(series) - 1)),
        draw,
    )


def _series(reports: Sequence[Report]) -> dict[str, list[Report]]:
    """Runs that share a line: the same model, method, metric and seed."""
    series: dict[str, list[Report]] = {}
    for report in reports:
        name = f"{report['model'].rstrip('/').rsplit('/', 1)[-1]}, {report['method']}"
        if len({other["metric"] for other in reports}) > 1:
            name += f", {METRIC_NAMES.get(report['metric'], report['metric'])}"
        if len({other["seed"] for other in reports}) > 1:
            name += f", seed {report['seed']}"
        series.setdefault(name, []).append(report)
    return series


def _cost_name(reports: Sequence[Report]) -> str:
    metrics = {report["metric"] for report in reports}
    only = metrics.pop()
    return METRIC_NAMES.get(only, only) if not metrics else "cost"


def _draw(above: Axes, below: Axes, series: dict[str, list[Report]]) -> None:
    for index, (label, own) in enumerate(series.items()):
        look: dict[str, Any] = {
            "color": _SERIES_COLOURS[index % len(_SERIES_COLOURS)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "markersize": 5,
        }
        scores = [(100 * kept_ratio(report), report["pruned"]["score"]) for report in own]
        above.plot(*zip(*scores, strict=True), label=literal(label), **look)
        distances = [(100 * kept_ratio(report), report["divergence"]) for report in own]
        distances = [
            (share, value) for share, value in distances if value
        ]  # a logarithmic axis cannot show 0
        if distances:
            below.plot(*zip(*distances, strict=True), **look)
    originals = {report["original"]["score"] for own in series.values() for report in own}
    for score in originals - {None}:
        above.axhline(score, color=COLOURS["muted"], linestyle=":")
