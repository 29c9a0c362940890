"""Encoder-decoders: which tokens the decoder has, and what it reads of the encoder.

A batch holds the encoder's inputs, and `decoder_input_ids` (B, T) or `labels` (B, T), from which
they are made as the model's own loss makes them: shifted to the right by one.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from rfprune.errors import UserError
from rfprune.model.batch import (
    DECODER_TOKEN_MASK,
    Batch,
    decoder_token_mask,
    model_inputs,
    pack,
    token_mask,
    unpack,
)
from rfprune.model.layout import Block, Layout


def add_decoder_inputs(model: PreTrainedModel, batch: Batch) -> Batch:
    """The batch, with what the decoder of an encoder-decoder reads and which of that is real.

    Raises:
        UserError: there is nothing that a decoder could read.
    """
    if DECODER_TOKEN_MASK in batch:
        return batch
    ids = batch.get("decoder_input_ids")
    if ids is None:
        ids = _shifted(model, batch)
    mask = batch.get("decoder_attention_mask")
    if mask is None:
        mask = ids != model.config.pad_token_id
        mask[:, 0] = True  # where decoding starts, which may be written as padding is
    return {**batch, "decoder_input_ids": ids, DECODER_TOKEN_MASK: mask.bool()}


def _shifted(model: PreTrainedModel, batch: Batch) -> Tensor:
    """A language model reads its labels, a classifier its inputs, one token later.

    What comes first differs by family, so the model itself is run, as far as its decoder.
    """
    inputs: dict[str, Any] = model_inputs(batch)
    writes = model.can_generate()  # without labels a BART would read its inputs again
    if writes:
        inputs["labels"] = batch.get("labels")
    nothing = torch.zeros(*token_mask(batch).shape, model.config.hidden_size, device=model.device)
    inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=nothing)
    seen: list[Tensor | None] = []

    def note(_: nn.Module, __: Any, given: dict[str, Any]) -> None:
        seen.append(given.get("input_ids"))
        raise _Stop

    handle = model.base_model.decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        if not writes or "labels" in batch:
            with suppress(_Stop, ValueError), torch.no_grad():  # it may not know what comes first
                model(**inputs)
    finally:
        handle.remove()
    ids = seen[0] if seen else None
    if ids is None:
        raise UserError(
            f"a batch holds {', '.join(batch)}, but this {type(model).__name__} has a decoder, "
            "which needs decoder_input_ids (B, T), or labels (B, T) to make them from"
        )
    return ids


class _Stop(Exception):
    """Ends a forward pass once the decoder's inputs have been seen."""


def block_token_mask(layout: Layout, block: Block, batch: Batch) -> Tensor:
    """(B, S) booleans: where the tokens are that a block computes; see `token_mask`."""
    return decoder_token_mask(batch) if layout.in_decoder(block) else token_mask(batch)


def encoder_output(model: PreTrainedModel, batch: Batch) -> Tensor:
    """What the decoder reads of the encoder, without padding, (tokens, d)."""
    names = ("input_ids", "inputs_embeds", "attention_mask")
    inputs = {name: value for name, value in model_inputs(batch).items() if name in names}
    hidden: Tensor = model.get_encoder()(**inputs, return_dict=True).last_hidden_state
    return pack(hidden, token_mask(batch))


def inputs_with_encoder_output(batch: Batch, packed: Tensor) -> dict[str, object]:
    """Inputs with which a model runs its decoder alone, on what `encoder_output` gave."""
    hidden = unpack(packed, token_mask(batch))
    return {**model_inputs(batch), "encoder_outputs": BaseModelOutput(last_hidden_state=hidden)}
