"""--offload: the layers of a checkpoint stay where they are until they are needed.

Deleting this lets the flag change the model that it makes, or load everything after all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rfprune import load_pruned
from rfprune.checkpoints.loading import load
from rfprune.checkpoints.offload import layers_elsewhere, without_weights
from rfprune.main import main
from rfprune.tasks.registry import get_task

CPU = torch.device("cpu")


def test_layers_alone_are_elsewhere(tiny_model: Callable[..., Any]) -> None:
    config = tiny_model("llama", "causal-lm").config
    places = layers_elsewhere(without_weights(AutoModelForCausalLM, config), CPU, "disk")
    assert places.pop("model.layers") == "disk"
    assert {"model.embed_tokens", "model.norm", "lm_head"} <= places.keys()
    assert set(places.values()) == {"cpu"}


def test_the_layers_of_both_stacks_are_elsewhere(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("bart", "sequence-classification")
    places = layers_elsewhere(model, CPU, "disk")
    elsewhere = {path for path, place in places.items() if place == "disk"}
    assert elsewhere == {"model.encoder.layers", "model.decoder.layers"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_weights_stay_on_disk_and_are_read_in_the_dtype_of_the_run(
    dtype: torch.dtype,
    tiny_model: Callable[..., Any],
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = tiny_folder()
    model = load(str(folder), get_task("mrpc"), device=CPU, dtype=torch.float32).model
    tokenizer = load(str(folder), get_task("mrpc"), device=CPU, dtype=torch.float32).tokenizer
    model.to(dtype).save_pretrained(tmp_path, max_shard_size="4KB")
    tokenizer.save_pretrained(tmp_path)
    loaded = load(
        str(tmp_path), get_task("mrpc"), device=CPU, dtype=torch.float32, offload="disk"
    ).model
    assert AutoConfig.from_pretrained(tmp_path).model_type == "bert"
    layers, others = loaded.bert.encoder.layer.parameters(), loaded.bert.embeddings.parameters()
    assert all(weight.is_meta for weight in layers)
    assert not any(weight.is_meta for weight in others)
    ids = torch.arange(5)[None]
    assert torch.equal(loaded(ids).logits, model.float()(ids).logits)


def test_the_command_makes_the_same_model(
    tiny_folder: Callable[..., Path], tiny_data_dir: Path, tmp_path: Path
) -> None:
    def output(name: str, *flags: str) -> Path:
        arguments = [
            "--model",
            str(tiny_folder()),
            "--task",
            "mrpc",
            "--data-dir",
            str(tiny_data_dir),
        ]
        arguments += ["--constraint", "0.6", "--samples", "32", "--device", "cpu", "--quiet"]
        arguments += ["--output-dir", str(tmp_path / name), "--no-cache", *flags]
        assert main(arguments) == 0
        return tmp_path / name

    expected = load_pruned(output("in-memory")).state_dict()
    found = load_pruned(output("offloaded", "--offload", "disk")).state_dict()
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight, expected[name])
