"""Outputs written by version 0.1.0 still load and compute what they computed.

`earlier_outputs/NAME` is a folder that `save_pruned` of version 0.1.0 wrote, NAME.safetensors a
batch and the logits on it. Deleting this lets a renamed entry of config.json orphan every model
that users have saved.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from rfprune import load_pruned

FOLDER = Path(__file__).with_name("earlier_outputs")
CLASSES = {
    "bert": "AutoModelForSequenceClassification",
    "bert-uniform": "AutoModelForSequenceClassification",
    "llama": "AutoModelForCausalLM",
    "mt5": "AutoModelForSeq2SeqLM",
}


def with_its_own_code(name: str) -> Any:
    auto_class = getattr(transformers, CLASSES[name])
    return auto_class.from_pretrained(FOLDER / name, trust_remote_code=True)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("load", [lambda name: load_pruned(FOLDER / name), with_its_own_code])
def test_an_earlier_output_computes_the_same(name: str, load: Callable[[str], Any]) -> None:
    batch = load_file(FOLDER / f"{name}.safetensors")
    expected = batch.pop("logits")
    model = load(name).eval()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        next(changed.parameters()).mul_(1.5)
        assert (changed(**batch)[0] - expected).abs().max() > 1e-3
        torch.testing.assert_close(model(**batch)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "bert-uniform"])
def test_the_masks_of_an_earlier_output_are_read(name: str) -> None:
    checkpoint = importlib.import_module("rfprune.model.checkpoint")
    masks = checkpoint.load_masks(FOLDER / name)
    assert any((mask == 0).any() for mask in masks.values())
