"""Batches: token masks, packing without padding, and splitting for language models.

Without these tests padding could count as tokens, and large batches could lose examples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rfprune.errors import UserError
from rfprune.model import batch as batch_module
from rfprune.model.batch import (
    first_examples,
    first_tokens,
    model_inputs,
    pack,
    split_batch,
    token_mask,
    unpack,
)
from rfprune.model.layerwise import add_signal_token_mask
from rfprune.model.layout import layout_of

Tiny = Callable[..., Any]
IDS = torch.zeros(2, 3, dtype=torch.long)


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_packing_drops_padding_alone(rows: list[list[bool]]) -> None:
    tokens = torch.tensor(rows)
    hidden = torch.randn(*tokens.shape, 3)
    packed = pack(hidden, tokens)
    assert packed.shape == (int(tokens.sum()), 3)
    assert torch.equal(unpack(packed, tokens), hidden * tokens[:, :, None])


def test_the_token_mask_is_the_attention_mask(tiny_batch: Tiny) -> None:
    batch = tiny_batch(padding="left")
    assert torch.equal(token_mask(batch).long(), batch["attention_mask"])
    assert not token_mask(batch).all()
    assert token_mask({"input_ids": IDS}).tolist() == [[True] * 3] * 2
    assert token_mask({"inputs_embeds": torch.zeros(2, 3, 16)}).shape == (2, 3)
    choices = torch.tensor([[[1, 1], [1, 0]], [[1, 1], [0, 1]]])
    batch = {"input_ids": torch.zeros(2, 2, 2, dtype=torch.long), "attention_mask": choices}
    assert torch.equal(token_mask(batch).long(), choices.flatten(0, 1)), "one row per choice"


def test_the_first_examples_have_all_their_choices_within_the_limit() -> None:
    batch = {"input_ids": torch.ones(5, 3, 4, dtype=torch.long)}  # 12 tokens an example
    assert [len(one["input_ids"]) for one in first_examples([batch, batch], 40)] == [3]
    assert [len(one["input_ids"]) for one in first_examples([batch, batch], 75)] == [5, 1]
    assert [len(one["input_ids"]) for one in first_examples([batch], 0)] == [1]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"labels": torch.zeros(2)}, r"holds labels, .* needs input_ids .* or pixel_values"),
        (
            {"input_ids": IDS, "attention_mask": torch.zeros(2, 1, 3, 3)},
            r"shape \(2, 1, 3, 3\) does not fit \(2, 3\) tokens.*one number per token",
        ),
    ],
)
def test_a_batch_without_a_token_mask_is_refused(batch: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        token_mask(batch)


def test_images_have_the_number_of_tokens_that_the_model_makes(
    tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model = tiny_model("deit")
    batch = {**tiny_batch(3, model_type="deit"), "labels": torch.zeros(3)}
    prepared = add_signal_token_mask(model, layout_of(model), batch)
    assert token_mask(prepared).tolist() == [[True] * 6] * 3  # four patches, class, distillation
    assert list(model_inputs(prepared)) == ["pixel_values"]
    assert prepared["labels"] is batch["labels"]
    assert add_signal_token_mask(model, layout_of(model), prepared) is prepared


def test_the_first_token_is_found_after_padding() -> None:
    tokens = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 0], [0, 0, 1]]).bool()
    assert first_tokens(tokens).nonzero().tolist() == [[0, 0], [1, 1], [2, 0], [3, 2]]


@pytest.mark.parametrize(
    ("max_rows", "sizes"), [(1, [1] * 5), (2.5, [2, 2, 1]), (4, [3, 2]), (5, [5])]
)
def test_batches_of_language_models_are_split_by_their_logits(
    max_rows: float, sizes: list[int], tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", "causal-lm")
    monkeypatch.setattr(batch_module, "MAX_LOGITS", int(max_rows * 7 * model.config.vocab_size))
    ids = torch.arange(35).view(5, 7) % model.config.vocab_size
    batch = {"input_ids": ids, "attention_mask": ids % 3}
    parts = split_batch(model, batch)
    assert [len(part["input_ids"]) for part in parts] == sizes
    for name, values in batch.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), values)
    assert split_batch(tiny_model("bert"), batch) == [batch], "few logits"
