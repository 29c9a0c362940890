"""Wall-clock time of two models on the same batch, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Few enough to end in seconds, enough for a steady median.
MIN_ROUNDS = 5
MAX_ROUNDS = 50
SECONDS = 6.0
WARM_UP_ROUNDS = 2


@dataclass(frozen=True)
class Latency:
    """Median milliseconds of a forward pass, and the conditions under which they hold."""

    original_ms: float
    pruned_ms: float
    batch_size: int
    sequence_length: int
    rounds: int
    threads: int


def typical_batch(batches: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """A full batch of median length: what the model is likely to be fed."""
    largest = max(len(batch["input_ids"]) for batch in batches)
    full = [batch for batch in batches if len(batch["input_ids"]) == largest]
    return sorted(full, key=lambda batch: batch["input_ids"].shape[1])[len(full) // 2]


def measure_latency(
    original: Any,
    pruned: Any,
    batch: Mapping[str, Tensor],
    *,
    seconds: float = SECONDS,
    max_rounds: int = MAX_ROUNDS,
) -> Latency:
    """Time both models on one batch (B, S), in turn, and take the medians.

    They alternate, and swap places every round, so that a machine that slows down or heats up
    slows both alike. Stops after `max_rounds` or `seconds`, but not before `MIN_ROUNDS`.
    """
    inputs = {
        name: value.to(original.device)
        for name, value in batch.items()
        if name in ("input_ids", "attention_mask", "token_type_ids")
    }
    models = (original.eval(), pruned.eval())
    with torch.inference_mode():
        medians, rounds = median_seconds(
            [partial(_time, model, inputs) for model in models],
            seconds=seconds,
            max_rounds=max_rounds,
        )
    return Latency(
        original_ms=1000 * medians[0],
        pruned_ms=1000 * medians[1],
        batch_size=inputs["input_ids"].shape[0],
        sequence_length=inputs["input_ids"].shape[1],
        rounds=rounds,
        threads=torch.get_num_threads(),
    )


def median_seconds(
    timed: Sequence[Callable[[], float]], *, seconds: float, max_rounds: int
) -> tuple[list[float], int]:
    """Medians of what each of `timed` says it took, all in turn, and the number of rounds.

    Every round starts with another one; see `measure_latency`.
    """
    times: list[list[float]] = [[] for _ in timed]
    for _ in range(WARM_UP_ROUNDS):
        for one in timed:
            one()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < max_rounds:
        for position in range(len(timed)):
            which = (position + rounds) % len(timed)
            times[which].append(timed[which]())
        rounds += 1
        if time.perf_counter() > end and rounds >= MIN_ROUNDS:
            break
    return [statistics.median(own) for own in times], rounds


def _time(model: Any, inputs: Mapping[str, Tensor]) -> float:
    """Seconds of one forward pass, to the end of the device's work."""
    _wait(inputs["input_ids"].device)
    start = time.perf_counter()
    model(**inputs)
    _wait(inputs["input_ids"].device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
