"""Dense models compute what pruned models compute, in the original shapes and without our code.

Without these tests a dense export could lose the bias of an emptied sublayer, give heads of
MPNet the position bias of others, or need rfprune to load.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from rfprune.model.checkpoint import load_pruned, save_pruned
from rfprune.model.compact import compact
from rfprune.model.dense import save_dense, to_dense
from rfprune.model.layout import Layout, layout_of
from rfprune.model.masks import Masks, full_masks
from tests.conftest import ALL_TYPES, CAUSAL_TYPES, MODEL_TYPES

Tiny = Callable[..., Any]
CASES = [
    *((model_type, "sequence-classification") for model_type in ALL_TYPES),
    *((model_type, "question-answering") for model_type in MODEL_TYPES),
    *((model_type, "causal-lm") for model_type in CAUSAL_TYPES),
]


def some_masks(layout: Layout, empty: int | None = None) -> Masks:
    """A head and some neurons removed, others scaled; block `empty` without any unit."""
    masks = full_masks(layout)
    for number, mask in enumerate(masks):
        mask[number % len(mask)], mask[-1] = 0, 0.5
        if number == empty:
            mask.zero_()
    return masks


def outputs_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        outputs = model(**batch)
    names = [name for name in outputs if name.endswith("logits")] or ["last_hidden_state"]
    return torch.cat([outputs[name] for name in names], dim=-1)


@pytest.mark.parametrize("empty", [None, 0, 3])
@pytest.mark.parametrize(("model_type", "head"), CASES)
def test_outputs_are_those_of_the_pruned_model(
    model_type: str, empty: int | None, head: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model, batch = tiny_model(model_type, head), tiny_batch(model_type=model_type)
    layout = layout_of(model)
    masks = some_masks(layout, empty)
    small = compact(model, layout, masks)
    with torch.no_grad():  # as a fit leaves it: the bias of an emptied sublayer is its own
        for block in layout.blocks:
            bias = small.get_submodule(block.consumer).bias
            if bias is not None:
                bias += 0.3
    expected = outputs_of(small, batch)
    assert (expected - outputs_of(model, batch)).abs().max() > 1e-2
    for dense in (to_dense(small, layout, masks), to_dense(small)):
        assert type(dense) is type(model)
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        assert {name: value.shape for name, value in dense.state_dict().items()} == shapes
        torch.testing.assert_close(outputs_of(dense, batch), expected, rtol=1e-4, atol=1e-5)
        tied = small.get_output_embeddings() if head == "causal-lm" else None
        if tied is not None and tied.weight is small.get_input_embeddings().weight:
            assert dense.get_output_embeddings().weight is dense.get_input_embeddings().weight


def test_zeros_are_where_units_were_removed(tiny_model: Tiny) -> None:
    model = tiny_model()
    layout = layout_of(model)
    masks = full_masks(layout)
    masks[0][1], masks[1][:5] = 0, 0
    dense = to_dense(compact(model, layout, masks), layout, masks)
    for block, mask in zip(layout.blocks, masks, strict=True):
        kept = mask.repeat_interleave(block.unit_width).bool()
        for producer in block.producers:
            ours = dense.get_submodule(producer.path)
            before = model.get_submodule(producer.path)
            assert torch.equal(ours.weight, before.weight * kept[:, None])
            assert torch.equal(ours.bias, before.bias * kept)
        consumer = block.consumer
        expected = model.get_submodule(consumer).weight * kept
        assert torch.equal(dense.get_submodule(consumer).weight, expected)
        if not bool(kept.all()):
            assert (dense.get_submodule(consumer).weight == 0).sum() >= 16 * (~kept).sum() > 0


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet"])
def test_a_model_that_was_pruned_twice(model_type: str, tiny_model: Tiny, tiny_batch: Tiny) -> None:
    """Heads return to their places in the original, since MPNet's position bias depends on them."""
    model, batch = tiny_model(model_type), tiny_batch()
    first = layout_of(model)
    once = compact(model, first, some_masks(first))
    second = layout_of(once)
    masks = some_masks(second, empty=2)
    twice = compact(once, second, masks)
    expected = outputs_of(twice, batch)
    assert (expected - outputs_of(once, batch)).abs().max() > 1e-3
    dense = to_dense(twice, second, masks)
    assert dense.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(outputs_of(dense, batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["t5", "gpt2"])
def test_untied_output_weights_stay_untied(
    model_type: str, tiny_model: Tiny, tiny_batch: Tiny, tmp_path: Path
) -> None:
    """FLAN-T5 has them, although its configuration ties them to the embedding."""
    head = "seq2seq-lm" if model_type == "t5" else "causal-lm"
    model, batch = tiny_model(model_type, head), tiny_batch(model_type="bert")
    model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn_like(model.lm_head.weight))
    batch |= {"decoder_input_ids": batch["input_ids"]} if model_type == "t5" else {}
    assert model.config.tie_word_embeddings
    layout = layout_of(model)
    masks = some_masks(layout)
    small = compact(model, layout, masks)
    dense = to_dense(small, layout, masks)
    expected = outputs_of(small, batch)
    torch.testing.assert_close(outputs_of(dense, batch), expected, rtol=1e-5, atol=1e-5)
    dense.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(outputs_of(loaded, batch), outputs_of(dense, batch))


