"""Encoder-decoders: which tokens the decoder has, and what it reads of the encoder.

A batch holds the encoder's inputs, and `decoder_input_ids` (B, T) or `labels` (B, T), from which
they are made as the model's own loss makes them: shifted to the right by one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from rfprune.errors import UserError
from rfprune.model.layout import Block, Layout
from rfprune.model.replay import DECODER_TOKENS, Batch, model_inputs, pack, token_mask, unpack

_LANGUAGE = "ForConditionalGeneration"


def with_decoder_tokens(model: PreTrainedModel, batch: Batch) -> Batch:
    """The batch, with what the decoder of an encoder-decoder reads and which of that is real.

    Raises:
        UserError: there is nothing that a decoder could read.
    """
    if DECODER_TOKENS in batch:
        return batch
    ids = batch.get("decoder_input_ids")
    if ids is None:
        ids = _shifted(model, batch)
    mask = batch.get("decoder_attention_mask")
    if mask is None:
        mask = ids != model.config.pad_token_id
        mask[:, 0] = True  # where decoding starts, which may be written as padding is
    return {**batch, "decoder_input_ids": ids, DECODER_TOKENS: mask.bool()}


def _shifted(model: PreTrainedModel, batch: Batch) -> Tensor:
    """A language model reads its labels, a classifier its inputs, one token later."""
    ids = batch.get("labels" if type(model).__name__.endswith(_LANGUAGE) else "input_ids")
    if ids is None:
        raise UserError(
            f"a batch holds {', '.join(batch)}, but this {type(model).__name__} has a decoder, "
            "which needs decoder_input_ids (B, T), or labels (B, T) to make them from"
        )
    config = model.config
    shifted = torch.full_like(ids, config.decoder_start_token_id)
    shifted[:, 1:] = ids[:, :-1].masked_fill(ids[:, :-1] == -100, config.pad_token_id)
    return shifted


def tokens_of(layout: Layout, block: Block, batch: Batch) -> Tensor:
    """(B, S) booleans: where the tokens are that a block computes; see `token_mask`."""
    return decoder_tokens(batch) if layout.in_decoder(block) else token_mask(batch)


def decoder_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """(B, T) booleans: true where there is a token of the decoder, false where there is padding."""
    return batch[DECODER_TOKENS]


def encoder_output(model: PreTrainedModel, batch: Batch) -> Tensor:
    """What the decoder reads of the encoder, without padding, (tokens, d)."""
    names = ("input_ids", "inputs_embeds", "attention_mask")
    inputs = {name: value for name, value in model_inputs(batch).items() if name in names}
    hidden: Tensor = model.get_encoder()(**inputs, return_dict=True).last_hidden_state
    return pack(hidden, token_mask(batch))


def with_encoder_output(batch: Batch, packed: Tensor) -> dict[str, object]:
    """Inputs with which a model runs its decoder alone, on what `encoder_output` gave."""
    hidden = unpack(packed, token_mask(batch))
    return {**model_inputs(batch), "encoder_outputs": BaseModelOutput(last_hidden_state=hidden)}
