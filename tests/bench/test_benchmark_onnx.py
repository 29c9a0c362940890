"""`scripts/benchmark_onnx.py` on a tiny model: six models, one evaluation, one interleaved run.

Deleting this lets a benchmark of minutes lose its numbers at the end, or name folders of a machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.bench.test_benchmarks import load_script

MODELS = ["original", "original-onnx", "original-onnx-int8"]
MODELS += [name.replace("original", "pruned") for name in MODELS]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    yield from load_script("benchmark_onnx")


@pytest.fixture
def flags(tiny_folder: Callable[..., Path], tiny_data_dir: Path, tmp_path: Path) -> str:
    flags = f"--model {tiny_folder()} --task mrpc --data-dir {tiny_data_dir} --samples 16"
    return f"{flags} --rounds 2 --output {tmp_path / 'test.json'}"


def test_six_models_are_scored_and_timed_in_one_run(
    script: ModuleType, flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(flags.split()) == 0
    text = (tmp_path / "test.json").read_text()
    assert str(tmp_path.parent) not in text
    result: dict[str, Any] = json.loads(text)
    rows = result["models"]
    assert list(rows) == MODELS
    assert rows["original"]["divergence"] == 0 < rows["pruned"]["divergence"]
    assert rows["original-onnx"]["divergence"] < 1e-6 < rows["original-onnx-int8"]["divergence"]
    assert rows["pruned-onnx"]["score"] == rows["pruned"]["score"]
    assert rows["pruned-onnx-int8"]["bytes"] < rows["pruned-onnx"]["bytes"]
    single, typical, long = result["speed"]
    assert (single["batch_size"], typical["batch_size"], long["sequence_length"]) == (1, 16, 128)
    for speed in result["speed"]:
        assert list(speed["ms"]) == MODELS
        assert speed["rounds"] == 2
        assert all(milliseconds > 0 for milliseconds in speed["ms"].values())
    assert result["versions"]["onnxruntime"]
    assert result["clock"] == "wall"
    assert "pruned-onnx-int8" in capsys.readouterr().out


def test_time_of_many_threads_is_not_added_up(
    script: ModuleType,
    flags: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    assert script.main([*flags.split(), "--clock", "cpu"]) == 2
    assert "set OMP_NUM_THREADS=1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ("--task mprc", "Unknown task 'mprc'"),
        ("--model missing/folder", "missing/folder"),
        ("--rounds 0", "--rounds 0"),
        ("--constraint 1.5", "1.5"),
        ("--output missing/file.json", "there is no folder"),
        ("--output .", "exists already"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(
    changes: str,
    what: str,
    script: ModuleType,
    flags: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert script.main(f"{flags} {changes}".split()) == 2
    told = capsys.readouterr()
    assert what in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert list(tmp_path.iterdir()) == []
