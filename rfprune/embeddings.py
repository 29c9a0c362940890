"""What a model without a head says about an example: one vector of length one."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

POOLINGS = ("mean", "cls", "lasttoken")
"""Of the last hidden states of an example: the mean over its tokens, its first, or its last one."""

POOLING_ENTRY = "sentence_pooling"
"""The entry of a configuration that names one of them; without it, it is the mean."""


def pooling_of(config: Any) -> str:
    """How the model of this configuration makes an embedding of its hidden states."""
    return str(getattr(config, POOLING_ENTRY, None) or POOLINGS[0])


def embed(hidden: Tensor, tokens: Tensor, pooling: str) -> Tensor:
    """Embeddings (B, d) of length one, as sentence-transformers makes them.

    Args:
        hidden: (B, S, d), the last hidden states.
        tokens: (B, S), 1 or true where there is a token, on whichever side the padding is.
        pooling: one of `POOLINGS`.
    """
    weights = tokens.to(hidden)
    if pooling == "cls":
        weights = weights * (weights.cumsum(1) == 1)
    elif pooling == "lasttoken":
        weights = weights * (weights.flip(1).cumsum(1).flip(1) == 1)
    pooled = (hidden * weights[:, :, None]).sum(1) / weights.sum(1).clamp_min(1)[:, None]
    return functional.normalize(pooled, dim=-1)
