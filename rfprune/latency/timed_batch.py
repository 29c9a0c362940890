"""The batch that models are timed on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rfprune.latency.table import LatencyTable
from rfprune.model.batch import SIGNALS, Batch


def timed_batch(batches: Sequence[Batch], table: LatencyTable | None = None) -> Batch:
    """The typical batch, resized to the shape that `table` was measured at, if there is one."""
    batch = typical_batch(batches)
    if table is None:
        return batch
    return _resized(batch, table.conditions.batch_size, table.conditions.sequence_length)


def typical_batch(batches: Sequence[Batch]) -> Batch:
    """The batch of median length among those with the most rows."""
    largest = max(len(_main_input(batch)) for batch in batches)
    full = [batch for batch in batches if len(_main_input(batch)) == largest]
    return sorted(full, key=lambda batch: _main_input(batch).shape[1])[len(full) // 2]


def _resized(batch: Batch, batch_size: int, length: int) -> Batch:
    """Rows and tokens repeated or cut to (batch_size, length); a resized batch has no padding."""
    rows, tokens = _main_input(batch).shape[:2]
    has_tokens = "input_ids" in batch  # the model chooses the length of images and audio
    if rows == batch_size and (tokens == length or not has_tokens):
        return batch
    resized = {}
    for name, value in batch.items():
        value = _repeated(value, batch_size, 0)
        if has_tokens and value.dim() == 2 and value.shape[1] == tokens:
            value = _repeated(value, length, 1)
            if name == "attention_mask":
                value = torch.ones_like(value)
        resized[name] = value
    return resized


def _main_input(batch: Batch) -> Tensor:
    """Token ids (B, S), embeddings (B, S, d), or a signal (see `SIGNALS`)."""
    names = ("input_ids", "inputs_embeds", *SIGNALS)
    return next(batch[name] for name in names if name in batch)


def _repeated(values: Tensor, size: int, dim: int) -> Tensor:
    times = [1] * values.dim()
    times[dim] = -(-size // values.shape[dim])
    return values.repeat(*times).narrow(dim, 0, size)
