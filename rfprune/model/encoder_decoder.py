"""Encoder-decoders: the decoder's tokens, and running the decoder on a given encoder output.

A batch holds the encoder's inputs, and `decoder_input_ids` (B, T) or `labels` (B, T). From labels
the model itself makes decoder inputs, as its loss does: shifted to the right by one.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from rfprune.errors import UserError
from rfprune.model.batch import (
    DECODER_TOKEN_MASK,
    SIGNALS,
    Batch,
    decoder_token_mask,
    model_inputs,
    pack,
    token_mask,
    unpack,
)
from rfprune.model.layerwise import first_call
from rfprune.model.layout import Block, Layout
from rfprune.model.residency import execution_device


def add_decoder_inputs(model: PreTrainedModel, batch: Batch) -> Batch:
    """Add the decoder's input ids and its token mask to a batch that lacks them.

    Raises:
        UserError: the batch has neither decoder_input_ids nor labels to make them from.
    """
    if DECODER_TOKEN_MASK in batch:
        return batch
    ids = batch.get("decoder_input_ids")
    if ids is None:
        ids = _shifted(model, batch)
    mask = batch.get("decoder_attention_mask")
    if mask is None:
        mask = ids != model.config.pad_token_id
        mask[:, 0] = True  # the start token, which may be the padding token
    return {**batch, "decoder_input_ids": ids, DECODER_TOKEN_MASK: mask.bool()}


def _shifted(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Decoder input ids (B, T): the labels of a generator, or the inputs of a classifier, shifted.

    The first token differs by family, so the model itself runs up to its decoder.
    """
    inputs: dict[str, Any] = model_inputs(batch)
    generates = model.can_generate()
    if generates:
        inputs["labels"] = batch.get("labels")
    device = execution_device(model)
    states = torch.zeros(*token_mask(batch).shape, model.config.hidden_size, device=device)
    inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=states)
    call = None
    if not generates or "labels" in batch:  # without labels a BART would shift its inputs
        with suppress(ValueError), torch.no_grad():  # raised where a start token is not configured
            call = first_call(model.base_model.decoder, lambda: model(**inputs))
    ids: Tensor | None = None if call is None else call.kwargs.get("input_ids")
    if ids is None:
        raise UserError(
            f"a batch holds {', '.join(batch)}, but this {type(model).__name__} has a decoder, "
            "which needs decoder_input_ids (B, T), or labels (B, T) to make them from"
        )
    return ids


def block_token_mask(layout: Layout, block: Block, batch: Batch) -> Tensor:
    """(B, S) or (B, T) booleans: the token mask of the stack that a block is in."""
    return decoder_token_mask(batch) if layout.in_decoder(block) else token_mask(batch)


def encoder_output(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The encoder's output without padding, (tokens, d)."""
    hidden: Tensor = model.get_encoder()(
        **encoder_inputs(batch), return_dict=True
    ).last_hidden_state
    return pack(hidden, token_mask(batch))


def encoder_inputs(batch: Batch) -> dict[str, Tensor]:
    """Inputs that run the encoder alone."""
    names = ("input_ids", "inputs_embeds", "attention_mask", *SIGNALS)
    return {name: value for name, value in model_inputs(batch).items() if name in names}


def inputs_with_encoder_output(batch: Batch, packed: Tensor) -> dict[str, object]:
    """Model inputs that run the decoder alone, on a result of `encoder_output`."""
    return decoder_inputs(batch, unpack(packed, token_mask(batch)))


def decoder_inputs(batch: Batch, encoded: Tensor) -> dict[str, object]:
    """Model inputs that run the decoder alone, on an encoder's output (B, S, d)."""
    return {**model_inputs(batch), "encoder_outputs": BaseModelOutput(last_hidden_state=encoded)}
