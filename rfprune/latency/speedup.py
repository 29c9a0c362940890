"""Time a pruned model and its original on the same batch, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rfprune.latency.timing import TimingBudget, time_interleaved, time_ratio
from rfprune.model.batch import SIGNALS, Batch
from rfprune.model.frozen import frozen

SECONDS = 6.0
MAX_ROUNDS = 50

RATIO_BUDGET = TimingBudget(seconds=20.0, min_rounds=7, max_rounds=200, tolerance=0.007)
"""Steady enough to decide whether a promised latency is met within 3%."""


def report_budget() -> TimingBudget:
    """How long the times of a report are measured: `MAX_ROUNDS` rounds, at most `SECONDS`."""
    return TimingBudget(SECONDS, max_rounds=MAX_ROUNDS, tolerance=0)


_INPUTS = (
    *("input_ids", "attention_mask", "token_type_ids", *SIGNALS),
    *("decoder_input_ids", "decoder_attention_mask"),
)


@dataclass(frozen=True)
class Latency:
    """Median milliseconds of a forward pass, and the conditions under which they hold.

    Attributes:
        original_ms, pruned_ms: of the two models.
        batch_size: rows of the batch.
        sequence_length: tokens, or width in pixels of images.
        rounds: number of times that each model was timed.
        threads: of PyTorch on the CPU.
    """

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
    budget: TimingBudget | None = None,
) -> Latency:
    """Time both models on one batch in turn, and take the medians.

    Args:
        original, pruned: models on the same device; put into eval mode.
        batch: of texts (B, S) or images; labels are left out. The decoder of an encoder-decoder
            reads its tokens (B, T) in one pass.
        budget: when to stop (default: `report_budget()`).
    """
    inputs = {name: value.to(original.device) for name, value in batch.items() if name in _INPUTS}
    with torch.no_grad():
        before, after = time_interleaved(
            [partial(model, **inputs) for model in (original.eval(), pruned.eval())],
            original.device,
            budget or report_budget(),
        )
    main_input = next(inputs[name] for name in ("input_ids", *SIGNALS) if name in inputs)
    return Latency(
        original_ms=before.median_ms,
        pruned_ms=after.median_ms,
        batch_size=len(main_input),
        sequence_length=main_input.shape[-1],
        rounds=before.rounds,
        threads=torch.get_num_threads(),
    )


def measure_ratio(
    original: PreTrainedModel, pruned: PreTrainedModel, batch: Batch
) -> tuple[float, float]:
    """Time both models on one batch in turn.

    Returns:
        The time of `pruned` as a fraction of the original's, and the standard error of that
        fraction, as a fraction of it.
    """

    def run(model: Any) -> None:
        model(**batch)

    with torch.no_grad(), frozen(pruned):
        found = time_ratio(
            partial(run, original), partial(run, pruned), original.device, RATIO_BUDGET
        )
    return found.ratio, found.error
