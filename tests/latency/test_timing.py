"""Timing several callables in turn: order, medians, when it stops. A fake clock: no time is judged.

Deleting this lets a slow phase of the machine fall on one of the models that are compared, and one
hiccup count as its speed.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from itertools import cycle, repeat

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rfprune.latency.timing import (
    MAX_ROUNDS,
    MIN_ROUNDS,
    WARM_UP_ROUNDS,
    Timing,
    time_interleaved,
    time_ratio,
    time_ratios,
)


class Machine:
    """A clock, and callables that move it on by what they are said to take, in milliseconds."""

    def __init__(self) -> None:
        self.seconds = 100.0
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.seconds

    def call(self, name: str, milliseconds: Iterator[float]) -> Callable[[], object]:
        def run() -> None:
            self.calls.append(name)
            self.seconds += next(milliseconds) / 1000

        return run


def test_all_are_called_in_turn_and_each_round_starts_with_another() -> None:
    machine = Machine()
    calls = [machine.call(name, cycle([1.0, 9.0])) for name in "abc"]
    timings = time_interleaved(calls, "cpu", max_rounds=4, min_rounds=1, clock=machine.clock)
    timed = "".join(machine.calls[3 * WARM_UP_ROUNDS :])
    assert timed == "abcbaccabacb"
    assert [timing.rounds for timing in timings] == [4, 4, 4]


def test_with_two_they_take_turns_and_with_many_none_always_follows_the_same() -> None:
    machine = Machine()
    calls = [machine.call(name, repeat(1.0)) for name in "ab"]
    time_interleaved(calls, "cpu", max_rounds=3, min_rounds=3, clock=machine.clock)
    assert "".join(machine.calls[2 * WARM_UP_ROUNDS :]) == "abbaab"
    machine = Machine()
    calls = [machine.call(name, repeat(1.0)) for name in "abcdefg"]
    time_interleaved(calls, "cpu", max_rounds=6, min_rounds=6, clock=machine.clock)
    timed = "".join(machine.calls[7 * WARM_UP_ROUNDS :])
    rounds = [timed[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(one) == list("abcdefg") for one in rounds)
    assert "".join(one[0] for one in rounds) == "abcdef"
    before = [one[one.index("g") - 1] for one in rounds if one[0] != "g"]
    assert len(set(before)) == len(before) == 6


def test_times_belong_to_their_calls_whatever_the_order() -> None:
    machine = Machine()
    calls = [machine.call(str(ms), repeat(ms)) for ms in (1.0, 20.0, 300.0)]
    timings = time_interleaved(calls, "cpu", max_rounds=5, clock=machine.clock)
    assert [timing.median_ms for timing in timings] == pytest.approx([1, 20, 300])
    assert [timing.spread for timing in timings] == pytest.approx([0, 0, 0], abs=1e-9)


def test_one_hiccup_does_not_count_nor_does_the_warm_up() -> None:
    machine = Machine()
    call = machine.call("a", iter([*repeat(90.0, WARM_UP_ROUNDS), 3.0, 3.0, 100.0, 3.0, 3.0]))
    (timing,) = time_interleaved([call], "cpu", max_rounds=5, clock=machine.clock)
    assert timing.median_ms == pytest.approx(3)


def test_the_spread_is_half_the_interquartile_range_over_the_median() -> None:
    machine = Machine()
    call = machine.call("a", cycle([8.0, 9.0, 10.0, 11.0, 12.0]))
    (timing,) = time_interleaved([call], "cpu", max_rounds=5, warm_up_rounds=0, clock=machine.clock)
    assert timing.median_ms == pytest.approx(10)
    assert timing.spread == pytest.approx(0.1)
    assert timing.error == pytest.approx(1.858 * 0.1 / math.sqrt(5), rel=1e-3)


def test_steady_medians_end_it_at_once_and_unsteady_ones_go_on() -> None:
    machine = Machine()
    steady = machine.call("a", repeat(5.0))
    (timing,) = time_interleaved([steady], "cpu", clock=machine.clock)
    assert timing.rounds == MIN_ROUNDS
    unsteady = machine.call("b", cycle([5.0, 6.0, 7.0]))
    (timing,) = time_interleaved([unsteady], "cpu", seconds=1e9, clock=machine.clock)
    assert timing.rounds == MAX_ROUNDS
    (timing,) = time_interleaved(
        [unsteady], "cpu", seconds=1e9, max_rounds=10**6, clock=machine.clock
    )
    assert MAX_ROUNDS < timing.rounds < 10**4
    assert timing.error < 0.01


def test_no_tolerance_uses_all_rounds() -> None:
    machine = Machine()
    call = machine.call("a", repeat(5.0))
    (timing,) = time_interleaved([call], "cpu", tolerance=0, max_rounds=20, clock=machine.clock)
    assert timing.rounds == 20


def test_a_short_call_beside_long_ones_need_not_be_steadier_than_they() -> None:
    machine = Machine()
    short = machine.call("short", cycle([1.0, 2.0, 3.0]))
    calls = [short, machine.call("long", repeat(1000.0))]
    timings = time_interleaved(calls, "cpu", seconds=1e9, clock=machine.clock)
    assert timings[0].rounds == MIN_ROUNDS
    assert timings[0].error > 0.1


def test_no_round_begins_that_would_end_too_late_except_the_least() -> None:
    machine = Machine()
    call = machine.call("a", cycle([900.0, 1100.0]))
    (timing,) = time_interleaved([call], "cpu", seconds=20, clock=machine.clock)
    assert timing.rounds == 20 - WARM_UP_ROUNDS
    (timing,) = time_interleaved([call], "cpu", seconds=-1, clock=machine.clock)
    assert timing.rounds == MIN_ROUNDS


@given(st.floats(1.5, 20))
def test_phases_of_the_machine_cancel_in_the_ratio(slowdown: float) -> None:
    """Half of the rounds on a machine that others use too: the medians apart say nothing."""
    machine = Machine()
    original = machine.call("original", cycle([10.0, 10.0 * slowdown]))
    pruned = machine.call("pruned", cycle([4.0, 4.0 * slowdown]))
    ratio = time_ratio(original, pruned, "cpu", min_rounds=6, clock=machine.clock)
    assert ratio.ratio == pytest.approx(0.4)
    assert ratio.spread == pytest.approx(0, abs=1e-6)
    assert ratio.original.spread > 0.1
    assert ratio.original.rounds == ratio.pruned.rounds == 6


def test_an_unsteady_ratio_takes_its_time() -> None:
    machine = Machine()
    original = machine.call("original", cycle([10.0, 12.0, 9.0]))
    pruned = machine.call("pruned", repeat(5.0))
    ratio = time_ratio(original, pruned, "cpu", seconds=1e9, clock=machine.clock)
    assert ratio.pruned.rounds == MAX_ROUNDS
    assert ratio.ratio == pytest.approx(0.5)
    assert 0 < ratio.error < ratio.spread


def test_several_are_compared_with_one_in_the_same_rounds() -> None:
    machine = Machine()
    original = machine.call("original", cycle([10.0, 30.0]))
    halves = machine.call("halves", cycle([5.0, 15.0]))
    unsteady = machine.call("unsteady", cycle([2.0, 3.0, 4.0]))
    ratios = time_ratios(original, [halves, unsteady], "cpu", seconds=1e9, clock=machine.clock)
    assert ratios[0].ratio == pytest.approx(0.5)
    assert ratios[0].spread == pytest.approx(0)
    assert ratios[1].ratio == pytest.approx(2 / 10, abs=0.12)
    assert ratios[0].pruned.rounds == ratios[1].pruned.rounds == MAX_ROUNDS
    assert ratios[1].original == ratios[0].original
    assert machine.calls.count("halves") == machine.calls.count("original")


@given(st.floats(1.5, 20), st.integers(0, 4))
def test_slow_rounds_can_be_levelled_among_many_calls(slowdown: float, hiccup: int) -> None:
    """Half of the rounds are slow, and one of the calls stumbles in each."""
    machine = Machine()
    own = [1.0, 2.0, 3.0, 4.0, 50.0]

    def times(call: int) -> Iterator[float]:
        for number in range(100):
            pace = slowdown if number % 2 else 1.0
            yield own[call] * pace * (30 if (number + call) % 5 == hiccup else 1)

    def calls() -> list[Callable[[], object]]:
        return [machine.call(str(i), times(i)) for i in range(len(own))]

    def measured(*, level: bool) -> list[Timing]:
        return time_interleaved(
            calls(),
            "cpu",
            seconds=1e9,
            max_rounds=20,
            warm_up_rounds=0,
            level=level,
            tolerance=0,
            clock=machine.clock,
        )

    levelled, plain = measured(level=True), measured(level=False)
    medians = [timing.median_ms for timing in levelled]
    assert [ms / medians[0] for ms in medians] == pytest.approx(own)
    assert plain[0].spread > 0.1 > levelled[0].spread
    assert 1 <= medians[0] * (1 + 1e-6)
    assert medians[0] <= slowdown * (1 + 1e-6)


def test_one_round_says_nothing_about_its_error() -> None:
    assert Timing(5.0, 0.0, 1).error == math.inf


def test_the_garbage_collector_rests_meanwhile_and_goes_on_also_after_an_error() -> None:
    seen = []

    def call() -> None:
        seen.append(gc.isenabled())
        if len(seen) > 20:
            raise KeyboardInterrupt

    assert gc.isenabled()
    time_interleaved([call], "cpu", max_rounds=3)
    assert gc.isenabled()
    with pytest.raises(KeyboardInterrupt):
        time_interleaved([call], "cpu", max_rounds=50, tolerance=0)
    assert gc.isenabled()
    assert set(seen) == {False}


def test_a_bar_goes_on_with_the_clock(capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine()
    call = machine.call("a", cycle([900.0, 1100.0]))
    time_interleaved([call], "cpu", seconds=20, progress=True, clock=machine.clock)
    assert "at most 20 s" in capsys.readouterr().err


@pytest.mark.cuda
def test_the_gpu_is_timed_to_the_end_of_its_work() -> None:
    """Without waiting both would take as long as it takes to ask for them."""
    small, large = (torch.randn(size, size, device="cuda") for size in (64, 4096))
    calls = [lambda: small @ small, lambda: large @ large]
    short, long = time_interleaved(calls, "cuda", max_rounds=20)
    assert 0 < short.median_ms < long.median_ms
    ratio = time_ratio(calls[0], calls[1], "cuda", max_rounds=20)
    assert ratio.ratio > 1
