"""The benchmark of large models, on one that is not.

Deleting this lets a stage's memory be put down to another, or a stopped measurement begin again.
"""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from typing import Any

import pytest

from rfprune.result import Clock
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


def wait_for_steady_memory() -> None:
    """Threads that imports have started may still be giving memory back."""
    gc.collect()
    seen: list[int] = []
    for _ in range(250):
        seen.append(benchmark_scale._bytes_now("cpu"))
        if seen[-10:] == seen[-1:] * 10:
            return
        time.sleep(benchmark_scale.SECONDS_BETWEEN)


def test_memory_is_watched_for_as_long_as_it_is_asked_for() -> None:
    """What the imports have left, and is given back meanwhile, is far less than the block."""
    own, size = Clock.__call__, 256 * 2**20
    wait_for_steady_memory()
    with benchmark_scale.watched_memory("cpu") as peaks, Clock()("collect"):
        block = bytearray(size)
        block[:: 2**12] = b"x" * len(block[:: 2**12])
    assert peaks["collect"] > peaks["start"] + size // 2, peaks
    assert Clock.__call__ is own


def test_what_fails_is_one_sentence(tmp_path: Path, capsys: Any) -> None:
    arguments = ["--size", "tiny", "--constraint", "2", "--output", str(tmp_path / "s.jsonl")]
    assert benchmark_scale.main(arguments) == 2
    assert "not a fraction between 0 and 1" in capsys.readouterr().err
