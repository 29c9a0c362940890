"""What there is to see of runs: each function reads reports and says what to draw, or None.

A sketch holds title, description and a `paint` that puts it on a matplotlib figure; plots.py turns
it into files. Colours are told apart by the colour-blind, and a hatch, a marker or a place says the
same again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "ink": "#1f2328",
    "muted": "#59636e",
    "grid": "#d0d7de",
    "paper": "#ffffff",
    "heads": "#2f6fd0",
    "neurons": "#c2571a",
    "removed": "#e1e5ea",
}
"""Colours in light by the name of the CSS variable that the page redefines in dark."""

_EDGE_COLOURS = ("#3b7dd8", "#d2622a")
"""First and last layer; they and what is between them show on white and on black alike."""

_KINDS = ("heads", "neurons")
_STAGES = ("load", "collect", "search", "rearrange", "compact", "verify", "tune", "evaluate")
WIDTH_INCHES = 4.0

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Sketch:
    """What to draw, and what to say of it; see `plots.Plot`."""

    name: str
    title: str
    description: str
    note: str
    inches: tuple[float, float]
    paint: Callable[[Figure], None]


def kept_per_layer(report: Report) -> Sketch | None:
    """Heads and neurons that every layer keeps, over what it had."""
    layers, before = report["layers"], report.get("original_layers")
    if not layers:
        return None
    spoken = []
    for kind in _KINDS:
        counts = listed(layer[kind] for layer in layers)
        whole = "" if not before else f", of {_of(before, kind)}"
        spoken.append(f"{kind} kept from layer 0 to layer {len(layers) - 1}: {counts}{whole}")

    def paint(figure: Figure) -> None:
        places = range(len(layers))
        for axis, kind in zip(figure.subplots(2, 1, sharex=True), _KINDS, strict=True):
            if before:
                had = [layer[kind] for layer in before]
                axis.bar(places, had, color=COLOURS["removed"], width=0.8)
            axis.bar(places, [layer[kind] for layer in layers], color=COLOURS[kind], width=0.8)
            axis.set_title(f"{kind} kept")
            axis.grid(axis="x", visible=False)
        _number_layers(axis, len(layers))

    note = "Layer 0 is next to the embeddings."
    if before:
        note += " The pale part of a bar was removed."
    return Sketch(
        "kept",
        "Heads and neurons kept",
        f"Bar charts, {'; '.join(spoken)}.",
        note,
        (WIDTH_INCHES, 3.8),
        paint,
    )


def importance_by_depth(report: Report) -> Sketch | None:
    """What removing a whole sublayer would cost, from the first layer to the last."""
    curves = report.get("curves") or ()
    costs = {
        kind: [(curve["layer"], curve["errors"][0]) for curve in curves if curve["kind"] == kind]
        for kind in _KINDS
    }
    if not any(costs.values()):
        return None
    spoken = [
        f"{kind}: {listed(f'{cost:.3g}' for _, cost in own)}" for kind, own in costs.items() if own
    ]

    def paint(figure: Figure) -> None:
        axis = figure.subplots()
        for kind, marker in zip(_KINDS, "os", strict=True):
            if costs[kind]:
                layers, own = zip(*costs[kind], strict=True)
                axis.plot(layers, own, color=COLOURS[kind], marker=marker, ms=4.5, label=kind)
        _number_layers(axis, len(report["layers"]))
        scale_axis(axis, [cost for own in costs.values() for _, cost in own])
        axis.set_ylabel(_error_name(report))
        legend_above(figure, axis)

    return Sketch(
        "importance",
        "Importance against depth",
        f"Line chart of what removing all units of a sublayer would cost, first to last layer; "
        f"{'; '.join(spoken)}.",
        "What it would cost to remove all heads, or all neurons, of a layer.",
        (WIDTH_INCHES, 2.9),
        paint,
    )


def error_curves(report: Report) -> Sketch | None:
    """Every block's error against what it keeps, with the point that was chosen."""
    curves = report.get("curves") or ()
    kinds = [kind for kind in _KINDS if any(curve["kind"] == kind for curve in curves)]
    if not kinds:
        return None
    spoken = []
    for kind in kinds:
        shares = [
            f"{curve['kept'] / curve['units'][-1]:.0%}" for curve in curves if curve["kind"] == kind
        ]
        spoken.append(f"share of {kind} chosen to stay, first to last layer: {listed(shares)}")
    last = max(curve["layer"] for curve in curves)

    def paint(figure: Figure) -> None:
        axes = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
        for axis, kind in zip(axes, kinds, strict=True):
            own = [curve for curve in curves if curve["kind"] == kind]
            for curve in own:
                _paint_curve(axis, curve, last)
            axis.set_title(kind)
            axis.set_ylabel(_error_name(report))
            scale_axis(axis, [error for curve in own for error in curve["errors"]])
        axes[-1].set_xlabel("kept (%)")
        legend_above(figure, axes[0])

    return Sketch(
        "curves",
        "Error curves and the chosen points",
        f"Line charts, a curve per layer, of the error against the share of units kept; dots are "
        f"the chosen points; {'; '.join(spoken)}.",
        "Each curve says what a sublayer loses by keeping less; the dots are what was chosen.",
        (WIDTH_INCHES, 2.0 + 1.7 * len(kinds)),
        paint,
    )


