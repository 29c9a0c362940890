"""report.json keeps its schema: scripts and people compare runs by it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rfprune.report.report_json import (
    SCHEMA,
    ratios,
    read_report,
    stage_seconds,
    versions,
    write_report,
)


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    report = {"schema": SCHEMA, "model": "möbel", "layers": ({"heads": 1, "neurons": 2},)}
    write_report(report, tmp_path)
    assert read_report(tmp_path) == {**report, "layers": [{"heads": 1, "neurons": 2}]}


def test_a_score_that_is_undefined_is_null_not_invalid_json(tmp_path: Path) -> None:
    report = {"schema": SCHEMA, "pruned": {"score": math.nan, "scores": [math.inf, 1.0]}}
    text = write_report(report, tmp_path).read_text(encoding="utf-8")
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict["pruned"] == {"score": None, "scores": [None, 1.0]}


def test_numbers_share_a_line_and_texts_stay(tmp_path: Path) -> None:
    report = {
        "schema": SCHEMA,
        "units": [0, 1, 20],
        "errors": [1e-9, -2.5, 3.0],
        "texts": ["[\n1,\n2\n]", "[ 1, 2 ]"],
        "mixed": [1, None, "two"],
        "nothing": [],
    }
    text = write_report(report, tmp_path).read_text(encoding="utf-8")
    assert read_report(tmp_path) == report
    assert '"units": [ 0, 1, 20 ]' in text


def test_another_schema_is_refused(tmp_path: Path) -> None:
    write_report({"schema": SCHEMA + 1}, tmp_path)
    with pytest.raises(ValueError, match="has schema"):
        read_report(tmp_path)


def test_ratios_are_pruned_over_original() -> None:
    original = {"macs": 8.0, "params": 10.0, "bytes": 50.0, "latency_ms": 4.0}
    pruned = {"macs": 2.0, "params": 5.0, "bytes": 30.0, "latency_ms": 3.0}
    assert ratios(original, pruned) == {
        "mac": 0.25,
        "params": 0.5,
        "memory": 0.6,
        "latency": 0.75,
    }


def test_a_stage_that_was_left_out_took_no_time() -> None:
    seconds = stage_seconds({"collect": 2.0, "prune_total": 2.0}, load=1.0, evaluate=3.0)
    assert seconds == {
        "load": 1.0,
        "collect": 2.0,
        "search": 0.0,
        "rearrange": 0.0,
        "compact": 0.0,
        "verify": 0.0,
        "tune": 0.0,
        "prune_total": 2.0,
        "evaluate": 3.0,
    }


def test_versions_name_what_matters() -> None:
    assert {"rfprune", "python", "torch", "transformers"} <= set(versions())
