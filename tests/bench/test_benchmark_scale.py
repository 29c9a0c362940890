"""The benchmark of large models, on one that is not.

Deleting this lets a stage's memory be put down to another, or a stopped measurement begin again.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from rfprune.result import StageTimer
from scripts import benchmark_scale


@pytest.mark.parametrize("method", ["curvature", "kwon"])
def test_a_line_says_what_each_stage_took(method: str, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "scale.jsonl"
    flags = ["--size", "tiny", "--samples", "2", "--length", "8", "--method", method]
    arguments = [*flags, "--output", str(output)]
    assert benchmark_scale.main(arguments) == 0
    (line,) = [json.loads(text) for text in output.read_text().splitlines()]
    stages = set(line["seconds"]) - {"prune_total", "wall"}
    assert {"collect", "search", "compact", "tune"} <= stages
    assert set(line["peak_bytes"]) == stages | {"start"}
    assert min(line["peak_bytes"].values()) > line["weight_bytes"]
    assert 0 < line["achieved"]["mac"] <= 0.7
    assert "tiny: 2 M parameters" in capsys.readouterr().err
    assert benchmark_scale.main(arguments) == 0
    assert len(output.read_text().splitlines()) == 1


def test_memory_is_put_down_to_the_stage_that_uses_it() -> None:
    own, size = StageTimer.stage, 256 * 2**20
    deadline = time.monotonic() + 60
    with benchmark_scale.watched_memory("cpu") as peaks:
        enough = peaks["start"] + size // 2  # imports may be giving some back meanwhile
        with StageTimer().stage("collect"):
            block = bytearray(size)
            block[:: 2**12] = b"x" * len(block[:: 2**12])
            while peaks.get("collect", 0) < enough and time.monotonic() < deadline:
                time.sleep(benchmark_scale.SECONDS_BETWEEN)
            del block  # else what comes after the stage has it too
    assert peaks["collect"] >= enough
    assert peaks["start"] < peaks["collect"], peaks
    assert StageTimer.stage is own


def test_what_fails_is_one_sentence(tmp_path: Path, capsys: Any) -> None:
    arguments = ["--size", "tiny", "--constraint", "2", "--output", str(tmp_path / "s.jsonl")]
    assert benchmark_scale.main(arguments) == 2
    assert "not a fraction between 0 and 1" in capsys.readouterr().err