def _paint_curve(axis: Axes, curve: Mapping[str, Any], last: int) -> None:
    """Zero errors have no place on a logarithmic axis."""
    depth = curve["layer"] / max(last, 1)
    colour = _between(*_EDGE_COLOURS, depth)
    label = f"layer {curve['layer']}" if curve["layer"] in (0, last) else None
    total = curve["units"][-1]
    errors_of = dict(zip(curve["units"], curve["errors"], strict=True))
    points = [(100 * units / total, error) for units, error in errors_of.items()]
    shown = [(share, error) for share, error in points if error > 0]
    if not shown:
        return
    shares, errors = zip(*shown, strict=True)
    axis.plot(shares, errors, color=colour, linewidth=1.2, label=label)
    chosen = errors_of.get(curve["kept"], 0.0)
    if chosen > 0:
        axis.plot(100 * curve["kept"] / total, chosen, "o", color=colour, markersize=4.5)


def stage_by_stage(report: Report) -> Sketch | None:
    """Score and divergence after every stage that was scored."""
    stages = [stage for stage in report.get("stages") or () if stage["score"] is not None]
    if len(stages) < 2:
        return None
    names = [stage["stage"] for stage in stages]
    panels = [(report["metric_name"], [stage["score"] for stage in stages], ".2f")]
    if all(stage["divergence"] is not None for stage in stages):
        name = "divergence from the original"
        panels.append((name, [stage["divergence"] for stage in stages], ".4f"))
    spoken = [
        f"{title}: "
        + listed(f"{name} {value:{form}}" for name, value in zip(names, values, strict=True))
        for title, values, form in panels
    ]

    def paint(figure: Figure) -> None:
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (title, values, form), kind in zip(axes, panels, _KINDS, strict=False):
            bars = axis.bar(names, values, color=COLOURS[kind], width=0.55)
            axis.bar_label(bars, [f"{value:{form}}" for value in values], padding=2)
            axis.margins(y=0.2)
            axis.set_title(title)
            axis.grid(axis="x", visible=False)

    return Sketch(
        "stages",
        "Stage by stage",
        f"Bar charts, {'; '.join(spoken)}.",
        "The same validation examples, scored after each stage.",
        (WIDTH_INCHES, 1.0 + 1.6 * len(panels)),
        paint,
    )


