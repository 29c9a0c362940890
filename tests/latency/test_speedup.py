"""Two models are timed in turn on the typical batch, in eval mode and without gradients.

Without these tests, one model could be timed under better conditions than the other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rfprune.latency.speedup import measure_latency
from rfprune.latency.timed_batch import timed_batch, typical_batch
from rfprune.latency.timing import DEFAULT_BUDGET, TimingBudget
from tests.latency.test_table import CONDITIONS, TABLE


class Recorded(nn.Module):
    """A model that records each call."""

    def __init__(self, name: str, calls: list[str]) -> None:
        super().__init__()
        self.name, self.calls, self.device = name, calls, torch.device("cpu")
        self.inputs: set[str] = set()

    def forward(self, **inputs: Any) -> None:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.inputs = set(inputs)
        self.calls.append(self.name)


def batch(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    ones = torch.ones(rows, tokens, dtype=torch.long)
    return {"input_ids": ones, "attention_mask": ones, "labels": ones}


def test_models_alternate_and_swap_places_every_round() -> None:
    calls: list[str] = []
    models = Recorded("original", calls), Recorded("pruned", calls)
    measured = measure_latency(*models, batch(2, 3), TimingBudget(max_rounds=6, tolerance=0))
    timed = calls[2 * DEFAULT_BUDGET.warm_up_rounds :]
    assert timed == ["original", "pruned", "pruned", "original"] * 3
    assert (measured.rounds, measured.batch_size, measured.sequence_length) == (6, 2, 3)
    assert models[0].inputs == {"input_ids", "attention_mask"}, "labels are not timed"


def test_the_typical_batch_is_full_and_of_median_length() -> None:
    batches = [batch(4, 9), batch(4, 5), batch(4, 2), batch(1, 40)]
    assert typical_batch(batches)["input_ids"].shape == (4, 5)


def test_the_typical_batch_is_resized_to_the_shape_of_a_table(tiny_batch: Any) -> None:
    given = tiny_batch(3, 5)
    assert not given["attention_mask"].all()
    assert timed_batch([given]) is given
    resized = timed_batch([given], replace(TABLE, conditions=replace(CONDITIONS, batch_size=2)))
    assert {name: tuple(value.shape) for name, value in resized.items()} == dict.fromkeys(
        given, (2, CONDITIONS.sequence_length)
    )
    assert resized["attention_mask"].all(), "without padding"
    assert torch.equal(resized["input_ids"][:, :5], given["input_ids"][:2])
    images = {"pixel_values": torch.ones(1, 3, 8, 8)}
    assert timed_batch([images], TABLE)["pixel_values"].shape == (4, 3, 8, 8)
