"""Models without some of their layers: ordinary models of their family, which compute what the
original computes when it skips those layers.

Without these tests a layer could get the attention window, the rotation or the cache of another
one, or a folder could load into a model with another number of layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rfprune.errors import UserError
from rfprune.families.architectures import ARCHITECTURES
from rfprune.model.checkpoint import load_pruned
from rfprune.model.compact import compact
from rfprune.model.depth import removable_layers, remove_layers, without_layers
from rfprune.model.layout import Layout, layout_of
from tests.conftest import ALL_TYPES, CAUSAL_TYPES, GENERATION_TYPES, predictions

Tiny = Callable[..., Any]
FAMILIES = [model_type for model_type in ALL_TYPES if model_type != "albert"]


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = predictions(model(**batch))
    return found


@contextmanager
def skipped(model: Any, layout: Layout, removed: Sequence[int]) -> Iterator[None]:
    """A context in which layers pass on what they are given."""
    length = layout.layer_output_length

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if length is None:
            return hidden
        return (hidden, args[2], args[5]) if length == 3 else (hidden, None)[:length]  # T5: biases

    modules = [model.get_submodule(layout.layers[layer]) for layer in removed]
    for module in modules:
        module.forward = forward
    yield
    for module in modules:
        del module.forward


def some_layers(model: Any, layout: Layout) -> list[int]:
    """Two layers of the only stack, or one of each."""
    allowed = removable_layers(model, layout)
    decoder = layout.layer_indices(decoder=True)
    return [allowed[0], next((i for i in allowed if i in decoder), allowed[2])]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_model_without_layers_is_one_of_its_family(
    model_type: str, tiny_model: Tiny, tiny_batch: Tiny, tmp_path: Path
) -> None:
    model = tiny_model(model_type, num_hidden_layers=4)
    batch, layout = tiny_batch(model_type=model_type), layout_of(model)
    removed = some_layers(model, layout)
    with skipped(model, layout, removed):
        expected = logits(model, batch)
    assert (expected - logits(model, batch)).abs().max() > 1e-2, "the layers matter"
    short = remove_layers(model, layout, removed)
    assert type(short) is type(model)
    torch.testing.assert_close(logits(short, batch), expected, rtol=1e-5, atol=1e-5)
    assert layout_of(short) == without_layers(layout, removed)
    short.save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    stacks = zip(layout.stacks(), ARCHITECTURES[model_type].stacks, strict=True)
    for indices, stack in stacks:
        common = stack.num_layers_entry
        own = model.config.attribute_map.get(common, common)
        assert entries[own] == len(set(indices) - set(removed))
    assert "rfprune" not in entries
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, batch), expected, rtol=1e-5, atol=1e-5)


def test_pruned_layers_keep_their_sizes(tiny_model: Tiny, tiny_batch: Tiny, tmp_path: Path) -> None:
    """Layers of unequal sizes, one without heads: the description of the blocks is renumbered."""
    for model_type in ("bert", "mpnet", "t5", "llama"):
        model = tiny_model(model_type, num_hidden_layers=4)
        layout, batch = layout_of(model), tiny_batch(model_type=model_type)
        masks = [torch.ones(block.num_units) for block in layout.blocks]
        for block, mask in zip(layout.blocks, masks, strict=True):
            mask[: block.layer % 3] = 0
            if block.layer == 2 and block.kind == "head":
                mask[:] = 0
        pruned = compact(model, layout, masks)
        own, removed = layout_of(pruned), [1, 3]
        with skipped(pruned, own, removed):
            expected = logits(pruned, batch)
        assert (expected - logits(pruned, batch)).abs().max() > 1e-2
        short = remove_layers(pruned, own, removed)
        torch.testing.assert_close(logits(short, batch), expected, rtol=1e-5, atol=1e-5)
        assert layout_of(short) == without_layers(own, removed)
        folder = tmp_path / model_type
        short.save_pretrained(folder)
        torch.testing.assert_close(logits(load_pruned(folder), batch), expected)
        again = compact(model, layout, masks, removed)
        torch.testing.assert_close(logits(again, batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", [*CAUSAL_TYPES, *GENERATION_TYPES[:3], "t5"])
def test_a_model_without_layers_generates_with_a_cache(model_type: str, tiny_model: Tiny) -> None:
    head = "causal-lm" if model_type in CAUSAL_TYPES else "seq2seq-lm"
    model = tiny_model(model_type, head, num_hidden_layers=4)
    layout = layout_of(model)
    short = remove_layers(model, layout, some_layers(model, layout))
    ids = torch.randint(5, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    how: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    how |= {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    found = [
        torch.stack(short.generate(ids, attention_mask=torch.ones_like(ids), **how, **one).logits)
        for one in ({"use_cache": True}, {"use_cache": False})
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_weights_are_shared_until_they_are_copied(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    model = tiny_model("llama", "causal-lm", num_hidden_layers=4, tie_word_embeddings=True).train()
    model.model.layers[3].requires_grad_(False)
    layout = layout_of(model)
    short = remove_layers(model, layout, [0, 1])
    assert short.training
    assert short.lm_head.weight is short.model.embed_tokens.weight
    own = [layer.mlp.down_proj.weight for layer in short.model.layers]
    assert [weight.requires_grad for weight in own] == [True, False]
    assert own[1].data_ptr() == model.model.layers[3].mlp.down_proj.weight.data_ptr()
    full = [torch.ones(block.num_units) for block in layout.blocks]
    copied = compact(model, layout, full, [0, 1])
    assert type(copied) is type(model)
    batch, before = tiny_batch(), logits(model.eval(), tiny_batch())
    with torch.no_grad():
        copied.model.layers[1].mlp.down_proj.weight.zero_()
    assert torch.equal(logits(model, batch), before)


def test_per_layer_entries_of_the_configuration_follow(tiny_model: Tiny) -> None:
    model = tiny_model("smollm3", num_hidden_layers=4)
    short = remove_layers(model, layout_of(model), [1, 2])
    assert model.config.no_rope_layers == [1, 0, 1, 0]
    assert short.config.no_rope_layers == [1, 0]
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    model = tiny_model("qwen2", num_hidden_layers=4, **windows)
    short = remove_layers(model, layout_of(model), [0])
    assert short.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert short.config.max_window_layers == 1


def test_the_heads_that_times_of_words_are_taken_from_follow(tiny_model: Tiny) -> None:
    model = tiny_model("whisper", num_hidden_layers=4)
    model.generation_config.alignment_heads = [[1, 0], [3, 2]]
    for removed, expected in (([4, 5], [[1, 2]]), ([0, 6], [[1, 0], [2, 2]]), ([5, 7], None)):
        short = remove_layers(model, layout_of(model), removed)
        assert short.generation_config.alignment_heads == expected
    assert model.generation_config.alignment_heads == [[1, 0], [3, 2]]


def test_layers_that_cannot_be_removed(tiny_model: Tiny) -> None:
    expected = {"modernbert": (1, 2), "t5": (1, 2, 4, 5), "bert": (0, 1, 2)}
    for model_type, layers in expected.items():
        model = tiny_model(model_type, num_hidden_layers=3)
        assert removable_layers(model, layout_of(model)) == layers
    for model_type, entries, reason in (
        ("albert", {}, "albert model share their weights.*--depth"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "by the number of the layer.*--depth"),
        ("wav2vec2", {"use_weighted_layer_sum": True}, "fewer layers.*layer_weights.*--depth"),
    ):
        model = tiny_model(model_type, **entries)
        with pytest.raises(UserError, match=reason):
            removable_layers(model, layout_of(model))