def time_by_stage(report: Report) -> Sketch | None:
    """Seconds, in the order of the work; stages that were left out are not shown."""
    seconds = report["seconds"]
    others = [name for name in seconds if name not in (*_STAGES, "prune_total")]
    names = [name for name in (*_STAGES[:-1], *others, _STAGES[-1]) if seconds.get(name)]
    if not names:
        return None
    values = [seconds[name] for name in names]

    def paint(figure: Figure) -> None:
        axis = figure.subplots()
        outside = {"load", "evaluate"}
        colours = [COLOURS["muted" if name in outside else "heads"] for name in names]
        bars = axis.barh(names, values, color=colours, height=0.7)
        axis.bar_label(bars, [_seconds(value) for value in values], padding=3)
        axis.invert_yaxis()
        axis.margins(x=0.18)
        axis.set_xlabel("seconds")
        axis.tick_params(axis="y", labelcolor=COLOURS["ink"], length=0)
        axis.grid(axis="y", visible=False)

    spoken = listed(f"{name} {_seconds(seconds[name])}" for name in names)
    return Sketch(
        "seconds",
        "Time by stage",
        f"Bar chart: {spoken}.",
        f"Pruning took {_seconds(seconds['prune_total'])} in all. Loading and scoring, in grey, "
        f"are not part of it.",
        (WIDTH_INCHES, 0.8 + 0.3 * len(names)),
        paint,
    )


def latency_promise(report: Report) -> Sketch | None:
    """The latency that was promised and predicted beside the one that was measured."""
    names = ("promised", "predicted", "measured")
    found = report.get("promise") or {}
    bars = [(name, found[f"{name}_ms"]) for name in names if found.get(f"{name}_ms")]
    if len(bars) < 2:
        return None
    spoken = listed(f"{name} {value:.3g} ms" for name, value in bars)

    def paint(figure: Figure) -> None:
        axis = figure.subplots()
        labels, values = zip(*bars, strict=True)
        drawn = axis.barh(labels, values, color=COLOURS["heads"], height=0.6)
        axis.bar_label(drawn, [f"{value:.3g} ms" for value in values], padding=3)
        axis.axvline(report["original"]["latency_ms"], color=COLOURS["muted"], linestyle=":")
        axis.invert_yaxis()
        axis.margins(x=0.2)
        axis.set_xlabel("milliseconds (dotted: the original)")
        axis.tick_params(axis="y", labelcolor=COLOURS["ink"], length=0)
        axis.grid(axis="y", visible=False)

    return Sketch(
        "latency",
        "Latency: promised, predicted, measured",
        f"Bar chart: {spoken}; the original takes {report['original']['latency_ms']:.3g} ms.",
        "Predicted from the table of this machine; measured on the pruned model itself.",
        (WIDTH_INCHES, 1.9),
        paint,
    )


OF_A_RUN = (
    kept_per_layer,
    importance_by_depth,
    error_curves,
    stage_by_stage,
    time_by_stage,
    latency_promise,
)


def listed(values: Iterable[object]) -> str:
    """For a description: 1, 2, 3."""
    return ", ".join(str(value) for value in values)


def scale_axis(axis: Axes, values: Sequence[float]) -> None:
    """Logarithmic where values differ by more than a page can show."""
    positive = [value for value in values if value > 0]
    if positive and max(positive) > 30 * min(positive):
        axis.set_yscale("log")
        axis.set_ylim(bottom=max(0.6 * min(positive), max(positive) * 1e-5))
    else:
        axis.set_ylim(bottom=0)


def legend_above(figure: Figure, axis: Axes) -> None:
    """One legend outside of the axes, where it hides nothing."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=2)


def _of(before: Sequence[Mapping[str, int]], kind: str) -> str:
    counts = [layer[kind] for layer in before]
    return str(counts[0]) if len(set(counts)) == 1 else listed(counts)


def _number_layers(axis: Axes, count: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("layer")
    axis.set_xlim(-0.6, count - 0.4)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))


def _error_name(report: Report) -> str:
    return "importance lost" if report["method"] == "kwon" else "error (loss)"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 0.1 else f"{1000 * value:.0f} ms"


def _between(first: str, last: str, share: float) -> str:
    """A colour on the straight way from one to the other."""
    pairs = [(int(first[i : i + 2], 16), int(last[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)
