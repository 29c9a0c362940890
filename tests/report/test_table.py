"""The table shows the numbers of the report, and how to load the model."""

from __future__ import annotations

import ast
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
        "stored_dtype": "float32",
        "command": "rfprune --model some/folder",
        "metric_name": "accuracy",
        "original": costs | {"latency_ms": 200.0},
        "pruned": costs | {"score": 78.9, "macs": 2.8888e8, "latency_ms": 100.0},
        "scores": {
            "original": {"f1": 86.12, "accuracy": 80.39, "best_f1": 87.0},
            "pruned": {"f1": 85.0, "accuracy": 78.9, "best_f1": 86.0},
        },
        "divergence": 0.01234,
        "evaluated_examples": 408,
        "mean_tokens": 53.2,
        "latency": {"batch_size": 32, "sequence_length": 58},
        "seconds": {"load": 1.0, "collect": 2.0, "tune": 0.0, "prune_total": 2.5, "evaluate": 3.5},
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
        *("90.86 MB", "200 ms", "100 ms", "speedup 2.00x", "batch 32 x 58", "0.0123"),
        *("took 2.5 s (collect 2.0)", "1.0 s of loading", "3.5 s of scoring", "408 validation"),
        *("Warning: block layer.0.heads", "pruned to 50% of its MACs", "2048 calibration"),
    ):
        assert part in text, part


def test_all_scores_are_shown_the_main_one_first() -> None:
    text = shown(report())
    assert text.index("accuracy") < text.index("f1")
    assert "-1.12 points" in text
    assert "best_f1" not in text


@pytest.mark.parametrize(
    ("ratio", "percent"),
    [(0.5, "50%"), (0.07, "7%"), (0.125, "12.5%"), (1 / 3, "33.3333%"), (1e-5, "0.001%")],
)
def test_the_constraint_is_not_rounded_away(ratio: float, percent: str) -> None:
    assert f"pruned to {percent} of" in shown(report(constraint=ratio))


@pytest.mark.parametrize(
    ("milliseconds", "text"), [(1234.56, "1235 ms"), (45.678, "45.7 ms"), (1.234, "1.23 ms")]
)
def test_times_have_three_digits(milliseconds: float, text: str) -> None:
    costs = report()["pruned"] | {"latency_ms": milliseconds}
    assert text in shown(report(original=costs, pruned=costs))


def test_numbers_side_by_side_have_one_unit() -> None:
    original = report()["original"] | {"macs": 1.692e9, "latency_ms": 123.4}
    pruned = report()["pruned"] | {"macs": 8.4693e8, "latency_ms": 56.78}
    text = shown(report(original=original, pruned=pruned))
    for part in ("1.69 G", "0.85 G", "123 ms", "57 ms"):
        assert part in text, part


def test_no_difference_has_no_minus() -> None:
    scores = {"original": {"accuracy": 80.0}, "pruned": {"accuracy": 79.9999}}
    assert "+0.00 points" in shown(report(scores=scores))


def test_one_is_not_many() -> None:
    text = shown(report(samples=1, evaluated_examples=1))
    assert "1 calibration example)" in text
    assert "1 validation example;" in text


def test_a_score_that_is_undefined_is_said_to_be() -> None:
    scores = {"original": {"accuracy": 80.0}, "pruned": {"accuracy": None}}
    assert "undefined" in shown(report(scores=scores))


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


def test_a_name_is_no_markup_and_no_emoji() -> None:
    name = "models/[bold]x[/bold]/:smile:"
    text = shown(report(output_dir=name, model=name))
    assert text.count(name) == 2


def test_the_reload_line_is_python_whatever_the_folder_is_called() -> None:
    name = 'a "b" \\ c'
    call = ast.parse(reload_line(report(output_dir=name)), mode="eval").body
    assert isinstance(call, ast.Call)
    assert ast.literal_eval(call.args[0]) == name


def test_the_log_has_command_and_table(tmp_path: Path) -> None:
    text = write_log(report(), tmp_path).read_text(encoding="utf-8")
    assert text.startswith("$ rfprune --model some/folder\n")
    assert "78.90" in text


def test_the_criterion_is_part_of_the_methods_name() -> None:
    settings = {"importance": "magnitude-l1", "allocation": "uniform"}
    assert "(kwon, 2048 calibration examples)" in shown(report(settings=settings))
    text = shown(report(method="importance", settings=settings))
    assert "(magnitude-l1 importance, uniform allocation, 2048 calibration examples)" in text


def test_a_plain_architecture_is_loaded_without_code() -> None:
    text = shown(report(settings={"uniform": True}))
    assert 'AutoModelForSequenceClassification.from_pretrained("outputs/it")' in text
    assert "trust_remote_code" not in text
    assert "without any code of its own" in text
    assert "trust_remote_code=True" in shown(report(settings={"uniform": False}))


def test_a_promise_of_latency_is_told(report: Any) -> None:
    from rfprune.report.promise_text import promise_lines

    assert promise_lines(report()) == []
    attempt = {"predicted": 0.5, "measured": 0.51, "error": 0.003}
    promise = {"promised_ms": 50.0, "predicted_ms": 49.9, "measured_ms": 50.4}
    (told,) = promise_lines(report(promise=promise | {"attempts": [attempt, attempt]}))
    assert told == (
        "Latency: promised 50 ms, predicted by this device's table 49.9 ms, measured 50.4 ms; "
        "2 choices of sizes were timed on the way."
    )
    (told,) = promise_lines(report(promise=promise | {"attempts": [attempt]}))
    assert told.endswith("one choice of sizes was timed on the way.")
