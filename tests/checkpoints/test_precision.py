"""Weights are stored in the original's dtype, and scored as they are stored.

Without these a pruned model could be larger on disk than its original.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rfprune.checkpoints.precision import round_weights, stored_dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_of_most_weights_counts(dtype: torch.dtype, tmp_path: Path) -> None:
    few = {"few": torch.zeros(3, dtype=torch.float32), "ids": torch.zeros(4, dtype=torch.int64)}
    save_file({"many": torch.zeros(50, dtype=dtype), **few}, tmp_path / "model-00001.safetensors")
    save_file({"more": torch.zeros(50, dtype=dtype)}, tmp_path / "model-00002.safetensors")
    save_file({"masks": torch.zeros(900, dtype=torch.float64)}, tmp_path / "masks.safetensors")
    assert stored_dtype(str(tmp_path)) == dtype


@pytest.mark.parametrize("source", ["", "owner/never-downloaded"])
def test_without_files_it_is_float32(source: str, tmp_path: Path) -> None:
    assert stored_dtype(source or str(tmp_path)) == torch.float32


def test_weights_survive_the_storing_exactly(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    before = model.classifier.weight.clone()
    assert round_weights(model, torch.float16)
    weight = model.classifier.weight
    assert not torch.equal(weight, before)
    assert torch.equal(weight, weight.half().float())
    assert (weight - before).abs().max() < 1e-3 * before.abs().max()


def test_weights_beyond_the_range_are_left_alone(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.classifier.bias[0] = 1e6
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not round_weights(model, torch.float16)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
