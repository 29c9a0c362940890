"""Encoder-decoders that were pruned still write, with a cache, whatever they have lost.

Deleting this lets a decoder that lost an attention mix up what it has read and what it has written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rfprune.model.checkpoint import load_pruned
from rfprune.model.compact import compact
from rfprune.model.dense import to_dense
from rfprune.model.layout import layout_of
from rfprune.model.masks import masked
from tests.model.emptied import emptied

Tiny = Callable[..., Any]

EMPTY = (
    (),
    ("layer.2.heads",),
    ("layer.2.cross_heads", "layer.3.heads"),
    ("layer.2.heads", "layer.3.heads", "layer.0.heads"),
    ("layer.2.cross_heads", "layer.3.cross_heads"),
)


@pytest.fixture(params=["bart", "t5", "m2m_100", "marian"])
def model(request: pytest.FixtureRequest, tiny_model: Tiny) -> Any:
    made = tiny_model(request.param, "seq2seq-lm")
    made.generation_config.eos_token_id = None  # as many tokens as are asked for
    return made


@pytest.mark.parametrize("empty", EMPTY, ids=lambda empty: "+".join(empty) or "none")
def test_token_by_token_is_the_full_pass(
    model: Any, empty: tuple[str, ...], tiny_batch: Tiny
) -> None:
    batch, layout = tiny_batch(2, 6, model_type="bart"), layout_of(model)
    ids = tiny_batch(2, 8, padding="none", seed=1)["input_ids"]
    small = compact(model, layout, emptied(layout, *empty))
    cache: Any = None
    with torch.no_grad():
        full = small(**batch, decoder_input_ids=ids).logits
        steps = []
        for at in (slice(0, 3), *(slice(i, i + 1) for i in range(3, 8))):
            outputs = small(
                **batch, decoder_input_ids=ids[:, at], past_key_values=cache, use_cache=True
            )
            cache = outputs.past_key_values
            steps.append(outputs.logits)
    assert cache.get_seq_length() == 8
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("empty", EMPTY, ids=lambda empty: "+".join(empty) or "none")
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generated_text_is_that_of_the_masked_model(
    model: Any, empty: tuple[str, ...], how: dict[str, Any], tiny_batch: Tiny
) -> None:
    batch, layout = tiny_batch(3, 6, model_type="bart"), layout_of(model)
    masks = emptied(layout, *empty)
    small = compact(model, layout, masks)
    settings = {"max_new_tokens": 7, "do_sample": False, "disable_compile": True, **how}
    with masked(model, layout, masks):
        expected = model.generate(**batch, **settings)
    found = small.generate(**batch, **settings)
    assert found.shape == (3, 8)
    assert torch.equal(found, expected)


def test_a_reloaded_model_and_a_dense_one_write_the_same(
    model: Any, tiny_batch: Tiny, tmp_path: Path
) -> None:
    batch, layout = tiny_batch(2, 6, model_type="bart"), layout_of(model)
    masks = emptied(layout, "layer.2.heads", "layer.3.cross_heads")
    small = compact(model, layout, masks)
    small.save_pretrained(tmp_path)
    expected = small.generate(**batch, max_new_tokens=5)
    load = transformers.AutoModelForSeq2SeqLM.from_pretrained
    for same in (
        load_pruned(tmp_path),
        load(tmp_path, trust_remote_code=True),
        to_dense(small, layout, masks),
    ):
        assert torch.equal(same.generate(**batch, max_new_tokens=5), expected)
