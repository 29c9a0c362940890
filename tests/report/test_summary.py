"""The rows and sentences about a run have the numbers of its report.

Without these tests the console, the page and the card could show other numbers than report.json.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import pytest

from rfprune.report.summary import (
    export_lines,
    export_rows,
    latency_lines,
    max_drop_lines,
    reload_line,
    score_change,
    summary_rows,
    target_text,
    title,
    trial_line,
)
from tests.report.conftest import MAX_DROP, PROMISE

MakeReport = Callable[..., dict[str, Any]]
CRITERION = {"importance": "magnitude-l1", "allocation": "uniform"}


def test_rows_have_the_main_score_first_and_no_details(report: MakeReport) -> None:
    scores = {
        name: {"f1": 86.12, "accuracy": 80.39, "best_f1": 87.0} for name in report()["scores"]
    }
    rows = summary_rows(report(scores=scores))
    assert [row[0] for row in rows[:3]] == ["accuracy", "f1", "MACs (53 tokens)"]
    assert rows[2:] == [
        ("MACs (53 tokens)", "577.76 M", "288.00 M", "49.8%"),
        ("parameters", "22.71 M", "15.00 M", "66.0%"),
        ("weights (float16)", "90.86 MB", "40.00 MB", "44.0%"),
        ("latency (batch 32 x 58)", "200 ms", "100 ms", "50.0% (speedup 2.00x)"),
    ]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"constraint": 0.5}, "pruned to 50% of its MACs"),
        ({"constraint": 0.07}, "pruned to 7% of its MACs"),
        ({"constraint": 0.125}, "pruned to 12.5% of its MACs"),
        ({"constraint": 1 / 3}, "pruned to 33.3333% of its MACs"),
        ({"constraint": 1e-5}, "pruned to 0.001% of its MACs"),
        ({"method": "kwon", "samples": 1}, "(kwon, 1 calibration example)"),
        (
            {"method": "importance", "settings": CRITERION},
            "(magnitude-l1 importance, uniform allocation, 2048 calibration examples)",
        ),
    ],
)
def test_the_title_has_constraint_and_method(
    changes: dict[str, Any], part: str, report: MakeReport
) -> None:
    assert part in title(report(**changes))


@pytest.mark.parametrize(
    ("key", "before", "after", "row"),
    [
        ("latency_ms", 1234.56, 1234.56, ("1235 ms", "1235 ms")),
        ("latency_ms", 45.678, 1.234, ("45.7 ms", "1.2 ms")),
        ("latency_ms", 1.234, 1.2, ("1.23 ms", "1.20 ms")),
        ("macs", 1.692e9, 8.4693e8, ("1.69 G", "0.85 G")),
    ],
)
def test_numbers_of_a_row_have_the_unit_and_digits_of_the_largest(
    key: str, before: float, after: float, row: tuple[str, str], report: MakeReport
) -> None:
    costs = {"original": {key: before}, "pruned": {key: after}}
    changed = {name: report()[name] | own for name, own in costs.items()}
    assert row in [cells[1:3] for cells in summary_rows(report(**changed))]


@pytest.mark.parametrize(
    ("before", "after", "higher_is_better", "text"),
    [
        (80.39, 78.9, True, "-1.49 points"),
        (80.0, 79.9999, True, "+0.00 points"),
        (80.0, None, True, ""),
        (20.0, 25.0, False, "+25.0%"),
    ],
)
def test_score_changes(
    before: float, after: float | None, higher_is_better: bool, text: str, report: MakeReport
) -> None:
    assert score_change(report(higher_is_better=higher_is_better), before, after) == text


@pytest.mark.parametrize(
    ("task", "head"), [("mrpc", "SequenceClassification"), ("squad_v2", "QuestionAnswering")]
)
def test_the_reload_line_is_python_and_fits_the_task(
    task: str, head: str, report: MakeReport
) -> None:
    name = 'a "b" \\ c'
    line = reload_line(report(task=task, output_dir=name))
    assert f"AutoModelFor{head}.from_pretrained(" in line
    call = ast.parse(line, mode="eval").body
    assert isinstance(call, ast.Call)
    assert ast.literal_eval(call.args[0]) == name
    assert "trust_remote_code=True" in line
    assert "trust_remote_code" not in reload_line(report(settings={"uniform": True}))


def test_lines_of_a_latency_and_of_a_max_drop(report: MakeReport) -> None:
    assert latency_lines(report()) == max_drop_lines(report()) == []
    (line,) = latency_lines(report(promise=PROMISE))
    for part in ("target 100 ms", "predicted 101 ms", "measured 99 ms", "1 candidate timed"):
        assert part in line
    (line,) = latency_lines(report(promise=PROMISE | {"attempts": PROMISE["attempts"] * 2}))
    assert "2 candidates timed" in line
    tried, certainty = max_drop_lines(report(max_drop=MAX_DROP))
    assert "70% (+0.25), 40% (-4.39), 50% (-1.49)" in tried
    assert "at most 1.5 points" in tried and "61 s" in tried
    for part in ("loses 1.49 points", "standard error of 0.60", "In 52% of"):
        assert part in certainty
    gained = MAX_DROP | {"points": 1.0, "drop": -0.25, "least_possible": 0.5}
    _, certainty, smallest = max_drop_lines(report(max_drop=gained))
    assert "gains 0.25 points" in certainty and "at most 1 point." in certainty
    assert "No smaller model is possible" in smallest


def test_a_search_shows_the_sizes_of_its_models(report: MakeReport) -> None:
    """Where whole layers are removed, they can be much smaller than what was asked for."""
    achieved = (0.66667, 0.38, 0.5)
    path = [
        trial | {"achieved": size} for trial, size in zip(MAX_DROP["path"], achieved, strict=True)
    ]
    shown = report(max_drop=MAX_DROP | {"path": path}, achieved={"mac": 0.4998}, constraint=0.58)
    assert "66.7% (+0.25), 38% (-4.39), 50% (-1.49)" in max_drop_lines(shown)[0]
    assert target_text(shown) == "pruned to 50% of its MACs"
    assert trial_line(path[0]) == "66.7%: 80.64 (+0.25), divergence 0.0020"


def test_export_rows_and_lines(report: MakeReport) -> None:
    assert export_rows(report()) == [] == export_lines(report())
    exports = {
        "dense": {"path": "dense", "bytes": 9e7, "max_difference": 2e-7, "checked_on": [[8, 20]]},
        "onnx": {"path": "onnx/model.onnx", "bytes": 4e7, "score": None, "latency_ms": 40.0},
        "gguf_f16": {"path": "gguf/model-f16.gguf", "bytes": 5e7},  # not run
        "gguf_q8_0": {"path": "q8", "bytes": 3e7, "score": 80.0, "latency_ms": 20.0},
        "openvino_int8": {"path": "o.xml", "bytes": 1e7, "score": 80.0, "latency_ms": 20.0},
        "latency": {
            "batch_size": 8,
            "sequence_length": 20,
            "rounds": 9,
            "threads": 1,
            "original_ms": 80.0,
            "pruned_ms": 50.0,
        },
    }
    rows = export_rows(report(exports=exports))
    assert rows[0] == ("original, PyTorch", "80.39", "90.86 MB", "80.0 ms", "1.00x")
    assert rows[2] == ("pruned, ONNX Runtime", "undefined", "40.00 MB", "40.0 ms", "2.00x")
    assert rows[3] == ("pruned, OpenVINO, int8", "80.00", "10.00 MB", "20.0 ms", "4.00x")
    assert rows[4] == ("pruned, llama.cpp, q8_0", "80.00", "30.00 MB", "20.0 ms", "4.00x")
    assert len(rows) == 5
    dense, onnx, *_ = export_lines(report(exports=exports))
    assert dense.startswith("dense: 90.00 MB;") and "2.0e-07" in dense and "8 x 20" in dense
    assert onnx == "onnx/model.onnx: 40.00 MB."
