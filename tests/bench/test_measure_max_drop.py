"""The script that measures `--max-drop`: a line a limit, none twice.

Deleting this lets it measure for an hour and then write a line that nobody can read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts import measure_max_drop
from scripts.measure_max_drop import main


def test_every_limit_is_a_line_and_none_is_measured_twice(
    tiny_folder: Callable[..., Path],
    tiny_data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("rfprune.latency.speedup.MAX_ROUNDS", 1)
    monkeypatch.setattr("rfprune.report.plots.RUN_FIGURES", ())
    output, made = tmp_path / "lines.jsonl", list[Any]()

    def search(*arguments: Any) -> Any:
        made.append(real(*arguments))
        return made[-1]

    real = measure_max_drop.search
    monkeypatch.setattr(measure_max_drop, "search", search)
    flags = f"--model {tiny_folder()} --task sst2 --data-dir {tiny_data_dir} --output {output} "
    flags += "--samples 16 --batch-size 8 --points"
    assert main([*flags.split(), "99"]) == 0
    monkeypatch.setattr(measure_max_drop, "search", lambda *_: made[0])
    assert main([*flags.split(), "99", "30"]) == 0
    lines = [json.loads(text) for text in output.read_text().splitlines()]
    assert [line["points"] for line in lines] == [99.0, 30.0]
    for line in lines:
        assert line["drop"] <= line["points"]
        assert line["probes"] == len(line["path"])
        assert line["seconds"] > 0 and line["single_seconds"] > 0
    said = capsys.readouterr()
    assert "1 of 2 measurements to make" in said.err
    assert said.out.splitlines()[-2:][0].startswith("| tiny-bert")

    monkeypatch.setattr(measure_max_drop, "search", lambda *_: None)
    assert main([*flags.split(), "99", "30"]) == 0
    assert main([*flags.split(), "5"]) == 1, "no size keeps it"
    assert len(output.read_text().splitlines()) == 2
    assert main([*flags.split(), "-1"]) == 2
    assert "is not a number from 0 up to 100" in capsys.readouterr().err
