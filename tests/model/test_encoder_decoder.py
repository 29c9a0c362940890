"""The decoder of an encoder-decoder runs on its own tokens and on a given encoder output.

Without these tests a decoder could be fitted at padding, or on another encoder's output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rfprune.errors import UserError
from rfprune.model.batch import decoder_token_mask, model_inputs, pack, token_mask, unpack
from rfprune.model.compact import compact
from rfprune.model.encoder_decoder import (
    add_decoder_inputs,
    block_token_mask,
    encoder_output,
    inputs_with_encoder_output,
)
from rfprune.model.layerwise import add_signal_token_mask, layer_calls, run_layer
from rfprune.model.layout import layout_of
from rfprune.model.masks import full_masks
from tests.conftest import ENCODER_DECODER_TYPES

Tiny = Callable[..., Any]


@pytest.fixture(params=["bart", "t5"])
def model(request: pytest.FixtureRequest, tiny_model: Tiny) -> Any:
    return tiny_model(request.param, "seq2seq-lm")


@pytest.mark.parametrize("model_type", ENCODER_DECODER_TYPES)
def test_labels_are_shifted_as_in_the_models_own_loss(
    model_type: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    """mBART starts with the last token, which names the language; others with a start token."""
    model = tiny_model(model_type, "seq2seq-lm")
    heard = "whisper" if model_type == "whisper" else "bert"
    batch = {
        n: v for n, v in tiny_batch(2, 5, model_type=heard).items() if n != "decoder_input_ids"
    }
    batch["labels"] = torch.tensor([[7, 8, 4], [9, 4, -100]])
    with torch.no_grad():
        expected = model(**batch).logits
    batch = dict(add_signal_token_mask(model, layout_of(model), batch))
    prepared = add_decoder_inputs(model, batch)
    start = 4 if model_type == "mbart" else model.config.decoder_start_token_id
    assert prepared["decoder_input_ids"].tolist() == [[start, 7, 8], [start, 9, 4]]
    with torch.no_grad():
        assert torch.equal(model(**model_inputs(prepared)).logits, expected)
    assert add_decoder_inputs(model, prepared) is prepared
    layout, tokens = layout_of(model), decoder_token_mask(prepared)
    assert tokens.tolist() == [[True] * 3] * 2
    assert torch.equal(block_token_mask(layout, layout.blocks[0], prepared), token_mask(batch))
    assert torch.equal(block_token_mask(layout, layout.blocks[-1], prepared), tokens)


@pytest.mark.parametrize("model_type", ENCODER_DECODER_TYPES)
def test_a_classifier_shifts_its_inputs(
    model_type: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    classifier, batch = tiny_model(model_type), tiny_batch(model_type=model_type)
    prepared = add_decoder_inputs(classifier, {**batch, "labels": torch.zeros(4, dtype=torch.long)})
    with torch.no_grad():
        found = classifier(**model_inputs(prepared)).logits
        assert torch.equal(found, classifier(**batch).logits)


def test_given_decoder_inputs_stay_and_their_padding_is_masked(
    model: Any, tiny_batch: Tiny
) -> None:
    ids = torch.tensor([[0, 7, 8], [0, 9, 0]])  # T5 starts with the padding token
    batch = {**tiny_batch(2, 5, model_type="bart"), "decoder_input_ids": ids}
    prepared = add_decoder_inputs(model, batch)
    assert prepared["decoder_input_ids"] is ids
    assert decoder_token_mask(prepared).tolist() == [[True, True, True], [True, True, False]]
    given = {**batch, "decoder_attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    assert decoder_token_mask(add_decoder_inputs(model, given)).sum() == 3


def test_a_generator_without_decoder_inputs_is_refused(model: Any, tiny_batch: Tiny) -> None:
    batch = tiny_batch(2, 5, model_type="bart")
    with pytest.raises(UserError, match="has a decoder, which needs decoder_input_ids .* labels"):
        add_decoder_inputs(model, batch)


def test_an_unknown_start_token_is_refused(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    model = tiny_model("t5", "seq2seq-lm")
    model.config.decoder_start_token_id = None
    batch = {**tiny_batch(2, 5, model_type="t5"), "labels": torch.tensor([[7, 3], [8, 3]])}
    with pytest.raises(UserError, match="needs decoder_input_ids"):
        add_decoder_inputs(model, batch)


def first(output: Any) -> Tensor:
    """The hidden states of a layer's output."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


@pytest.mark.parametrize("empty", [None, "layer.1.heads", "layer.2.cross_heads", "layer.3.heads"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_the_decoder_replayed_is_the_full_forward_pass(
    model: Any, empty: str | None, padding: str, tiny_batch: Tiny
) -> None:
    layout = layout_of(model)
    masks = full_masks(layout)
    for block, mask in zip(layout.blocks, masks, strict=True):
        mask[: block.num_units if block.name == empty else 1] = 0
    net = compact(model, layout, masks)
    written = tiny_batch(4, 6, seed=5)["input_ids"]
    batch = tiny_batch(padding=padding, model_type="bart")
    batch = dict(add_decoder_inputs(net, {**batch, "decoder_input_ids": written}))
    tokens = decoder_token_mask(batch)
    assert not tokens.all()
    leaving: list[Tensor] = []
    handles = [
        net.get_submodule(path).register_forward_hook(lambda *args: leaving.append(first(args[2])))
        for path in layout.layers
    ]
    with torch.no_grad():
        net(**model_inputs(batch))
        for handle in handles:
            handle.remove()
        given = inputs_with_encoder_output(batch, encoder_output(net, batch))
        hidden, calls = layer_calls(net, layout, batch, decoder_inputs=given)
        for number in layout.layer_indices(decoder=True):
            hidden = unpack(pack(hidden, tokens), tokens)
            hidden = run_layer(net, layout.layers[number], hidden, calls)
            expected = pack(leaving[number], tokens)
            torch.testing.assert_close(pack(hidden, tokens), expected, rtol=1e-4, atol=1e-5)
    assert (leaving[3] - leaving[2]).abs().max() > 0.1
