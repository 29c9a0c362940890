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
    write_report,
)


def test_reports_are_strict_json_that_is_read_back(tmp_path: Path) -> None:
    report = {
        "schema": SCHEMA,
        "units": [0, 1, 20],
        "errors": [1e-9, -2.5, 3.0],
        "texts": ["[\n1,\n2\n]", "[ 1, 2 ]"],
        "mixed": [1, None, "two", "möbel"],
        "nothing": [],
    }
    undefined = {"score": math.nan, "scores": (math.inf, 1.0)}
    text = write_report(report | {"pruned": undefined}, tmp_path).read_text(encoding="utf-8")
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    expected = report | {"pruned": {"score": None, "scores": [None, 1.0]}}
    assert read_report(tmp_path) == expected
    assert '"units": [ 0, 1, 20 ]' in text, "numbers share a line"


def test_another_schema_is_an_error(tmp_path: Path) -> None:
    write_report({"schema": SCHEMA + 1}, tmp_path)
    with pytest.raises(
        ValueError, match=f"has schema {SCHEMA + 1}.*reads schema {SCHEMA}: run the command again"
    ):
        read_report(tmp_path)


def test_ratios_and_the_seconds_of_stages() -> None:
    original = {"macs": 8.0, "params": 10.0, "bytes": 50.0, "latency_ms": 4.0}
    pruned = {"macs": 2.0, "params": 5.0, "bytes": 30.0, "latency_ms": 3.0}
    expected = {"mac": 0.25, "params": 0.5, "memory": 0.6, "latency": 0.75}
    assert ratios(original, pruned) == expected
    known = {"collect": 2.0, "prune_total": 2.0}
    seconds = stage_seconds(known, load=1.0, evaluate=3.0)
    names = ("depth", "search", "rearrange", "compact", "verify", "tune", "sparsify")
    stages = dict.fromkeys(names, 0.0)
    assert seconds == {**stages, **known, "load": 1.0, "evaluate": 3.0}, "others took no time"
