"""Decoders that were pruned still write: with a cache of keys and values, whatever they have lost.

Deleting this lets a decoder that lost an attention lose count of the tokens in its cache.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from rfprune.model.checkpoint import load_pruned
from rfprune.model.compact import compact
from rfprune.model.dense import to_dense
from rfprune.model.layout import layout_of
from rfprune.model.masks import masked
from tests.conftest import CAUSAL_TYPES
from tests.model.emptied import emptied

Tiny = Callable[..., Any]

EMPTY = (
    (),
    ("layer.0.heads",),
    ("layer.1.heads", "layer.0.neurons"),
    ("layer.0.heads", "layer.1.heads"),
)


@pytest.fixture(params=CAUSAL_TYPES)
def model(request: pytest.FixtureRequest, tiny_model: Tiny) -> Any:
    made = tiny_model(request.param, "causal-lm")
    made.generation_config.eos_token_id = None  # as many tokens as are asked for
    made.generation_config.pad_token_id = 0
    return made


@pytest.mark.parametrize("empty", EMPTY, ids=lambda empty: "+".join(empty) or "none")
def test_token_by_token_is_the_full_pass(
    model: Any, empty: tuple[str, ...], tiny_batch: Tiny
) -> None:
    """Further than a window of four tokens reaches, where there is one."""
    ids = tiny_batch(2, 12, padding="none")["input_ids"]
    layout = layout_of(model)
    small = compact(model, layout, emptied(layout, *empty))
    with torch.no_grad():
        full = small(ids).logits
        steps: list[Tensor] = []
        cache: Any = None
        for at in (slice(0, 5), *(slice(i, i + 1) for i in range(5, 12))):
            outputs = small(ids[:, at], past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            steps.append(outputs.logits)
        assert cache.get_seq_length() == 12
        torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-4, atol=1e-4)
        forgetful = small(ids[:, 11:]).logits  # without what came before it is another prediction
        if len(empty) < 2 or "layer.1.heads" not in empty or "layer.0.heads" not in empty:
            assert (forgetful[:, -1] - full[:, -1]).abs().max() > 1e-2


@pytest.mark.parametrize("empty", EMPTY, ids=lambda empty: "+".join(empty) or "none")
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generated_text_is_that_of_the_masked_model(
    model: Any, empty: tuple[str, ...], how: dict[str, Any], tiny_batch: Tiny
) -> None:
    """With prompts of different lengths, padded on the left."""
    batch = tiny_batch(3, 6, padding="left")
    layout = layout_of(model)
    masks = emptied(layout, *empty)
    small = compact(model, layout, masks)
    settings = {"max_new_tokens": 7, "do_sample": False, "disable_compile": True, **how}
    with masked(model, layout, masks):
        expected = model.generate(**batch, **settings)
    found = small.generate(**batch, **settings)
    assert found.shape == (3, 13)
    assert torch.equal(found, expected)


def test_greedy_text_is_the_likeliest_token_at_each_step(model: Any, tiny_batch: Tiny) -> None:
    ids = tiny_batch(1, 4, padding="none")["input_ids"]
    layout = layout_of(model)
    small = compact(model, layout, emptied(layout, "layer.0.heads"))
    assert small.can_generate()
    found = small.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6)
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, small(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, ids)


def test_a_reloaded_model_and_a_dense_one_write_the_same(
    model: Any, tiny_batch: Tiny, tmp_path: Path
) -> None:
    batch = tiny_batch(2, 6, padding="left")
    layout = layout_of(model)
    masks = emptied(layout, "layer.0.heads")
    small = compact(model, layout, masks)
    small.save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    expected = small.generate(**batch, max_new_tokens=5)
    for same in (
        load_pruned(tmp_path),
        load(tmp_path, trust_remote_code=True),
        to_dense(small, layout, masks),
    ):
        assert torch.equal(written(same, batch), expected)


def written(model: Any, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model.generate(**batch, max_new_tokens=5)
    return found
