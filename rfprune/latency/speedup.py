"""Wall-clock time of two models on the same batch, measured side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rfprune.latency import timing
from rfprune.latency.timing import time_interleaved

SECONDS = timing.SECONDS
MAX_ROUNDS = timing.MAX_ROUNDS


@dataclass(frozen=True)
class Latency:
    """Median milliseconds of a forward pass, and the conditions under which they hold."""

    original_ms: float
    pruned_ms: float
    batch_size: int
    sequence_length: int
    rounds: int
    threads: int


def measure_latency(
    original: Any,
    pruned: Any,
    batch: Mapping[str, Tensor],
    *,
    seconds: float | None = None,
    max_rounds: int | None = None,
) -> Latency:
    """Time both models on one batch (B, S), or of images, in turn, and take the medians.

    They alternate, and swap places every round; see `rfprune.latency.timing`. Stops after
    `max_rounds` (default: `MAX_ROUNDS`) or `seconds` (`SECONDS`), but not before a few rounds.
    """
    inputs = {
        name: value.to(original.device)
        for name, value in batch.items()
        if name in ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
    }
    with torch.no_grad():
        before, after = time_interleaved(
            [partial(model, **inputs) for model in (original.eval(), pruned.eval())],
            original.device,
            seconds=SECONDS if seconds is None else seconds,
            max_rounds=MAX_ROUNDS if max_rounds is None else max_rounds,
            tolerance=0,
        )
    read = inputs.get("input_ids", inputs.get("pixel_values"))
    assert read is not None
    return Latency(
        original_ms=before.median_ms,
        pruned_ms=after.median_ms,
        batch_size=len(read),
        sequence_length=read.shape[-1],
        rounds=before.rounds,
        threads=torch.get_num_threads(),
    )
