"""`scripts/benchmark_processes.py` on a tiny model: what it compares, what its file holds.

Deleting this lets a benchmark of minutes compare runs that prune differently, unnoticed. Nothing
here depends on how long anything takes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts import benchmark_processes as script


@pytest.fixture
def flags(tiny_folder: Callable[..., Path], tiny_data_dir: Path, tmp_path: Path) -> list[str]:
    flags = f"--model {tiny_folder()} --task mrpc --data-dir {tiny_data_dir} --samples 40"
    return f"{flags} --rounds 1 --method curvature --output {tmp_path / 'test.json'}".split()


@pytest.mark.slow
def test_it_compares_one_process_with_two(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert script.main(flags) == 0
    text = (tmp_path / "test.json").read_text()
    assert str(tmp_path.parent) not in text
    result: dict[str, Any] = json.loads(text)
    rows = result["methods"]["curvature"]
    assert list(rows) == ["1", "2"]
    for row in rows.values():
        assert row["collect"] > 0
        assert len(row["all_seconds"]) == 1
    assert result["same_masks"] is True
    assert "same masks in all runs: yes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["--rounds", "0"], "whole numbers of at least 1"),
        (["--task", "sst3"], "sst3"),
        (["--output", "nowhere/at/all.json"], "no folder of that name"),
    ],
)
def test_what_is_wrong_is_said_before_minutes_are_spent(
    changes: list[str], sentence: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([*flags, *changes]) == 2
    assert sentence in capsys.readouterr().err


def test_what_goes_wrong_in_a_process_is_said(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([*flags, "--data-dir", str(tmp_path / "nowhere"), "--processes", "1"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "test.json").exists()
