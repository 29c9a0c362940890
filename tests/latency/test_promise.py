"""The corrections of a promised latency, on simulated devices whose true latency is known.

Without these tests, a promise could be missed without a warning, or the corrections could go on
forever on a noisy device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from rfprune.cost.constraint import Constraint, CostModel
from rfprune.errors import UserError
from rfprune.latency.promise import (
    MAX_CORRECTIONS,
    TOLERANCE,
    LatencyPromise,
    meet_latency,
    missed_latency_warnings,
)
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

Latency = Callable[[tuple[int, ...]], float]


def choose(costs: CostModel, budget: float) -> Masks:
    kept = allocate(ERRORS, costs, budget, cells=2048)
    return tuple(
        (torch.arange(len(table) - 1) < n).float() for table, n in zip(TABLES, kept, strict=True)
    )


def blocks_ms(kept: tuple[int, ...]) -> float:
    return COSTS.total(kept) - COSTS.constant


FULL = tuple(len(table) - 1 for table in TABLES)


def meet(ratio: float, true_ms: Latency) -> LatencyPromise:
    """The promise on a device without noise."""

    def measure(masks: Masks) -> tuple[float, float]:
        return true_ms(num_kept(masks)) / true_ms(FULL), 0.001

    masks, promise = meet_latency(COSTS, Constraint("latency", ratio), choose, measure, num_kept)
    assert promise.measured == measure(masks)[0]
    return promise


def meet_measured(ratio: float, measured: Sequence[float]) -> LatencyPromise:
    """The promise on a device that measures these fractions in turn."""
    found = iter(measured)
    constraint = Constraint("latency", ratio)
    return meet_latency(COSTS, constraint, choose, lambda _: (next(found), 0.001), num_kept)[1]


@given(
    factor=st.floats(0.4, 2.5),
    constant=st.floats(0.0, 30.0),
    ratio=st.floats(0.3, 0.95),
)
def test_it_is_met_where_the_table_is_wrong_by_a_factor_and_a_constant(
    factor: float, constant: float, ratio: float
) -> None:
    full = constant + factor * blocks_ms(FULL)
    assume(ratio > 1.1 * constant / full)  # else no sizes meet it
    assume(ratio * COSTS.original > 1.1 * COSTS.constant)
    promise = meet(ratio, lambda kept: constant + factor * blocks_ms(kept))
    assert promise.is_met
    assert not missed_latency_warnings(promise)
    assert promise.measured == pytest.approx(ratio, rel=TOLERANCE)
    assert len(promise.attempts) <= 3  # the table's steps may cost one more than the second


def test_a_correct_table_needs_one_attempt_and_a_wrong_one_a_correction() -> None:
    promise = meet(0.5, COSTS.total)
    assert len(promise.attempts) == 1
    assert promise.predicted == pytest.approx(promise.measured)
    promise = meet(0.6, lambda kept: 20.0 + blocks_ms(kept))
    first, last = promise.attempts[0], promise.attempts[promise.chosen]
    assert first.measured > 0.6 * (1 + TOLERANCE)
    assert last.measured == pytest.approx(0.6, rel=TOLERANCE)
    assert last.predicted == pytest.approx(last.measured, rel=0.01)


def test_an_unreachable_latency_ends_with_the_nearest_attempt_and_a_warning() -> None:
    promise = meet(0.5, lambda kept: 100.0 + blocks_ms(kept))  # nearly all of it is fixed
    assert not promise.is_met
    measured = [attempt.measured for attempt in promise.attempts]
    assert len(measured) > 2
    assert measured == sorted(measured, reverse=True)
    assert promise.measured == measured[-1]
    (warning,) = missed_latency_warnings(promise)
    for part in ("0.5", f"{promise.measured:.3g}", f"{len(measured)} attempts", "--constraint"):
        assert part in warning


@pytest.mark.parametrize(
    ("ratio", "measured", "chosen"),
    [
        (0.3, [0.95, 0.36, 0.3], 0.3),  # one bad measurement does not end it
        (0.5, [0.6, 0.42, 0.57, 0.43], 0.43),  # the faster of two misses
    ],
)
def test_the_chosen_attempt(ratio: float, measured: list[float], chosen: float) -> None:
    promise = meet_measured(ratio, measured)
    assert promise.measured == chosen
    warnings = missed_latency_warnings(promise)
    assert promise.is_met != any("no larger model was found" in warning for warning in warnings)


def test_noise_ends_after_the_last_correction_and_the_impossible_before_any_measurement() -> None:
    measured = np.random.default_rng(0).uniform(0.2, 0.9, 10).tolist()
    assert len(meet_measured(0.5, measured).attempts) <= 1 + MAX_CORRECTIONS
    with pytest.raises(UserError, match="cannot be met"):
        meet_measured(0.05, [])


def test_it_ends_when_the_same_sizes_or_no_sizes_are_chosen() -> None:
    masks = choose(COSTS, COSTS.budget(Constraint("latency", 0.5)))

    def choices(outcomes: list[Masks | UserError]) -> Callable[[CostModel, float], Masks]:
        def next_choice(*_: object) -> Masks:
            outcome = outcomes.pop(0)
            if isinstance(outcome, UserError):
                raise outcome
            return outcome

        return next_choice

    for second in (masks, UserError("no smaller sizes")):
        _, promise = meet_latency(
            COSTS,
            Constraint("latency", 0.5),
            choices([masks, second]),
            lambda _: (0.7, 0.001),
            num_kept,
        )
        assert [attempt.measured for attempt in promise.attempts] == [0.7]
    with pytest.raises(UserError, match="no sizes"):
        meet_latency(
            COSTS,
            Constraint("latency", 0.5),
            choices([UserError("no sizes")]),
            lambda _: (1, 0),
            num_kept,
        )
