"""The table shows the numbers of the report, and how to load the model."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rfprune.report.table import print_report, reload_line, write_log


def report(**changes: Any) -> dict[str, Any]:
    costs = {"score": 80.39, "macs": 5.7776e8, "params": 22713602, "bytes": 9.086e7}
    return {
        "model": "some/folder",
        "task": "mrpc",
        "method": "kwon",
        "metric": "mac",
        "constraint": 0.5,
        "samples": 2048,
        "dtype": "float32",
        "command": "rfprune --model some/folder",
        "metric_name": "accuracy",
        "original": costs | {"latency_ms": 200.0},
        "pruned": costs | {"score": 78.9, "macs": 2.8888e8, "latency_ms": 100.0},
        "divergence": 0.01234,
        "mean_tokens": 53.2,
        "latency": {"batch_size": 32, "sequence_length": 58},
        "seconds": {"load": 1.0, "collect": 2.0, "prune_total": 2.5},
        "warnings": ["block layer.0.heads kept its scales"],
        "output_dir": "outputs/it",
    } | changes


def shown(contents: dict[str, Any]) -> str:
    file = StringIO()
    print_report(contents, Console(file=file, width=120, color_system=None))
    return file.getvalue()


def test_every_number_is_shown() -> None:
    text = shown(report())
    for part in (
        *("80.39", "78.90", "-1.49 points", "577.76 M", "288.88 M", "50.0%", "22.71 M"),
        *("90.86 MB", "200.00 ms", "100.00 ms", "2.00x faster", "batch 32 x 58", "0.0123"),
        *("collect 2.0", "in all 2.5", "Warning: block layer.0.heads", "50% of its MACs"),
    ):
        assert part in text, part


def test_a_score_that_is_undefined_is_said_to_be() -> None:
    contents = report(pruned=report()["pruned"] | {"score": None})
    assert "undefined" in shown(contents)


def test_square_brackets_in_warnings_are_no_markup() -> None:
    assert "[bold]label[/bold]" in shown(report(warnings=["[bold]label[/bold]"]))


@pytest.mark.parametrize(
    ("task", "head"), [("mrpc", "SequenceClassification"), ("squad_v2", "QuestionAnswering")]
)
def test_the_reload_line_fits_the_task_and_is_never_wrapped(task: str, head: str) -> None:
    contents = report(task=task, output_dir="outputs/" + "long/" * 30)
    line = reload_line(contents)
    assert f"AutoModelFor{head}.from_pretrained(" in line
    assert line in shown(contents)


def test_the_log_has_command_and_table(tmp_path: Path) -> None:
    text = write_log(report(), tmp_path).read_text(encoding="utf-8")
    assert text.startswith("$ rfprune --model some/folder\n")
    assert "78.90" in text
