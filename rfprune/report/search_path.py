"""The path of the search of `--max-drop`: score and divergence of every size that was tried."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rfprune.report.figures import COLOURS, WIDTH_INCHES, Report, Sketch, listed, scale_axis
from rfprune.report.search_text import shown_points, trial_line
from rfprune.report.table import METRIC_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def search_path(report: Report) -> Sketch | None:
    """What `--max-drop` tried, numbered in its order."""
    found = report.get("max_drop")
    if not found:
        return None
    path, metric = found["path"], report["metric_name"]
    allowed = report["original"]["score"] - found["points"]

    def paint(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True)
        for axis, key in ((above, "score"), (below, "divergence")):
            _paint(axis, report, key)
        above.axhline(allowed, color=COLOURS["muted"], linestyle=":")
        above.set_title(f"{metric} (dotted: {shown_points(found['points'])} below the original)")
        below.set_title("divergence from the original (calibration)")
        below.set_xlabel(f"{METRIC_NAMES[report['metric']]} kept (%)")
        scale_axis(below, [trial["divergence"] for trial in path])

    spoken = listed(f"{number}. {trial_line(trial)}" for number, trial in enumerate(path, 1))
    return Sketch(
        "search",
        "The search for the smallest model",
        f"Scatter charts of {metric} and divergence against the share that is kept: {spoken}; "
        f"chosen: {100 * report['constraint']:.6g}%, since at most {shown_points(found['points'])} "
        f"may be lost.",
        "Numbers give the order in which sizes were tried; the filled one was chosen.",
        (WIDTH_INCHES, 4.0),
        paint,
    )


def _paint(axis: Axes, report: Report, key: str) -> None:
    path = report["max_drop"]["path"]
    by_size = sorted(path, key=lambda trial: float(trial["ratio"]))
    shares = [100 * trial["ratio"] for trial in by_size]
    values = [trial[key] for trial in by_size]
    axis.plot(shares, values, color=COLOURS["grid"], linewidth=1.0, zorder=1)
    for number, trial in enumerate(path, 1):
        place = (100 * trial["ratio"], trial[key])
        chosen = trial["ratio"] == report["constraint"]
        axis.plot(
            *place,
            "o",
            color=COLOURS["heads"],
            markerfacecolor=COLOURS["heads" if chosen else "paper"],
            markersize=7,
        )
        axis.annotate(str(number), place, xytext=(6, 5), textcoords="offset points")
    axis.margins(x=0.1, y=0.2)
