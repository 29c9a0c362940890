"""report.json keeps its schema, by which scripts and people compare runs."""

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


def test_undefined_scores_are_null_and_tuples_are_lists(tmp_path: Path) -> None:
    report = {"schema": SCHEMA, "pruned": {"score": math.nan, "scores": (math.inf, 1.0)}}
    text = write_report(report, tmp_path).read_text(encoding="utf-8")
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict["pruned"] == {"score": None, "scores": [None, 1.0]}


def test_reports_are_read_back_and_numbers_share_a_line(tmp_path: Path) -> None:
    report = {
        "schema": SCHEMA,
        "units": [0, 1, 20],
        "errors": [1e-9, -2.5, 3.0],
        "texts": ["[\n1,\n2\n]", "[ 1, 2 ]"],
        "mixed": [1, None, "two", "möbel"],
        "nothing": [],
    }
    text = write_report(report, tmp_path).read_text(encoding="utf-8")
    assert read_report(tmp_path) == report
    assert '"units": [ 0, 1, 20 ]' in text


def test_another_schema_is_an_error(tmp_path: Path) -> None:
    write_report({"schema": SCHEMA + 1}, tmp_path)
    with pytest.raises(
        ValueError, match=f"has schema {SCHEMA + 1}.*reads schema {SCHEMA}: run the command again"
    ):
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


def test_stages_that_did_not_run_took_no_time() -> None:
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
