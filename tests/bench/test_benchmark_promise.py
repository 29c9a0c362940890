"""The benchmark of promised latencies and its table.

Deleting this lets a stopped measurement begin again, or a table show what no line says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rfprune.latency.timing import TimingBudget
from scripts import benchmark_promise, promise_table, speedup_models

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 50,
}


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(speedup_models.SYNTHETIC, "minilm", TINY)
    monkeypatch.setattr("rfprune.latency.speedup.RATIO_BUDGET", TimingBudget(0.0, 2, 2))
    monkeypatch.setattr(benchmark_promise, "MAX_ROUNDS", 2)
    output = str(tmp_path / "promise_minilm.jsonl")
    return ["--synthetic", "minilm", "--batch-size", "2", "--length", "6", "--output", output]


def lines_of(flags: list[str]) -> list[dict[str, Any]]:
    return [json.loads(text) for text in Path(flags[-1]).read_text().splitlines()]


def test_it_measures_what_is_missing_and_the_table_shows_it(
    flags: list[str], tmp_path: Path
) -> None:
    assert benchmark_promise.main([*flags, "--constraint", "0.95"]) == 0
    first = lines_of(flags)
    assert benchmark_promise.main([*flags, "--constraint", "0.95", "0.9"]) == 0
    both = lines_of(flags)
    assert both[:1] == first
    assert [line["constraint"] for line in both] == [0.95, 0.9]
    assert all(line["original_ms"] > 0 and 0 < line["mac"] < 1 for line in both)
    assert all(line["attempts"] for line in both)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{promise_table.BEGIN}\n{promise_table.END}\nafter\n")
    places = ["--results", str(tmp_path), "--readme", str(readme)]
    assert promise_table.main([*places, "--check"]) == 1
    assert promise_table.main(places) == 0
    assert promise_table.main([*places, "--check"]) == 0
    assert "| minilm, 2 x 6, float32" in readme.read_text()
    assert "0.95, 0.9" in readme.read_text()


def test_another_machine_is_another_file(flags: list[str], capsys: Any) -> None:
    assert benchmark_promise.main([*flags, "--constraint", "0.95"]) == 0
    line = lines_of(flags)[0] | {"device_name": "an abacus"}
    Path(flags[-1]).write_text(json.dumps(line) + "\n")
    assert benchmark_promise.main([*flags, "--constraint", "0.9"]) == 2
    assert "measured on another machine" in capsys.readouterr().err


def test_a_constraint_that_is_none_is_refused(flags: list[str], capsys: Any) -> None:
    assert benchmark_promise.main([*flags, "--constraint", "1.5"]) == 2
    assert "not a fraction between 0 and 1" in capsys.readouterr().err
