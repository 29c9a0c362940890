"""Embeddings: one vector of length one per example, from the hidden states of a model without a
head."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

POOLINGS = ("mean", "cls", "lasttoken")
"""How the last hidden states of an example are pooled: the mean over its tokens, its first token,
or its last token."""

POOLING_ENTRY = "sentence_pooling"
"""The entry of config.json that names the pooling; mean pooling without it."""


def pooling_of(config: Any) -> str:
    """The pooling that a configuration names."""
    return str(getattr(config, POOLING_ENTRY, None) or POOLINGS[0])


def embed(hidden: Tensor, tokens: Tensor, pooling: str) -> Tensor:
    """Compute embeddings as sentence-transformers does.

    Args:
        hidden: (B, S, d), the last hidden states.
        tokens: (B, S), 1 or true at tokens, 0 or false at padding on either side.
        pooling: one of `POOLINGS`.

    Returns:
        (B, d), each row of length one.
    """
    weights = tokens.to(hidden)
    if pooling == "cls":
        weights = weights * (weights.cumsum(1) == 1)
    elif pooling == "lasttoken":
        weights = weights * (weights.flip(1).cumsum(1).flip(1) == 1)
    pooled = (hidden * weights[:, :, None]).sum(1) / weights.sum(1).clamp_min(1)[:, None]
    return functional.normalize(pooled, dim=-1)
