"""Calls are timed in turn, with medians and a budget; on a simulated clock, so no time is judged.

Without these tests, a slow phase of the machine could be counted to one of the models compared, and
one slow call could pass for a model's speed.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from itertools import cycle, repeat
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rfprune.latency.timing import (
    DEFAULT_BUDGET,
    Ratio,
    Timing,
    TimingBudget,
    time_interleaved,
    time_ratio,
    time_ratios,
)

MIN_ROUNDS, MAX_ROUNDS = DEFAULT_BUDGET.min_rounds, DEFAULT_BUDGET.max_rounds
WARM_UP = DEFAULT_BUDGET.warm_up_rounds
ENDLESS = 1e9
"""Seconds that no budget here runs out of."""


class Machine:
    """A simulated clock, and calls that advance it by given milliseconds."""

    def __init__(self) -> None:
        self.seconds = 100.0
        self.calls: list[str] = []

    def timer(self) -> float:
        return self.seconds

    def call(self, name: str, milliseconds: Iterator[float]) -> Callable[[], object]:
        def run() -> None:
            self.calls.append(name)
            self.seconds += next(milliseconds) / 1000

        return run

    def time(self, *calls: Callable[[], object], **budget: Any) -> list[Timing]:
        return time_interleaved(calls, "cpu", TimingBudget(**budget), timer=self.timer)

    def ratio(
        self, original: Iterator[float], pruned: Iterator[float], budget: TimingBudget
    ) -> Ratio:
        calls = self.call("original", original), self.call("pruned", pruned)
        return time_ratio(*calls, "cpu", budget, timer=self.timer)


@pytest.mark.parametrize("names", ["ab", "abc", "abcdefg"])
def test_rounds_start_with_another_call_and_no_call_always_follows_the_same_one(names: str) -> None:
    machine, num_calls = Machine(), len(names)
    calls = [machine.call(name, cycle([1.0, 9.0])) for name in names]
    timings = machine.time(*calls, max_rounds=6, min_rounds=6)
    assert [timing.rounds for timing in timings] == [6] * num_calls
    timed = "".join(machine.calls[num_calls * WARM_UP :])
    rounds = [timed[i : i + num_calls] for i in range(0, 6 * num_calls, num_calls)]
    assert all(sorted(one) == list(names) for one in rounds)
    assert "".join(one[0] for one in rounds) == (names * 6)[:6]
    before = [one[one.index(names[-1]) - 1] for one in rounds if one[0] != names[-1]]
    assert len(set(before)) == min(len(before), num_calls - 1)


def test_times_are_those_of_their_calls_in_any_order() -> None:
    machine = Machine()
    calls = [machine.call(str(ms), repeat(ms)) for ms in (1.0, 20.0, 300.0)]
    timings = machine.time(*calls, max_rounds=5)
    assert [timing.median_ms for timing in timings] == pytest.approx([1, 20, 300])
    assert [timing.spread for timing in timings] == pytest.approx([0, 0, 0], abs=1e-9)


def test_the_spread_is_half_the_interquartile_range_over_the_median() -> None:
    """Neither the warm-up nor a single slow round counts."""
    machine = Machine()
    warm_up = repeat(90.0, WARM_UP)
    (timing,) = machine.time(machine.call("a", iter([*warm_up, 8, 9, 10, 11, 100])), max_rounds=5)
    assert timing.median_ms == pytest.approx(10)
    assert timing.spread == pytest.approx(0.1)
    assert timing.error == pytest.approx(1.858 * 0.1 / math.sqrt(5), rel=1e-3)
    assert Timing(5.0, 0.0, 1).error == math.inf, "one round does not show its error"


def test_steady_medians_stop_at_once_and_unsteady_ones_continue() -> None:
    machine = Machine()
    steady = machine.call("a", repeat(5.0))
    assert machine.time(steady)[0].rounds == MIN_ROUNDS
    assert machine.time(steady, tolerance=0, max_rounds=20)[0].rounds == 20
    unsteady = machine.call("b", cycle([5.0, 6.0, 7.0]))
    assert machine.time(unsteady, seconds=ENDLESS)[0].rounds == MAX_ROUNDS
    (timing,) = machine.time(unsteady, seconds=ENDLESS, max_rounds=10**6)
    assert MAX_ROUNDS < timing.rounds < 10**4
    assert timing.error < 0.01


def test_a_short_call_need_not_be_steadier_than_the_long_ones() -> None:
    machine = Machine()
    short = machine.call("short", cycle([1.0, 2.0, 3.0]))
    timings = machine.time(short, machine.call("long", repeat(1000.0)), seconds=ENDLESS)
    assert timings[0].rounds == MIN_ROUNDS
    assert timings[0].error > 0.1


def test_no_round_starts_that_would_end_too_late_except_the_first() -> None:
    machine = Machine()
    call = machine.call("a", cycle([900.0, 1100.0]))
    assert machine.time(call, seconds=20)[0].rounds == 20 - WARM_UP
    assert machine.time(call, seconds=-1)[0].rounds == MIN_ROUNDS


@given(st.floats(1.5, 20))
def test_slow_phases_of_the_machine_cancel_in_the_ratio(slowdown: float) -> None:
    """Every other round is slow, so the medians of the two models say nothing."""
    original, pruned = cycle([10.0, 10.0 * slowdown]), cycle([4.0, 4.0 * slowdown])
    ratio = Machine().ratio(original, pruned, TimingBudget(min_rounds=6))
    assert ratio.ratio == pytest.approx(0.4)
    assert ratio.spread == pytest.approx(0, abs=1e-6)
    assert ratio.original.spread > 0.1
    assert ratio.original.rounds == ratio.pruned.rounds == 6


def test_several_are_compared_with_one_in_the_same_rounds() -> None:
    machine = Machine()
    original = machine.call("original", cycle([10.0, 30.0]))
    halves = machine.call("halves", cycle([5.0, 15.0]))
    unsteady = machine.call("unsteady", cycle([2.0, 3.0, 4.0]))
    budget = TimingBudget(ENDLESS)
    ratios = time_ratios(original, [halves, unsteady], "cpu", budget, timer=machine.timer)
    assert ratios[0].ratio == pytest.approx(0.5)
    assert ratios[0].spread == pytest.approx(0)
    assert ratios[1].ratio == pytest.approx(2 / 10, abs=0.12)
    assert ratios[0].pruned.rounds == ratios[1].pruned.rounds == MAX_ROUNDS
    assert 0 < ratios[1].error < ratios[1].spread
    assert ratios[1].original == ratios[0].original
    assert machine.calls.count("halves") == machine.calls.count("original")


@given(st.floats(1.5, 20), st.integers(0, 4))
def test_slow_rounds_can_be_normalised(slowdown: float, slow_call: int) -> None:
    """Every other round is slow, and one call in each round is slow on its own."""
    machine = Machine()
    own = [1.0, 2.0, 3.0, 4.0, 50.0]

    def times(call: int) -> Iterator[float]:
        for number in range(100):
            pace = slowdown if number % 2 else 1.0
            yield own[call] * pace * (30 if (number + call) % 5 == slow_call else 1)

    def measured(*, normalise_rounds: bool) -> list[Timing]:
        return time_interleaved(
            [machine.call(str(i), times(i)) for i in range(len(own))],
            "cpu",
            TimingBudget(ENDLESS, max_rounds=20, tolerance=0, warm_up_rounds=0),
            normalise_rounds=normalise_rounds,
            timer=machine.timer,
        )

    normalised, plain = measured(normalise_rounds=True), measured(normalise_rounds=False)
    medians = [timing.median_ms for timing in normalised]
    assert [ms / medians[0] for ms in medians] == pytest.approx(own)
    assert plain[0].spread > 0.1 > normalised[0].spread
    assert 1 <= medians[0] * (1 + 1e-6)
    assert medians[0] <= slowdown * (1 + 1e-6)


def test_garbage_collection_is_off_meanwhile_and_on_again_after_an_error() -> None:
    seen = []

    def call() -> None:
        seen.append(gc.isenabled())
        if len(seen) > 20:
            raise KeyboardInterrupt

    assert gc.isenabled()
    time_interleaved([call], "cpu", TimingBudget(max_rounds=3))
    assert gc.isenabled()
    with pytest.raises(KeyboardInterrupt):
        time_interleaved([call], "cpu", TimingBudget(tolerance=0))
    assert gc.isenabled()
    assert set(seen) == {False}


def test_a_bar_shows_the_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine()
    call = machine.call("a", cycle([900.0, 1100.0]))
    time_interleaved([call], "cpu", TimingBudget(20), progress=True, timer=machine.timer)
    assert "at most 20 s" in capsys.readouterr().err


@pytest.mark.cuda
def test_a_gpu_is_timed_until_its_work_is_done() -> None:
    """Without synchronisation both would take as long as a kernel launch."""
    small, large = (torch.randn(size, size, device="cuda") for size in (64, 4096))
    calls = [lambda: small @ small, lambda: large @ large]
    budget = TimingBudget(max_rounds=20)
    short, long = time_interleaved(calls, "cuda", budget)
    assert 0 < short.median_ms < long.median_ms
    assert time_ratio(calls[0], calls[1], "cuda", budget).ratio > 1
