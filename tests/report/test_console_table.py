"""The console and log.txt show the whole summary, and text from users as it is."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rfprune.report.console_table import print_report, write_log

MakeReport = Callable[..., dict[str, Any]]


def shown(report: dict[str, Any]) -> str:
    file = StringIO()
    print_report(report, Console(file=file, width=120, color_system=None))
    return file.getvalue()


def test_the_console_has_every_number(report: MakeReport) -> None:
    text = " ".join(shown(report(cached=["collect", "evaluate"])).split())
    for part in (
        *("80.39", "78.90", "-1.49 points", "577.76 M", "288.00 M", "49.8%", "22.71 M"),
        *("90.86 MB", "200 ms", "100 ms", "speedup 2.00x", "batch 32 x 58", "0.0123"),
        *("took 6.6 s (collect 2.0 (cached), search", "loading took 1.0 s", "408 validation"),
        *("scoring 3.5 s (original: cached)", "pruned to 50% of its MACs", "2048 calibration"),
        "Warning: block layer.0.heads",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"evaluated_examples": 1}, "1 validation example;"),
        ({"evaluated_examples": 1, "divergence": None}, "Scored on 1 validation example."),
        ({"kind": "language-modeling"}, "predictions, in nats per token"),
        ({"kind": "regression"}, "half the mean squared difference"),
        ({"kind": "similarity"}, "distance from the original's embeddings"),
        ({"scores": {"original": {"accuracy": 80.0}, "pruned": {"accuracy": None}}}, "undefined"),
        ({"settings": {"uniform": True}}, "without custom code"),
    ],
)
def test_the_text_depends_on_the_kind_of_run(
    changes: dict[str, Any], part: str, report: MakeReport
) -> None:
    assert part not in shown(report())
    assert part in shown(report(**changes))


def test_text_from_users_is_no_markup_and_the_reload_line_is_not_wrapped(
    report: MakeReport,
) -> None:
    name = "models/[bold]x[/bold]/:smile:/" + "long/" * 30
    text = shown(report(output_dir=name, warnings=["[bold]label[/bold]"]))
    assert f'from_pretrained("{name}"' in text
    assert "[bold]label[/bold]" in text


def test_the_log_has_command_messages_and_table(report: MakeReport, tmp_path: Path) -> None:
    text = write_log(report(), tmp_path, "Pruning\n").read_text(encoding="utf-8")
    assert text.startswith(f"$ {report()['command']}\nPruning\n")
    assert "78.90" in text
