"""Several runs in one figure: what each kept, and what that cost in score and divergence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rfprune.report.figures import (
    COLOURS,
    WIDTH_INCHES,
    Report,
    Sketch,
    legend_above,
    listed,
    scale_axis,
)
from rfprune.report.table import METRIC_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SERIES_COLOURS = tuple(COLOURS[name] for name in ("heads", "neurons", "ink", "muted"))
_MARKERS = "osD^vPX*"


def frontier(runs: Sequence[tuple[str, Report]]) -> Sketch | None:
    """Score and divergence of named runs on one task against what they kept, a line a series."""
    runs = [(name, report) for name, report in runs if report["pruned"]["score"] is not None]
    if not runs:
        return None
    reports = [report for _, report in sorted(runs, key=lambda run: -kept(run[1]))]
    series = _series(reports)
    metric, task = reports[0]["metric_name"], reports[0]["task"]
    above_is_better = "higher" if reports[0].get("higher_is_better", True) else "lower"
    spoken = listed(
        f"{metric} {report['pruned']['score']:.2f} with {100 * kept(report):.3g}% kept ({label})"
        for label, own in series.items()
        for report in own
    )

    def paint(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True)
        _paint(above, below, series)
        above.set_title(f"{metric} (dotted: the original)")
        below.set_title("divergence from the original")
        below.set_xlabel(f"{_cost_name(reports)} kept (%)")
        scale_axis(below, [report["divergence"] or 0.0 for report in reports])
        legend_above(figure, above)

    return Sketch(
        f"frontier-{task}",
        f"Score against what is kept: {task}",
        f"Line charts of {metric} and divergence against the share that is kept: {spoken}.",
        f"Further left is smaller; {above_is_better} above and lower below is better.",
        (WIDTH_INCHES, 4.2 + 0.2 * (len(series) - 1)),
        paint,
    )


def kept(report: Report) -> float:
    """What was kept, as a fraction of the original by the metric of the constraint."""
    share: float = report["achieved"].get(report["metric"], report["constraint"])
    return share


def _series(reports: Sequence[Report]) -> dict[str, list[Report]]:
    """Runs that one line joins: of one model and method by one metric, averages aside."""
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


def _paint(above: Axes, below: Axes, series: dict[str, list[Report]]) -> None:
    for index, (label, own) in enumerate(series.items()):
        look: dict[str, Any] = {
            "color": _SERIES_COLOURS[index % len(_SERIES_COLOURS)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "markersize": 5,
        }
        scores = [(100 * kept(report), report["pruned"]["score"]) for report in own]
        above.plot(*zip(*scores, strict=True), label=label, **look)
        far = [(100 * kept(report), report["divergence"]) for report in own]
        far = [(share, value) for share, value in far if value]  # 0 is on no logarithmic axis
        if far:
            below.plot(*zip(*far, strict=True), **look)
    originals = {report["original"]["score"] for own in series.values() for report in own}
    for score in originals - {None}:
        above.axhline(score, color=COLOURS["muted"], linestyle=":")
