"""The loop that keeps a promise of latency, against simulated devices whose true cost is known.

Deleting this lets a promise be broken in silence, or a search go on for ever on a noisy device.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from rfprune.cost.constraint import Constraint, CostModel
from rfprune.errors import UserError
from rfprune.latency.promise import CORRECTIONS, TOLERANCE, meet_latency, missed_latency_warnings
from rfprune.model.masks import Masks, num_kept
from rfprune.stages.allocate import allocate

HEADS, NEURONS = 12, 64
TABLES = tuple(
    table
    for _ in range(4)
    for table in (
        np.concatenate([[0.0], 0.3 + 0.2 * np.arange(1, HEADS + 1)]),
        np.ceil(np.arange(NEURONS + 1) / 4) * 0.12,
    )
)
COSTS = CostModel("latency", TABLES, constant=6.0)
ERRORS = [np.geomspace(3.0 + i, 0.01, len(table)) for i, table in enumerate(TABLES)]

Device = Callable[[tuple[int, ...]], float]


def choose(costs: CostModel, budget: float) -> Masks:
    kept = allocate(ERRORS, costs, budget, cells=2048)
    return tuple(
        (torch.arange(len(table) - 1) < n).float() for table, n in zip(TABLES, kept, strict=True)
    )


def simulated(true_ms: Device) -> Callable[[Masks], tuple[float, float]]:
    full = true_ms(tuple(len(table) - 1 for table in TABLES))
    return lambda masks: (true_ms(num_kept(masks)) / full, 0.001)


def prunable(kept: tuple[int, ...]) -> float:
    return COSTS.total(kept) - COSTS.constant


@given(
    factor=st.floats(0.4, 2.5),
    constant=st.floats(0.0, 30.0),
    ratio=st.floats(0.3, 0.95),
)
def test_it_converges_where_the_table_is_wrong_by_a_factor_and_a_constant(
    factor: float, constant: float, ratio: float
) -> None:
    def true_ms(kept: tuple[int, ...]) -> float:
        return constant + factor * prunable(kept)

    full = prunable(tuple(len(table) - 1 for table in TABLES))
    assume(ratio > 1.1 * constant / (constant + factor * full))  # else no choice keeps it
    assume(ratio * COSTS.original > 1.1 * COSTS.constant)
    masks, promise = meet_latency(COSTS, Constraint("latency", ratio), choose, simulated(true_ms))
    assert promise.is_kept
    assert not missed_latency_warnings(promise)
    assert promise.measured == pytest.approx(simulated(true_ms)(masks)[0])
    assert promise.measured == pytest.approx(ratio, rel=TOLERANCE)
    assert len(promise.attempts) <= 3  # the second is right but for steps of the table


def test_a_table_that_is_right_needs_one_attempt() -> None:
    _, promise = meet_latency(COSTS, Constraint("latency", 0.5), choose, simulated(COSTS.total))
    assert len(promise.attempts) == 1
    assert promise.predicted == pytest.approx(promise.measured)


def test_a_table_that_is_wrong_breaks_the_promise_unless_it_is_corrected() -> None:
    def true_ms(kept: tuple[int, ...]) -> float:
        return 20.0 + prunable(kept)

    _, promise = meet_latency(COSTS, Constraint("latency", 0.6), choose, simulated(true_ms))
    first, last = promise.attempts[0], promise.attempts[promise.chosen]
    assert first.measured > 0.6 * (1 + TOLERANCE)
    assert last.measured == pytest.approx(0.6, rel=TOLERANCE)
    assert last.predicted == pytest.approx(last.measured, rel=0.01)


def test_what_no_size_can_keep_ends_with_the_nearest_and_says_so() -> None:
    def true_ms(kept: tuple[int, ...]) -> float:
        return 100.0 + prunable(kept)  # nearly all of it stays whatever is pruned

    _, promise = meet_latency(COSTS, Constraint("latency", 0.5), choose, simulated(true_ms))
    assert not promise.is_kept
    measured = [attempt.measured for attempt in promise.attempts]
    assert len(measured) > 2
    assert measured == sorted(measured, reverse=True)
    assert promise.measured == measured[-1]
    (sentence,) = missed_latency_warnings(promise)
    assert "0.5 of the original's was asked for" in sentence
    assert "pruning gains less than that" in sentence


def test_one_bad_measurement_does_not_end_it() -> None:
    measured = iter([0.95, 0.36, 0.3])
    _, promise = meet_latency(
        COSTS, Constraint("latency", 0.3), choose, lambda masks: (next(measured), 0.001)
    )
    assert promise.is_kept


def test_noise_does_not_go_on_for_ever() -> None:
    generator = np.random.default_rng(0)
    _, promise = meet_latency(
        COSTS,
        Constraint("latency", 0.5),
        choose,
        lambda masks: (float(generator.uniform(0.2, 0.9)), 0.3),
    )
    assert len(promise.attempts) <= 1 + CORRECTIONS


def test_of_two_misses_the_faster_is_taken() -> None:
    measured = iter([0.6, 0.42, 0.57, 0.43])
    _, promise = meet_latency(
        COSTS, Constraint("latency", 0.5), choose, lambda masks: (next(measured), 0.001)
    )
    assert promise.measured == 0.43


def test_what_the_table_forbids_is_said_before_anything_is_measured() -> None:
    def measure(masks: Masks) -> tuple[float, float]:
        raise AssertionError("measured")

    with pytest.raises(UserError, match="cannot be met"):
        meet_latency(COSTS, Constraint("latency", 0.05), choose, measure)
