"""The measurement of granularities once, end to end, at tiny size.

Without these tests the models in one table could differ in their numbers of non-zeros.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rfprune import Settings, prune
from scripts.bench import sparsity, sparsity_speed, sparsity_tables
from tests.bench.conftest import ReadLines


def test_models_of_one_level_have_equal_numbers_of_non_zeros(flags: str, lines: ReadLines) -> None:
    wanted = '"units" "2:4, obs" "1:4, wanda" "anywhere, obs" torch-global'.split('"')
    names = [name for part in wanted for name in [part.strip()] if name]
    assert sparsity.main([*flags.split(), "--variant", *names]) == 0
    found = lines()
    assert len(found) == 5 + 8
    for level in sparsity.LEVELS:
        own = [line for line in found if line["nonzeros"] == level]
        exact = {line["nonzero_params"] for line in own if not line["variant"].startswith("units")}
        assert max(exact) - min(exact) <= 12 + 8  # each of twelve maps to within one weight
        units = [line["nonzero_params"] for line in own if line["variant"].startswith("units")]
        assert max(units) <= max(exact)
        assert min(units) > 0.9 * max(exact)
    assert all(line["divergence"] > 0 for line in found)
    table = sparsity_tables.granularities(found)
    assert table.count("| 0.25 |") == sum(line["nonzeros"] == 0.25 for line in found)


def test_magnitude_is_that_of_torch(tiny_model: Callable[..., Any]) -> None:
    """Our magnitude with scope "layer" is `l1_unstructured`, bit for bit."""
    model = tiny_model()
    batches = [{"input_ids": torch.randint(5, 90, (4, 7))}]
    settings = Settings(sparsity=0.5, sparsity_criterion="magnitude")
    ours = prune(model, batches, None, settings).model.state_dict()
    theirs = sparsity.pruned_by_torch(model, 0.5, everywhere=False).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.skipif(not importlib.util.find_spec("openvino"), reason="needs openvino")
def test_models_with_zeros_are_timed_by_runtime(
    tiny_folder: Callable[..., Path],
    output: Path,
    lines: ReadLines,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = f"--model {tiny_folder()} --batch-size 1 --length 5 --rounds 1 --output {output}"
    assert sparsity_speed.main(flags.split()) == 0
    assert "Statistics collection" not in capsys.readouterr().out  # a progress bar of NNCF
    (line,) = lines()
    assert list(line["models"]["2:4"]["ms"]) == list(sparsity_speed.RUNTIMES)
    assert "2:4" in sparsity_tables.speed([line])
