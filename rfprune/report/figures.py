"""The figures of one run: each function reads the report and describes one figure, or gives None.

A `FigureSpec` has the texts and a function that draws on a matplotlib figure; plots.py renders it.
Colours are safe for colour-blind readers, and markers, line styles or positions repeat them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rfprune.report.layers import Stack, kind_name, kinds_of, stack_at, stacks_of
from rfprune.report.report_json import STAGES, Report
from rfprune.report.summary import METRIC_NAMES, percent, points_text, trial_line, tried_size

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
"""Light colours by the name of the CSS variable that the page redefines for dark mode."""

_EDGE_COLOURS = ("#3b7dd8", "#d2622a")
"""First and last layer; these and the colours between them are visible on white and on black."""

_MARKERS = {"heads": "o", "cross_heads": "D", "neurons": "s"}
_PANEL_COLOURS = ("heads", "neurons")
_STAGES = ("load", *STAGES, "evaluate")
_MAX_TICKS = 12  # more layer numbers overlap on a phone
WIDTH_INCHES = 4.0


@dataclass(frozen=True)
class FigureSpec:
    """A figure that is not drawn yet.

    Attributes:
        name: file name of its PNG, without the suffix.
        title: heading above the figure.
        description: the content in words and numbers, for screen readers.
        note: one sentence below the figure: how to read it.
        inches: width and height.
        draw: draws on an empty matplotlib figure.
    """

    name: str
    title: str
    description: str
    note: str
    inches: tuple[float, float]
    draw: Callable[[Figure], None]


def max_drop_figure(report: Report) -> FigureSpec | None:
    """Score and divergence of every size that `--max-drop` tried, numbered in the order tried."""
    search = report.get("max_drop")
    if not search:
        return None
    path, metric = search["path"], report["metric_name"]
    limit = report["original"]["score"] - search["points"]
    allowed = points_text(search["points"])

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True)
        for axis, key in ((above, "score"), (below, "divergence")):
            _draw_trials(axis, report, key)
        above.axhline(limit, color=COLOURS["muted"], linestyle=":")
        above.set_title(f"{literal(metric)} (dotted: {allowed} below the original)")
        below.set_title("divergence from the original (calibration data)")
        below.set_xlabel(f"{METRIC_NAMES[report['metric']]} kept (%)")
        scale_axis(below, [trial["divergence"] for trial in path])

    chosen = next(tried_size(one) for one in path if one["ratio"] == report["constraint"])
    trials = joined(f"{number}. {trial_line(trial)}" for number, trial in enumerate(path, 1))
    return FigureSpec(
        "search",
        "Search for the smallest model",
        f"Scatter charts of {metric} and divergence against the share kept: {trials}; chosen: "
        f"{percent(chosen)}, with a limit of {allowed} lost.",
        "The numbers give the order of the trials; the filled marker is the chosen size.",
        (WIDTH_INCHES, 4.0),
        draw,
    )


def _draw_trials(axis: Axes, report: Report, key: str) -> None:
    path = report["max_drop"]["path"]
    by_size = sorted(path, key=tried_size)
    shares = [100 * tried_size(trial) for trial in by_size]
    values = [trial[key] for trial in by_size]
    axis.plot(shares, values, color=COLOURS["grid"], linewidth=1.0, zorder=1)
    for number, trial in enumerate(path, 1):
        point = (100 * tried_size(trial), trial[key])
        is_chosen = trial["ratio"] == report["constraint"]
        axis.plot(
            *point,
            "o",
            color=COLOURS["heads"],
            markerfacecolor=COLOURS["heads" if is_chosen else "paper"],
            markersize=7,
        )
        axis.annotate(str(number), point, xytext=(6, 5), textcoords="offset points")
    axis.margins(x=0.1, y=0.2)


def kept_per_layer(report: Report) -> FigureSpec | None:
    """The units that each layer keeps, on top of the units it had."""
    layers, before = report["layers"], report.get("original_layers")
    if not layers:
        return None
    kinds = kinds_of(report)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(kinds), 1, sharex=True)
        for axis, kind in zip(axes, kinds, strict=True):
            for counts, colour in ((before or [], "removed"), (layers, kind)):
                own = {index: layer[kind] for index, layer in enumerate(counts) if kind in layer}
                axis.bar(list(own), list(own.values()), color=COLOURS[colour], width=0.8)
            axis.set_title(f"{kind_name(report, kind)} kept")
            axis.grid(axis="x", visible=False)
            number_layers(axis, report, COLOURS["muted"])
            axis.label_outer()

    note = "Layer 0 is next to the embeddings."
    if before:
        note += " The pale part of a bar was removed."
    counts = [_counts_text(report, kind, stack) for kind in kinds for stack in stacks_of(report)]
    return FigureSpec(
        "kept",
        "Heads and neurons kept",
        f"Bar charts, {'; '.join(filter(None, counts))}.",
        note,
        (WIDTH_INCHES, 0.4 + 1.7 * len(kinds)),
        draw,
    )


def _counts_text(report: Report, kind: str, stack: Stack) -> str:
    """The units that the layers of a stack keep; empty if they have none of that kind."""
    counts = stack.counts(report["layers"], kind)
    if not counts:
        return ""
    before = report.get("original_layers")
    of = ""
    if before:
        had = stack.counts(before, kind)
        of = f", of {had[0] if len(set(had)) == 1 else joined(had)}"
    where = f"{stack.name} layer 0 to layer {len(stack.layers) - 1}".lstrip()
    return f"{kind_name(report, kind)} kept from {where}: {joined(counts)}{of}"


def importance_by_depth(report: Report) -> FigureSpec | None:
    """The error of removing a whole sublayer, from the first layer to the last."""
    kinds = kinds_of(report)
    costs = {kind: _removal_errors(report, kind) for kind in kinds}
    if not any(costs.values()):
        return None
    texts = [
        f"{kind_name(report, kind)}: {joined(f'{cost:.3g}' for _, cost in own)}"
        for kind, own in costs.items()
        if own
    ]

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for kind in kinds:
            label: str | None = kind_name(report, kind)
            for stack in stacks_of(report):  # no line joins the encoder and the decoder
                points = [point for point in costs[kind] if point[0] in stack.layers]
                if points:
                    colour, marker = COLOURS[kind], _MARKERS[kind]
                    positions, own = zip(*points, strict=True)
                    axis.plot(positions, own, color=colour, marker=marker, ms=4.5, label=label)
                    label = None
        number_layers(axis, report, COLOURS["muted"])
        scale_axis(axis, [cost for own in costs.values() for _, cost in own])
        axis.set_ylabel(_error_name(report))
        legend_above(figure, axis)

    names = [kind_name(report, kind) for kind in kinds]
    return FigureSpec(
        "importance",
        "Importance by depth",
        f"Line chart of the error of removing all units of a sublayer, first to last layer; "
        f"{'; '.join(texts)}.",
        f"The error of removing all {', or all '.join(names)}, of a layer.",
        (WIDTH_INCHES, 2.9),
        draw,
    )


def _removal_errors(report: Report, kind: str) -> list[tuple[int, float]]:
    """Position of each layer that has units of a kind, and the error of keeping none of them."""
    curves = report.get("curves") or ()
    return [(curve["layer"], curve["errors"][0]) for curve in curves if curve["kind"] == kind]


def error_curves(report: Report) -> FigureSpec | None:
    """The error of each block against the share it keeps, with the chosen point."""
    curves = report.get("curves") or ()
    kinds = [kind for kind in kinds_of(report) if any(curve["kind"] == kind for curve in curves)]
    if not kinds:
        return None
    texts = []
    for kind in kinds:
        shares = [
            f"{curve['kept'] / curve['units'][-1]:.0%}" for curve in curves if curve["kind"] == kind
        ]
        name = kind_name(report, kind)
        texts.append(f"share of {name} kept, first to last layer: {joined(shares)}")

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
        for axis, kind in zip(axes, kinds, strict=True):
            own = [curve for curve in curves if curve["kind"] == kind]
            for curve in own:
                _draw_curve(axis, curve, stack_at(report, curve["layer"]))
            axis.set_title(kind_name(report, kind))
            axis.set_ylabel(_error_name(report))
            scale_axis(axis, [error for curve in own for error in curve["errors"]])
        axes[-1].set_xlabel("kept (%)")
        legend_above(figure, axes[0])

    dashed = " Dashed lines are the decoder's." if len(stacks_of(report)) > 1 else ""
    return FigureSpec(
        "curves",
        "Error curves and chosen sizes",
        f"Line charts, one curve per layer, of the error against the share of units kept; dots are "
        f"the chosen sizes; {'; '.join(texts)}.",
        f"Each curve is the error of a sublayer as it keeps fewer units. Dots are the chosen "
        f"sizes. Colours run from the first layer to the last.{dashed}",
        (WIDTH_INCHES, 2.0 + 1.7 * len(kinds)),
        draw,
    )


def _draw_curve(axis: Axes, curve: Mapping[str, Any], stack: Stack) -> None:
    """Without errors of zero, which a logarithmic axis cannot show."""
    position, ends = curve["layer"], (stack.layers[0], stack.layers[-1])
    depth = (position - ends[0]) / max(ends[1] - ends[0], 1)
    colour = _interpolated(*_EDGE_COLOURS, depth)
    name = stack.layer_name(position)
    label = (name if stack.name else f"layer {name}") if position in ends else None
    total = curve["units"][-1]
    errors_of = dict(zip(curve["units"], curve["errors"], strict=True))
    points = [(100 * units / total, error) for units, error in errors_of.items()]
    shown = [(share, error) for share, error in points if error > 0]
    if not shown:
        return
    shares, errors = zip(*shown, strict=True)
    style = "--" if stack.name == "decoder" else "-"
    axis.plot(shares, errors, color=colour, linewidth=1.2, linestyle=style, label=label)
    chosen = errors_of.get(curve["kept"], 0.0)
    if chosen > 0:
        axis.plot(100 * curve["kept"] / total, chosen, "o", color=colour, markersize=4.5)


def scores_by_stage(report: Report) -> FigureSpec | None:
    """Score and divergence after each stage that was scored."""
    stages = [stage for stage in report.get("stages") or () if stage["score"] is not None]
    if len(stages) < 2:
        return None
    names = [stage["stage"] for stage in stages]
    panels = [(report["metric_name"], [stage["score"] for stage in stages], ".2f")]
    if all(stage["divergence"] is not None for stage in stages):
        name = "divergence from the original"
        panels.append((name, [stage["divergence"] for stage in stages], ".4f"))
    texts = [
        f"{title}: "
        + joined(f"{name} {value:{form}}" for name, value in zip(names, values, strict=True))
        for title, values, form in panels
    ]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (title, values, form), kind in zip(axes, panels, _PANEL_COLOURS, strict=False):
            bars = axis.bar(names, values, color=COLOURS[kind], width=0.55)
            axis.bar_label(bars, [f"{value:{form}}" for value in values], padding=2)
            axis.margins(y=0.2)
            axis.set_title(literal(title))
            axis.grid(axis="x", visible=False)

    return FigureSpec(
        "stages",
        "Score by stage",
        f"Bar charts, {'; '.join(texts)}.",
        "Scored on the same validation examples after each stage.",
        (WIDTH_INCHES, 1.0 + 1.6 * len(panels)),
        draw,
    )


def time_by_stage(report: Report) -> FigureSpec | None:
    """The seconds of each stage, in the order they ran, without stages that did not run."""
    seconds = report["seconds"]
    others = [name for name in seconds if name not in (*_STAGES, "prune_total")]
    names = [name for name in (*_STAGES[:-1], *others, _STAGES[-1]) if seconds.get(name)]
    if not names:
        return None
    values = [seconds[name] for name in names]

    def draw(figure: Figure) -> None:
        outside = {"load", "evaluate"}
        colours = [COLOURS["muted" if name in outside else "heads"] for name in names]
        axis = _horizontal_bars(figure, names, values, [_seconds(value) for value in values])
        for bar, colour in zip(axis.patches, colours, strict=True):
            bar.set_color(colour)
        axis.set_xlabel("seconds")

    texts = joined(f"{name} {_seconds(seconds[name])}" for name in names)
    return FigureSpec(
        "seconds",
        "Time by stage",
        f"Bar chart: {texts}.",
        f"Pruning took {_seconds(seconds['prune_total'])} in total, without loading and scoring "
        f"(grey).",
        (WIDTH_INCHES, 0.8 + 0.3 * len(names)),
        draw,
    )


def latency_target(report: Report) -> FigureSpec | None:
    """Target, predicted and measured latency of a run with a constraint on latency."""
    names = {"target": "promised_ms", "predicted": "predicted_ms", "measured": "measured_ms"}
    promise = report.get("promise") or {}
    bars = {name: promise[key] for name, key in names.items() if promise.get(key)}
    if len(bars) < 2:
        return None
    texts = joined(f"{name} {value:.3g} ms" for name, value in bars.items())

    def draw(figure: Figure) -> None:
        values = list(bars.values())
        axis = _horizontal_bars(figure, list(bars), values, [f"{v:.3g} ms" for v in values])
        axis.axvline(report["original"]["latency_ms"], color=COLOURS["muted"], linestyle=":")
        axis.set_xlabel("milliseconds (dotted: the original)")

    return FigureSpec(
        "latency",
        "Latency: target, predicted, measured",
        f"Bar chart: {texts}; the original takes {report['original']['latency_ms']:.3g} ms.",
        "Predicted from the latency table of this machine; measured on the pruned model.",
        (WIDTH_INCHES, 1.9),
        draw,
    )


RUN_FIGURES = (
    max_drop_figure,
    kept_per_layer,
    importance_by_depth,
    error_curves,
    scores_by_stage,
    time_by_stage,
    latency_target,
)
"""The figures of a run, in the order of the page."""


def number_layers(axis: Axes, report: Report, colour: str) -> None:
    """Number the layers on the x axis from 0 in each stack, with a line between two stacks."""
    stacks = stacks_of(report)
    count = len(report["layers"])
    step = -(-count // _MAX_TICKS)
    positions = [position for stack in stacks for position in stack.layers[::step]]
    axis.set_xlim(-0.6, count - 0.4)
    axis.set_xticks(positions, [stack_at(report, p).layer_name(p).split()[-1] for p in positions])
    if len(stacks) == 1:
        axis.set_xlabel("layer")
        return
    axis.axvline(stacks[1].layers.start - 0.5, color=colour, linestyle=":", linewidth=1)
    middles = [(stack.layers[0] + stack.layers[-1]) / 2 for stack in stacks if stack.layers]
    names = [f"\n{stack.name} layer" for stack in stacks if stack.layers]
    axis.xaxis.remove_overlapping_locs = False  # a name may be at the position of a number
    axis.set_xticks(middles, names, minor=True)
    axis.tick_params(axis="x", which="minor", length=0)


def joined(values: Iterable[object]) -> str:
    """The values as text: 1, 2, 3."""
    return ", ".join(str(value) for value in values)


def literal(label: str) -> str:
    """A label that matplotlib draws as it is.

    Matplotlib reads text between dollar signs as mathematics, and leaves labels that start with an
    underscore out of the legend.
    """
    text = label.replace("$", r"\$")
    return f"\N{ZERO WIDTH SPACE}{text}" if text.startswith("_") else text


def scale_axis(axis: Axes, values: Sequence[float]) -> None:
    """Use a logarithmic y axis if the positive values differ by more than a factor of 30."""
    positive = [value for value in values if value > 0]
    if positive and max(positive) > 30 * min(positive):
        axis.set_yscale("log")
        axis.set_ylim(bottom=max(0.6 * min(positive), max(positive) * 1e-5))
    else:
        axis.set_ylim(bottom=0)


def legend_above(figure: Figure, axis: Axes) -> None:
    """One legend above the axes, where it covers no data."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=2)


def _horizontal_bars(
    figure: Figure, names: Sequence[str], values: Sequence[float], labels: Sequence[str]
) -> Axes:
    axis = figure.subplots()
    bars = axis.barh(names, values, color=COLOURS["heads"], height=0.65)
    axis.bar_label(bars, labels, padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.tick_params(axis="y", labelcolor=COLOURS["ink"], length=0)
    axis.grid(axis="y", visible=False)
    return axis


def _error_name(report: Report) -> str:
    return "importance lost" if report["method"] == "kwon" else "error (loss)"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 0.1 else f"{1000 * value:.0f} ms"


def _interpolated(first: str, last: str, share: float) -> str:
    """A colour between two others."""
    pairs = [(int(first[i : i + 2], 16), int(last[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)
