"""Renders the figures of figures.py and frontier.py: SVG for the page, PNG files for elsewhere.

In the SVG, colours are CSS variables, for light and dark mode, and text stays text. Figures without
data in the report are left out.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rfprune.report.figures import COLOURS, RUN_FIGURES, FigureSpec, kept_per_layer
from rfprune.report.frontier import frontier
from rfprune.report.report_json import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOTS_FOLDER = "plots"
PNG_DPI = 160
_FONT_POINTS = 9.5  # about 11 px on a phone, whose width a figure of 4 inches fills


@dataclass(frozen=True)
class Plot:
    """A rendered figure; the texts are those of its `FigureSpec`.

    Attributes:
        svg: an <svg> element as wide as its container.
        png: the content of a PNG file, in light colours.
    """

    name: str
    title: str
    description: str
    note: str
    svg: str
    png: bytes


def draw_run(report: Report) -> tuple[Plot, ...]:
    """All figures that the report of one run has data for."""
    return _draw(figure(report) for figure in RUN_FIGURES)


def draw_kept(report: Report) -> tuple[Plot, ...]:
    """The figure of the units that each layer keeps."""
    return _draw([kept_per_layer(report)])


def draw_frontier(reports: Sequence[tuple[str, Report]]) -> tuple[Plot, ...]:
    """Score and divergence of several named runs against their size; one figure per task."""
    tasks = dict.fromkeys(report["task"] for _, report in reports)
    return _draw(
        frontier([(name, report) for name, report in reports if report["task"] == task])
        for task in tasks
    )


def write_plots(plots: Iterable[Plot], folder: Path) -> None:
    """Write folder/plots/NAME.png for each plot."""
    (folder / PLOTS_FOLDER).mkdir(exist_ok=True)
    for plot in plots:
        (folder / PLOTS_FOLDER / f"{plot.name}.png").write_bytes(plot.png)


def _draw(specs: Iterable[FigureSpec | None]) -> tuple[Plot, ...]:
    wanted = [spec for spec in specs if spec is not None]
    if not wanted:
        return ()
    import matplotlib as mpl

    with mpl.rc_context(_style()):
        return tuple(_plot(spec) for spec in wanted)


def _plot(spec: FigureSpec) -> Plot:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=spec.inches, layout="constrained")
    spec.draw(figure)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=PNG_DPI, metadata={"Software": None})
    figure.set_layout_engine("none")  # keep the layout of the PNG
    mpl.rcParams["svg.hashsalt"] = spec.name  # reproducible ids that differ between figures
    return Plot(
        spec.name,
        spec.title,
        spec.description,
        spec.note,
        _svg(figure, spec.description),
        png.getvalue(),
    )


def _svg(figure: Figure, description: str) -> str:
    """The figure as an element without a size, with the colours and fonts of the page."""
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
    """Settings of matplotlib that override the user's matplotlibrc."""
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