def test_an_encoder_without_heads_and_tied_weights(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    """No pruned layer has a table of position biases, but the original class needs one."""
    model, batch = tiny_model("t5", "seq2seq-lm"), tiny_batch(model_type="t5")
    batch["decoder_input_ids"] = batch["input_ids"]
    layout = layout_of(model)
    masks = some_masks(layout)
    for block, mask in zip(layout.blocks, masks, strict=True):
        if block.name in ("layer.0.heads", "layer.1.heads"):
            mask.zero_()
    small = compact(model, layout, masks)
    dense = to_dense(small, layout, masks)
    expected = outputs_of(small, batch)
    torch.testing.assert_close(outputs_of(dense, batch), expected, rtol=1e-5, atol=1e-5)
    names = ("lm_head", "encoder.embed_tokens", "decoder.embed_tokens")
    assert all(dense.get_submodule(name).weight is dense.shared.weight for name in names)


def test_the_pruned_model_is_not_changed(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    model = tiny_model()
    layout = layout_of(model)
    small = compact(model, layout, some_masks(layout)).train()
    config = small.config.to_dict()
    before = {name: value.clone() for name, value in small.state_dict().items()}
    random_state = torch.random.get_rng_state()
    dense = to_dense(small)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert dense.training
    dense.eval()
    assert small.training
    assert small.config.to_dict() == config
    assert not hasattr(dense.config, "rfprune")
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    assert all(parameter.requires_grad for parameter in dense.parameters())


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_a_dense_folder_is_an_ordinary_checkpoint(
    stored: torch.dtype, tiny_model: Tiny, tiny_tokenizer: Tiny, tiny_batch: Tiny, tmp_path: Path
) -> None:
    """Also after the model was saved as a pruned one, which changes its configuration."""
    model, batch = tiny_model("mpnet"), tiny_batch()
    layout = layout_of(model)
    masks = some_masks(layout, empty=3)
    small = compact(model, layout, masks)
    tokenizer, folder = tiny_tokenizer("mpnet"), tmp_path / "dense"
    save_pruned(small, layout, masks, tmp_path / "pruned", tokenizer, dtype=stored)
    save_dense(small, layout, masks, folder, tokenizer, dtype=stored)
    assert not list(folder.glob("*.py"))
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["MPNetForSequenceClassification"]
    assert not {"rfprune", "auto_map"} & config.keys()
    weights = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {stored}
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert type(loaded) is type(model)
    assert layout_of(loaded) == layout
    assert transformers.AutoTokenizer.from_pretrained(folder)("a film")["input_ids"]
    expected = outputs_of(load_pruned(tmp_path / "pruned").eval(), batch)
    torch.testing.assert_close(outputs_of(loaded, batch), expected, rtol=1e-5, atol=1e-5)
