"""What there is to see of runs: each function reads reports and says what to draw, or None.

A sketch holds title, description and a `paint` that puts it on a matplotlib figure; plots.py turns
it into files. Colours are told apart by the colour-blind, and a hatch, a marker or a place says the
same again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rfprune.report.layers import Part, kind_name, kinds_of, number_layers, part_of, parts_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "ink": "#1f2328",
    "muted": "#59636e",
    "grid": "#d0d7de",
    "paper": "#ffffff",
    "heads": "#2f6fd0",
    "cross_heads": "#12805c",
    "neurons": "#c2571a",
    "removed": "#e1e5ea",
}
"""Colours in light by the name of the CSS variable that the page redefines in dark."""

_EDGE_COLOURS = ("#3b7dd8", "#d2622a")
"""First and last layer; they and what is between them show on white and on black alike."""

_MARKERS = {"heads": "o", "cross_heads": "D", "neurons": "s"}
_PANEL_COLOURS = ("heads", "neurons")
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
    """The units of every kind that every layer keeps, over what it had."""
    layers, before = report["layers"], report.get("original_layers")
    if not layers:
        return None
    kinds = kinds_of(report)

    def paint(figure: Figure) -> None:
        axes = figure.subplots(len(kinds), 1, sharex=True)
        for axis, kind in zip(axes, kinds, strict=True):
            for counts, colour in ((before or [], "removed"), (layers, kind)):
                own = {place: layer[kind] for place, layer in enumerate(counts) if kind in layer}
                axis.bar(list(own), list(own.values()), color=COLOURS[colour], width=0.8)
            axis.set_title(f"{kind_name(report, kind)} kept")
            axis.grid(axis="x", visible=False)
            number_layers(axis, report, COLOURS["muted"])
            axis.label_outer()

    note = "Layer 0 is next to the embeddings."
    if before:
        note += " The pale part of a bar was removed."
    spoken = [_spoken_counts(report, kind, part) for kind in kinds for part in parts_of(report)]
    return Sketch(
        "kept",
        "Heads and neurons kept",
        f"Bar charts, {'; '.join(filter(None, spoken))}.",
        note,
        (WIDTH_INCHES, 0.4 + 1.7 * len(kinds)),
        paint,
    )


def _spoken_counts(report: Report, kind: str, part: Part) -> str:
    """What the layers of a part keep, for a description; nothing where they have no such units."""
    counts = part.having(report["layers"], kind)
    if not counts:
        return ""
    before = report.get("original_layers")
    whole = f", of {_of(part.having(before, kind))}" if before else ""
    places = f"{part.name} layer 0 to layer {len(part.layers) - 1}".lstrip()
    return f"{kind_name(report, kind)} kept from {places}: {listed(counts)}{whole}"


def importance_by_depth(report: Report) -> Sketch | None:
    """What removing a whole sublayer would cost, from the first layer to the last."""
    kinds = kinds_of(report)
    costs = {kind: _costs(report, kind) for kind in kinds}
    if not any(costs.values()):
        return None
    spoken = [
        f"{kind_name(report, kind)}: {listed(f'{cost:.3g}' for _, cost in own)}"
        for kind, own in costs.items()
        if own
    ]

    def paint(figure: Figure) -> None:
        axis = figure.subplots()
        for kind in kinds:
            label: str | None = kind_name(report, kind)
            for part in parts_of(report):  # no line leads from the encoder's end to the decoder
                points = [point for point in costs[kind] if point[0] in part.layers]
                if points:
                    colour, marker = COLOURS[kind], _MARKERS[kind]
                    places, own = zip(*points, strict=True)
                    axis.plot(places, own, color=colour, marker=marker, ms=4.5, label=label)
                    label = None
        number_layers(axis, report, COLOURS["muted"])
        scale_axis(axis, [cost for own in costs.values() for _, cost in own])
        axis.set_ylabel(_error_name(report))
        legend_above(figure, axis)

    names = [kind_name(report, kind) for kind in kinds]
    return Sketch(
        "importance",
        "Importance against depth",
        f"Line chart of what removing all units of a sublayer would cost, first to last layer; "
        f"{'; '.join(spoken)}.",
        f"What it would cost to remove all {', or all '.join(names)}, of a layer.",
        (WIDTH_INCHES, 2.9),
        paint,
    )


def _costs(report: Report, kind: str) -> list[tuple[int, float]]:
    """Layers that have such units, and the error of keeping none of these."""
    curves = report.get("curves") or ()
    return [(curve["layer"], curve["errors"][0]) for curve in curves if curve["kind"] == kind]


def error_curves(report: Report) -> Sketch | None:
    """Every block's error against what it keeps, with the point that was chosen."""
    curves = report.get("curves") or ()
    kinds = [kind for kind in kinds_of(report) if any(curve["kind"] == kind for curve in curves)]
    if not kinds:
        return None
    spoken = []
    for kind in kinds:
        shares = [
            f"{curve['kept'] / curve['units'][-1]:.0%}" for curve in curves if curve["kind"] == kind
        ]
        name = kind_name(report, kind)
        spoken.append(f"share of {name} chosen to stay, first to last layer: {listed(shares)}")

    def paint(figure: Figure) -> None:
        axes = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
        for axis, kind in zip(axes, kinds, strict=True):
            own = [curve for curve in curves if curve["kind"] == kind]
            for curve in own:
                _paint_curve(axis, curve, part_of(report, curve["layer"]))
            axis.set_title(kind_name(report, kind))
            axis.set_ylabel(_error_name(report))
            scale_axis(axis, [error for curve in own for error in curve["errors"]])
        axes[-1].set_xlabel("kept (%)")
        legend_above(figure, axes[0])

    dashed = " A decoder's are dashed." if len(parts_of(report)) > 1 else ""
    return Sketch(
        "curves",
        "Error curves and the chosen points",
        f"Line charts, a curve per layer, of the error against the share of units kept; dots are "
        f"the chosen points; {'; '.join(spoken)}.",
        f"Each curve says what a sublayer loses by keeping less; the dots are what was chosen."
        f"{dashed}",
        (WIDTH_INCHES, 2.0 + 1.7 * len(kinds)),
        paint,
    )


def _paint_curve(axis: Axes, curve: Mapping[str, Any], part: Part) -> None:
    """Zero errors have no place on a logarithmic axis."""
    place, ends = curve["layer"], (part.layers[0], part.layers[-1])
    depth = (place - ends[0]) / max(ends[1] - ends[0], 1)
    colour = _between(*_EDGE_COLOURS, depth)
    name = part.called(place)
    label = (name if part.name else f"layer {name}") if place in ends else None
    total = curve["units"][-1]
    errors_of = dict(zip(curve["units"], curve["errors"], strict=True))
    points = [(100 * units / total, error) for units, error in errors_of.items()]
    shown = [(share, error) for share, error in points if error > 0]
    if not shown:
        return
    shares, errors = zip(*shown, strict=True)
    style = "--" if part.name == "decoder" else "-"
    axis.plot(shares, errors, color=colour, linewidth=1.2, linestyle=style, label=label)
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
        for axis, (title, values, form), kind in zip(axes, panels, _PANEL_COLOURS, strict=False):
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


def _of(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else listed(counts)


def _error_name(report: Report) -> str:
    return "importance lost" if report["method"] == "kwon" else "error (loss)"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 0.1 else f"{1000 * value:.0f} ms"


def _between(first: str, last: str, share: float) -> str:
    """A colour on the straight way from one to the other."""
    pairs = [(int(first[i : i + 2], 16), int(last[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)
