"""What can happen to the files of a model that is larger than memory.

Deleting this lets a killed run start again from its first layer or end with another model, and lets
a full disk, a missing file or a second run end in a traceback.
"""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from rfprune import Constraint, PruneResult, prune
from rfprune.errors import UserError
from rfprune.model import weight_store
from rfprune.model.residency import stored_tensors
from rfprune.stages import reconstruct
from rfprune.stages.curvature import error_curve

HALF = Constraint("mac", 0.5)
WHERE = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
WHERE |= {"lm_head": "cpu", "model.layers": "disk"}


@pytest.fixture
def folder(tiny_model: Callable[..., Any], tmp_path: Path) -> Path:
    """A checkpoint of four layers in several files."""
    model = tiny_model("llama", "causal-lm", num_hidden_layers=4)
    model.save_pretrained(tmp_path / "model", max_shard_size="10KB")
    return tmp_path / "model"


@pytest.fixture
def batches(tiny_batch: Callable[..., Any]) -> list[Any]:
    return [tiny_batch(seed=seed) for seed in range(9)]


def offloaded(folder: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(folder, device_map=WHERE).eval()


def weights(result: PruneResult) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in stored_tensors(result.model)}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(weight, expected[name]) for name, weight in found.items()
    )


def interrupted_at(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next run end when a layer has been written and is not yet recorded as finished."""
    finish = weight_store.WeightStore.finish

    def stop(self: Any, name: str, warnings: Any) -> None:
        if name == layer:
            raise KeyboardInterrupt
        finish(self, name, warnings)

    monkeypatch.setattr(weight_store.WeightStore, "finish", stop)


def test_an_interrupted_fit_goes_on_at_its_last_finished_layer(
    folder: Path, batches: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[str] = []
    fit = reconstruct._fit_block

    def noting(*arguments: Any) -> list[str]:
        fitted.append(arguments[2].original.name)
        return [*fit(*arguments), f"{arguments[2].original.name} is noted"]

    monkeypatch.setattr(reconstruct, "_fit_block", noting)
    expected = prune(offloaded(folder), batches, HALF)
    whole, cache = list(fitted), tmp_path / "cache"
    assert {name.split(".")[1] for name in whole} == {"0", "1", "2", "3"}
    with monkeypatch.context() as patch:
        interrupted_at("model.layers.2", patch)
        with pytest.raises(KeyboardInterrupt):
            prune(offloaded(folder), batches, HALF, cache=cache)
    gc.collect()  # as the process that was killed
    fitted.clear()
    result = prune(offloaded(folder), batches, HALF, cache=cache)
    assert fitted == [name for name in whole if name.split(".")[1] in "23"]
    assert result.warnings == expected.warnings
    assert same(weights(result), weights(expected))
    assert list(cache.glob("unfinished-*"))
    del result
    gc.collect()
    assert not list(cache.glob("unfinished-*")), "it is removed with the model that reads it"


def test_an_interrupted_collection_computes_no_error_curve_again(
    folder: Path, batches: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str] = []
    cache, stop_at = tmp_path / "cache", 5

    def counting(model: Any, layout: Any, block: Any, factors: Any) -> Any:
        if len(computed) == stop_at:
            raise KeyboardInterrupt
        computed.append(block.name)
        return error_curve(model, layout, block, factors)

    monkeypatch.setattr("rfprune.methods.curvature.error_curve", counting)
    with pytest.raises(KeyboardInterrupt):
        prune(offloaded(folder), batches, HALF, cache=cache)
    assert len(list(cache.glob("*.rfprune"))) == len(computed) == stop_at
    stop_at = 100
    result = prune(offloaded(folder), batches, HALF, cache=cache)
    assert len(computed) == len(set(computed)) == 8, "two blocks in each of four layers"
    assert len(list(cache.glob("*.rfprune"))) == 1, "those of blocks are removed"
    expected = prune(offloaded(folder), batches, HALF)
    assert len(computed) == 16
    assert same(weights(result), weights(expected))


def test_two_runs_with_one_cache(folder: Path, batches: list[Any], tmp_path: Path) -> None:
    first = prune(offloaded(folder), batches, HALF, cache=tmp_path / "cache")
    second = prune(offloaded(folder), batches, HALF, cache=tmp_path / "cache")
    expected = weights(first)
    del first
    gc.collect()
    assert same(weights(second), expected)


def test_a_full_disk(
    folder: Path, batches: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weight_store, "save_file", full)
    with pytest.raises(UserError, match=r"No space left on device\): make room there, or"):
        prune(offloaded(folder), batches, HALF, cache=tmp_path / "cache")
    assert not list(tmp_path.rglob("*.partial"))


def test_a_file_of_weights_that_disappears(folder: Path, batches: list[Any]) -> None:
    model = offloaded(folder)
    max(folder.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"cannot be read .* leave the files of a checkpoint"):
        prune(model, batches, HALF)


def test_a_file_of_weights_of_another_dtype(folder: Path, batches: list[Any]) -> None:
    for path in sorted(folder.glob("*.safetensors"))[::2]:
        half = {name: weight.half() for name, weight in load_file(path).items()}
        save_file(half, path, metadata={"format": "pt"})
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = prune(model, batches, HALF)
    other = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=WHERE).eval()
    result = prune(other, batches, HALF)
    assert same(weights(result), weights(expected))
