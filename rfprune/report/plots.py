"""The figures of runs as SVG for a page and PNG for anywhere else, from report.json alone.

Each figure (see figures.py and frontier.py) is drawn once. In the SVG the colours become CSS
variables, so that a page shows it in light and in dark, and text stays text. What a report has no
numbers for is left out.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rfprune.report.figures import COLOURS, OF_A_RUN, Sketch, kept_per_layer
from rfprune.report.frontier import frontier
from rfprune.report.search_path import search_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOTS_FOLDER = "plots"
PNG_DPI = 160
_FONT_POINTS = 9.5  # a figure is 4 inches wide, which fills a phone: text is then about 11 px high


@dataclass(frozen=True)
class Plot:
    """A figure that is ready to be shown.

    Attributes:
        name: of its PNG, without the ending.
        description: what a reader who does not see it should know, its numbers included.
        note: how to read it.
        svg: an <svg> element that fills the width it is given.
        png: in the light colours.
    """

    name: str
    title: str
    description: str
    note: str
    svg: str
    png: bytes


def draw_run(report: Mapping[str, Any]) -> tuple[Plot, ...]:
    """All figures that the report of one run has numbers for."""
    return _draw(figure(report) for figure in (search_path, *OF_A_RUN))


def draw_kept(report: Mapping[str, Any]) -> tuple[Plot, ...]:
    """The one figure that tells a run from another: what each layer keeps."""
    return _draw([kept_per_layer(report)])


def draw_frontier(reports: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[Plot, ...]:
    """Score and divergence of several named runs against what they kept, a figure a task."""
    tasks = dict.fromkeys(report["task"] for _, report in reports)
    return _draw(
        frontier([(name, report) for name, report in reports if report["task"] == task])
        for task in tasks
    )


def write_plots(plots: Iterable[Plot], folder: Path) -> None:
    """Write folder/plots/NAME.png for every plot."""
    (folder / PLOTS_FOLDER).mkdir(exist_ok=True)
    for plot in plots:
        (folder / PLOTS_FOLDER / f"{plot.name}.png").write_bytes(plot.png)


def _draw(sketches: Iterable[Sketch | None]) -> tuple[Plot, ...]:
    wanted = [sketch for sketch in sketches if sketch is not None]
    if not wanted:
        return ()
    import matplotlib as mpl

    with mpl.rc_context(_style()):
        return tuple(_plot(sketch) for sketch in wanted)


def _plot(sketch: Sketch) -> Plot:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=sketch.inches, layout="constrained")
    sketch.paint(figure)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=PNG_DPI, metadata={"Software": None})
    figure.set_layout_engine("none")  # it has its layout now
    mpl.rcParams["svg.hashsalt"] = sketch.name  # the same ids every time, and other ones per figure
    return Plot(
        sketch.name,
        sketch.title,
        sketch.description,
        sketch.note,
        _svg(figure, sketch.description),
        png.getvalue(),
    )


def _svg(figure: Figure, description: str) -> str:
    """The figure as an element of a page: no size of its own, colours and fonts of the page."""
    from markupsafe import escape

    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].rstrip()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"\s*<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
    text = text.replace("'DejaVu Sans'", "system-ui, sans-serif")  # beside symbols in a label
    head, rest = text.split(">", 1)
    head = re.sub(r" (width|height|version|xmlns:xlink)=\"[^\"]*\"", "", head)
    rest = re.sub(r"<g id=\"[^\"]*\"", "<g", rest).replace("xlink:href", "href")
    for name, colour in COLOURS.items():
        rest = rest.replace(colour, f"var(--{name}, {colour})")
    return f'{head} role="img" aria-label="{escape(description)}">{rest}'


def _style() -> Any:
    """Settings of matplotlib, whatever the user's own file says."""
    import matplotlib as mpl

    default: Any = mpl.rcParamsDefault

    ink, muted, grid = COLOURS["ink"], COLOURS["muted"], COLOURS["grid"]
    return {
        **{name: value for name, value in default.items() if name != "backend"},
        "font.family": "DejaVu Sans",
        "font.size": _FONT_POINTS,
        "axes.titlesize": _FONT_POINTS + 0.5,
        "axes.titlelocation": "left",
        "axes.titlecolor": ink,
        "axes.labelcolor": muted,
        "axes.edgecolor": grid,
        "axes.facecolor": COLOURS["paper"],
        "figure.facecolor": COLOURS["paper"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": grid,
        "grid.linewidth": 0.6,
        "xtick.color": muted,
        "ytick.color": muted,
        "legend.frameon": False,
        "legend.labelcolor": ink,
        "text.color": ink,
        "svg.fonttype": "none",
    }
