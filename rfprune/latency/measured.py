"""The latency that a model really has, on the batch that a latency table is of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rfprune.latency.conditions import conditions_of
from rfprune.latency.profile import profile
from rfprune.latency.table import LatencyTable, check_table
from rfprune.latency.timing import time_ratio
from rfprune.model.batch import Batch
from rfprune.model.frozen import frozen
from rfprune.model.layout import layout_of

SECONDS = 20.0
MIN_ROUNDS = 7
MAX_ROUNDS = 200
TOLERANCE = 0.007
"""A ratio is steady enough to tell a promise that is kept within 3% from one that is not."""


def timed_batch(batches: Sequence[Batch], table: LatencyTable | None = None) -> Batch:
    """The typical batch, or one of the shape that a table is of, made from it."""
    batch = typical_batch(batches)
    if table is None:
        return batch
    return of_shape(batch, table.conditions.batch_size, table.conditions.sequence_length)


def typical_batch(batches: Sequence[Batch]) -> Batch:
    """A full batch of median length: what the model is likely to be fed."""
    largest = max(len(_main_input(batch)) for batch in batches)
    full = [batch for batch in batches if len(_main_input(batch)) == largest]
    return sorted(full, key=lambda batch: _main_input(batch).shape[1])[len(full) // 2]


def of_shape(batch: Batch, batch_size: int, length: int) -> Batch:
    """Rows and tokens of a batch repeated or cut to a shape; without padding where that changes
    anything."""
    rows, tokens = _main_input(batch).shape[:2]
    has_tokens = _main_input(batch).dim() == 2  # an image has no length to choose
    if rows == batch_size and (tokens == length or not has_tokens):
        return batch
    shaped = {}
    for name, value in batch.items():
        value = _repeated(value, batch_size, 0)
        if has_tokens and value.dim() == 2 and value.shape[1] == tokens:
            value = _repeated(value, length, 1)
            if name == "attention_mask":
                value = torch.ones_like(value)
        shaped[name] = value
    return shaped


def measured_ratio(
    original: PreTrainedModel, pruned: PreTrainedModel, batch: Batch
) -> tuple[float, float]:
    """How long a pruned model takes, as a fraction of the original's time, and the standard error
    of that, as a fraction of it; both end to end, in turn."""

    def run(model: Any) -> None:
        model(**batch)

    with torch.no_grad(), frozen(pruned):
        found = time_ratio(
            partial(run, original),
            partial(run, pruned),
            original.device,
            seconds=SECONDS,
            min_rounds=MIN_ROUNDS,
            max_rounds=MAX_ROUNDS,
            tolerance=TOLERANCE,
        )
    return found.ratio, found.error


def _main_input(batch: Batch) -> Tensor:
    """What a model reads: token ids (B, S), embeddings (B, S, d) or pixels (B, C, H, W)."""
    names = ("input_ids", "inputs_embeds", "pixel_values")
    return next(batch[name] for name in names if name in batch)


def _repeated(values: Tensor, size: int, dim: int) -> Tensor:
    times = [1] * values.dim()
    times[dim] = -(-size // values.shape[dim])
    return values.repeat(*times).narrow(dim, 0, size)


def table_for(
    path: Path | None,
    model: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    round_to: int | None = None,
    progress: bool = False,
) -> LatencyTable:
    """The latency table in a file, or, without one, of the model here and now.

    Raises:
        UserError: the file is none, or of another model or other conditions.
    """
    layout = layout_of(model)
    if path is None:
        return profile(model, layout, typical_batch(batches), round_to=round_to, progress=progress)
    table = LatencyTable.load(path)
    conditions = conditions_of(model, layout, timed_batch(batches, table))
    check_table(table, model, layout, conditions)
    return table
