"""Every figure shows the numbers of the report, in light and dark mode and for screen readers.

Without these tests a page could lose a figure, or its colours, with a new version of matplotlib.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from rfprune.report.figures import (
    COLOURS,
    RUN_FIGURES,
    error_curves,
    importance_by_depth,
    kept_per_layer,
    max_drop_figure,
    number_layers,
    time_by_stage,
)
from rfprune.report.layers import stacks_of
from rfprune.report.page import DARK_COLOURS
from rfprune.report.plots import Plot, draw_frontier, draw_kept, draw_run, write_plots
from tests.report.conftest import (
    MAX_DROP,
    PROMISE,
    make_encoder_decoder_report,
    make_report,
)

Report = dict[str, Any]
MakeReport = Callable[..., Report]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def plots() -> dict[str, Plot]:
    """Those of a full report, drawn once."""
    return by_name(draw_run(make_report(promise=PROMISE, max_drop=MAX_DROP)))


def by_name(plots: tuple[Plot, ...]) -> dict[str, Plot]:
    return {plot.name: plot for plot in plots}


def speced(report: Report) -> set[str]:
    """What would be drawn."""
    specs = [figure(report) for figure in RUN_FIGURES]
    return {spec.name for spec in specs if spec is not None}


def texts(plot: Plot) -> list[str]:
    root = ET.fromstring(plot.svg)
    return ["".join(element.itertext()).strip() for element in root.iter() if "text" in element.tag]


def test_a_full_report_has_every_figure(plots: dict[str, Plot]) -> None:
    assert list(plots) == [
        *("search", "kept", "importance", "curves", "stages", "seconds", "latency")
    ]
    assert len(plots) == len(RUN_FIGURES)
    for plot in plots.values():
        assert plot.png.startswith(PNG)
        assert ET.fromstring(plot.svg).get("aria-label") == plot.description
        assert plot.title and plot.note and plot.description.endswith(".")


@pytest.mark.parametrize(
    ("key", "missing"),
    [
        ("curves", {"curves", "importance"}),
        ("stages", {"stages"}),
        ("promise", {"latency"}),
        ("original_layers", set()),
    ],
)
def test_figures_without_data_are_left_out(key: str, missing: set[str], report: MakeReport) -> None:
    full = report(promise=PROMISE)
    less = {name: value for name, value in full.items() if name != key}
    assert speced(full) - speced(less) == missing


def test_reports_with_little_in_them_are_drawn(
    report: MakeReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [{"stage": "original", "score": None, "divergence": None}]
    assert "stages" not in speced(report(stages=stages))
    pruned = report()["pruned"] | {"score": None}
    assert draw_frontier([("a", report(pruned=pruned))]) == ()
    assert kept_per_layer(report(layers=[])) is None
    assert time_by_stage(report(seconds={"prune_total": 0.0})) is None
    spec = time_by_stage(report(seconds=report()["seconds"] | {"sharpen": 7.5}))
    assert spec is not None
    assert "sharpen 7.5 s, evaluate" in spec.description, "a stage of a later version"
    curves = [
        {"kind": "heads", "layer": 0, "units": [0, 1, 2], "errors": [0.0, 0.0, 0.0], "kept": 2},
        {"kind": "neurons", "layer": 2, "units": [0, 5], "errors": [1e-30, 0.0], "kept": 0},
    ]
    monkeypatch.setattr("rfprune.report.plots.RUN_FIGURES", (error_curves, importance_by_depth))
    assert set(by_name(draw_run(report(curves=curves)))) == {"curves", "importance"}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("kept", "heads kept from layer 0 to layer 2: 3, 0, 4, of 4"),
        ("kept", "neurons kept from layer 0 to layer 2: 7, 12, 1, of 12"),
        ("importance", "heads: 1, 2, 3"),
        ("curves", "share of heads kept, first to last layer: 75%, 0%, 100%"),
        ("stages", "original 80.39, selected 70.50, fitted 78.90"),
        ("stages", "selected 0.2100"),
        ("seconds", "collect 2.0 s, search 50 ms, compact 10 ms, tune 4.5 s"),
        ("latency", "target 100 ms, predicted 101 ms, measured 99 ms"),
        ("search", "1. 70%: 80.64 (+0.25), divergence 0.0020, 2. 40%: 76.00 (-4.39)"),
        ("search", "chosen: 50%, with a limit of 1.5 points lost"),
    ],
)
def test_descriptions_have_the_numbers(name: str, part: str, plots: dict[str, Plot]) -> None:
    assert part in plots[name].description
    assert "rearrange" not in plots["seconds"].description, "it took no time"


def test_colours_are_variables_and_text_is_text(plots: dict[str, Plot]) -> None:
    plot = plots["kept"]
    assert "heads kept" in texts(plot)
    for name in ("heads", "neurons", "removed", "ink", "muted"):
        assert f"var(--{name}, {COLOURS[name]})" in plot.svg
    bare = re.sub(r"var\(--\w+, #[0-9a-f]{6}\)", "", plot.svg)
    assert not re.findall(r"#[0-9a-f]{6}\b", re.sub(r"(href|clip-path|id)=\"[^\"]*\"", "", bare))
    ids = [name for plot in plots.values() for name in re.findall(r' id="([^"]*)"', plot.svg)]
    assert 0 < len(ids) == len(set(ids)), "all figures are on one page"
    for plot in plots.values():
        assert "DejaVu" not in plot.svg
        assert "<style" not in plot.svg and "<metadata" not in plot.svg


def test_drawing_is_reproducible_and_keeps_the_settings_of_matplotlib(
    report: MakeReport, tmp_path: Path
) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    first, second = draw_kept(report()), draw_kept(report())
    assert first == second
    assert dict(mpl.rcParams) == before
    layers = [{"heads": 1, "neurons": 7}, *report()["layers"][1:]]
    (other,) = draw_kept(report(layers=layers))
    assert (first[0].svg, first[0].png) != (other.svg, other.png)
    for _ in range(2):
        write_plots(first, tmp_path)
    assert (tmp_path / "plots" / "kept.png").read_bytes() == first[0].png


def test_the_frontier_has_a_figure_per_task_and_a_line_per_method(report: MakeReport) -> None:
    runs = [
        ("a", report(constraint=0.5)),
        ("b", report(achieved={"mac": 0.3, "params": 0.5}, constraint=0.3)),
        ("c", report(method="kwon")),
        ("d", report(task="sst2")),
    ]
    plots = by_name(draw_frontier(runs))
    assert set(plots) == {"frontier-mrpc", "frontier-sst2"}
    shown = texts(plots["frontier-mrpc"])
    assert "folder, curvature" in shown and "folder, kwon" in shown
    other = report(metric="params", seed=4)
    (plot,) = draw_frontier([("a", report()), ("b", other)])
    assert "folder, curvature, parameters, seed 4" in texts(plot)
    assert "cost kept (%)" in texts(plot)
    assert "with 30% kept" in plots["frontier-mrpc"].description


def contrast(first: str, second: str) -> float:
    """Of WCAG 2: from 1 to 21."""

    def luminance(colour: str) -> float:
        shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [COLOURS, DARK_COLOURS], ids=["light", "dark"])
def test_colours_have_enough_contrast(theme: dict[str, str]) -> None:
    assert set(theme) == set(COLOURS)
    assert contrast(theme["ink"], theme["paper"]) > 7
    assert contrast(theme["muted"], theme["paper"]) > 4.5
    for kind in ("heads", "cross_heads", "neurons"):
        assert contrast(theme[kind], theme["paper"]) > 3
        assert contrast(theme[kind], theme["removed"]) > 3


def test_a_search_shows_its_trials_and_its_choice(
    plots: dict[str, Plot], monkeypatch: pytest.MonkeyPatch, report: MakeReport
) -> None:
    plot = plots["search"]
    assert {"1", "2", "3", "MACs kept (%)"} <= set(texts(plot))
    monkeypatch.setattr("rfprune.report.plots.RUN_FIGURES", (max_drop_figure,))
    assert draw_run(report()) == ()
    (other,) = draw_run(report(max_drop=MAX_DROP, constraint=0.7))
    assert other.svg != plot.svg, "another marker is filled"


def test_labels_from_users_are_drawn_as_they_are(report: MakeReport) -> None:
    """Dollar signs are no mathematics, and an underscore hides no label from the legend."""
    runs = [("a", report(model="_x $a_{1$ <b>&", metric_name="f$1$"))]
    (plot,) = draw_frontier(runs)
    shown = [text.strip("\N{ZERO WIDTH SPACE}") for text in texts(plot)]
    assert "_x $a_{1$ <b>&, curvature" in shown
    assert "f$1$ (dotted: the original)" in shown


def test_encoder_decoder_figures_have_cross_attention_and_both_stacks() -> None:
    drawn = by_name(draw_run(make_encoder_decoder_report()))
    assert drawn["kept"].description == (
        "Bar charts, self-attention heads kept from encoder layer 0 to layer 1: 4, 2, of 4; "
        "self-attention heads kept from decoder layer 0 to layer 2: 0, 0, 0, of 4; "
        "cross-attention heads kept from decoder layer 0 to layer 2: 1, 0, 3, of 4; "
        "neurons kept from encoder layer 0 to layer 1: 12, 9, of 12; "
        "neurons kept from decoder layer 0 to layer 2: 6, 5, 8, of 12."
    )
    assert "self-attention heads: 1, 2, 3, 4, 5; cross-attention heads: 3, 4, 5; neurons: 1" in (
        drawn["importance"].description
    )
    assert "share of cross-attention heads kept, first to last layer: 25%, 0%, 75%" in (
        drawn["curves"].description
    )
    assert "Dashed lines are the decoder's." in drawn["curves"].note
    assert {"encoder 0", "encoder 1", "decoder 0", "decoder 2"} <= set(texts(drawn["curves"]))
    assert "layer 0" not in texts(drawn["curves"])
    for name in ("kept", "importance"):
        shown = texts(drawn[name])
        assert {"encoder layer", "decoder layer"} <= set(shown)
        assert f"var(--cross_heads, {COLOURS['cross_heads']})" in drawn[name].svg
    kept = texts(drawn["kept"])
    assert [text for text in kept if text.endswith("kept")] == [
        *("self-attention heads kept", "cross-attention heads kept", "neurons kept")
    ]


@pytest.mark.parametrize("make", [make_report, make_encoder_decoder_report])
def test_layers_are_numbered_from_zero_in_each_stack(make: MakeReport) -> None:
    from matplotlib.figure import Figure

    full = make()
    axis = Figure().subplots()
    number_layers(axis, full, "red")
    numbers = [label.get_text() for label in axis.get_xticklabels()]
    assert "".join(numbers) == ("012" if len(full["layers"]) == 3 else "01012")
    many = make(layers=[layer for layer in full["layers"] for _ in range(8)])
    axis = Figure().subplots()
    number_layers(axis, many, "red")
    numbers = [label.get_text() for label in axis.get_xticklabels()]
    assert numbers.count("0") == len(stacks_of(many))
    assert len(numbers) <= 13, "they would run into one another"

    if make is make_encoder_decoder_report:
        spec = importance_by_depth(full)
        assert spec is not None
        figure = Figure()
        spec.draw(figure)
        lines: list[Any] = figure.axes[0].get_lines()
        series = sorted([float(place) for place in line.get_xdata()] for line in lines)
        between = [[1.5, 1.5]]
        assert series == [*[[0, 1]] * 2, *between, *[[2, 3, 4]] * 3], "no line joins the stacks"
