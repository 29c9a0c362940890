"""Batches of model inputs: their entries, their token masks, and hidden states without padding.

Shapes: `B` examples, `S` tokens of the encoder (or of the only stack), `T` tokens of the decoder,
`d` hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rfprune.errors import UserError

Batch = Mapping[str, Tensor]
"""Model inputs by name, as a data collator makes them.

Entries: input_ids (B, S), or a signal (see `SIGNALS`); attention_mask (B, S), for raw audio
(B, samples); for encoder-decoders decoder_input_ids (B, T); and any other input of the model.
Multiple choice has (B, choices, S).
Labels (see `LABEL_NAMES`) and the two masks below are not passed to the model.
"""

LABEL_NAMES = ("labels", "start_positions", "end_positions")
"""Names of the labels in a batch: class indices or scores (B,), token labels (B, S), target tokens
(B, T), or the answer's first and last token (B,)."""

SIGNALS = ("pixel_values", "input_features", "input_values")
"""Inputs that the model itself turns into tokens: images (B, channels, height, width), spectrograms
(B, frequencies, frames), and audio (B, samples)."""

TOKEN_MASK = "rfprune_tokens"
"""Entry with the token mask (B, S) of a batch of images or audio; added by
`rfprune.model.layerwise.add_signal_token_mask`."""

DECODER_TOKEN_MASK = "rfprune_decoder_tokens"
"""Entry with the token mask (B, T) of the decoder; added by
`rfprune.model.encoder_decoder.add_decoder_inputs`."""

MAX_LOGITS = 2**25
"""Largest number of logits of a language model per batch: 128 MiB in float32, several times that
with gradients."""


def split_batch(model: PreTrainedModel, batch: Batch) -> list[Batch]:
    """Split a batch of a language model into batches of at most `MAX_LOGITS` logits.

    A language model computes a logit for every word of its vocabulary at every token. More batches
    also allow some examples to be held out when there are few.

    Returns:
        The batch alone if the model is no language model or the batch is small enough.
    """
    vocabulary = model.get_output_embeddings()
    tokens = batch.get("decoder_input_ids", batch.get("input_ids"))
    if vocabulary is None or tokens is None or len({len(values) for values in batch.values()}) > 1:
        return [batch]
    rows = max(1, MAX_LOGITS // (vocabulary.weight.shape[0] * tokens[0].numel()))
    number = max(1, -(-len(tokens) // rows))
    parts = {name: values.tensor_split(number) for name, values in batch.items()}
    return [dict(zip(parts, part, strict=True)) for part in zip(*parts.values(), strict=True)]


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """The entries of a batch that the model is called with: all but labels and our token masks."""
    excluded = (TOKEN_MASK, DECODER_TOKEN_MASK, *LABEL_NAMES)
    return {name: value for name, value in batch.items() if name not in excluded}


def token_mask(batch: Batch) -> Tensor:
    """(B, S) booleans: true at tokens, false at padding.

    In multiple choice every choice is a row: (B * choices, S).

    Raises:
        UserError: the batch has no inputs, or its attention mask is not one number per token.
    """
    if TOKEN_MASK in batch:
        return batch[TOKEN_MASK]
    inputs = batch.get("input_ids", batch.get("inputs_embeds"))
    if inputs is None or inputs.dim() < 2:
        raise UserError(
            f"a batch holds {', '.join(batch) or 'nothing'}, but a model needs input_ids (B, S), "
            "or pixel_values for images, or input_values or input_features for audio"
        )
    shape = inputs.shape if "input_ids" in batch else inputs.shape[:-1]
    mask = batch.get("attention_mask")
    if mask is None:
        mask = torch.ones(shape, device=inputs.device)
    if mask.shape != shape:
        raise UserError(
            f"an attention_mask of shape {tuple(mask.shape)} does not fit {tuple(shape)} tokens; "
            "give one number per token: 1, or 0 for padding"
        )
    return mask.bool().flatten(0, -2)


def decoder_token_mask(batch: Batch) -> Tensor:
    """(B, T) booleans: true at tokens of the decoder, false at padding."""
    return batch[DECODER_TOKEN_MASK]


def mean_tokens(batches: Sequence[Batch]) -> float:
    """Mean number of tokens per example, padding excluded."""
    return _mean_length([token_mask(batch) for batch in batches])


def mean_decoder_tokens(batches: Sequence[Batch]) -> float | None:
    """Mean number of the decoder's tokens per example; None without the decoder's token mask."""
    if DECODER_TOKEN_MASK not in batches[0]:
        return None
    return _mean_length([decoder_token_mask(batch) for batch in batches])


def _mean_length(masks: Sequence[Tensor]) -> float:
    return float(sum(int(mask.sum()) for mask in masks) / sum(len(mask) for mask in masks))


def first_examples(batches: Sequence[Batch], max_tokens: int) -> list[Batch]:
    """The first examples that have at most `max_tokens` tokens together; at least one example."""
    found: list[Batch] = []
    left = max_tokens
    for batch in batches:
        examples = max(map(len, batch.values()))
        masks = token_mask(batch).unflatten(0, (examples, -1))  # of all choices
        tokens = masks.sum((1, 2)).cumsum(0)
        rows = max(int((tokens <= left).sum()), 0 if found else 1)
        if rows:
            found.append({name: values[:rows] for name, values in batch.items()})
        if rows < len(tokens):
            break
        left -= int(tokens[-1])
    return found


def first_tokens(tokens: Tensor) -> Tensor:
    """(B, S) booleans: true at the first token of each example, with padding on either side."""
    return tokens & (tokens.cumsum(1) == 1)


def pack(hidden: Tensor, tokens: Tensor) -> Tensor:
    """Drop padding: hidden states (B, S, d) or (B * S, d) -> (tokens, d), on the same device."""
    return hidden.reshape(-1, hidden.shape[-1])[tokens.flatten().to(hidden.device)]


def unpack(packed: Tensor, tokens: Tensor) -> Tensor:
    """Restore padding: (tokens, d) -> (B, S, d), with zeros, which attention masks ignore."""
    hidden = packed.new_zeros(*tokens.shape, packed.shape[-1])
    hidden[tokens] = packed
    return hidden
