"""Fixtures for the tests of the measurements: a tiny model on MRPC, and the lines of a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ReadLines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "results" / "test_tiny.jsonl"


@pytest.fixture
def flags(tiny_folder: Callable[..., Path], tiny_data_dir: Path, output: Path) -> str:
    """A tiny BERT on MRPC, 16 calibration examples in batches of 8."""
    data = f"--model {tiny_folder()} --task mrpc --data-dir {tiny_data_dir}"
    return f"{data} --samples 16 --batch-size 8 --output {output}"


@pytest.fixture
def lines(output: Path, tmp_path: Path) -> ReadLines:
    """`lines()`: the results so far; they name no folder of this machine, and their code."""

    def read() -> list[dict[str, Any]]:
        text = output.read_text()
        assert str(tmp_path.parent) not in text
        found = [json.loads(line) for line in text.splitlines()]
        for line in found:
            assert len(line["code"]) == 16
            assert {"rfprune", "torch", "transformers"} <= line["versions"].keys()
            assert line["measured_at"]
        return found

    return read
