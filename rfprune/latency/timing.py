"""Wall-clock time of several callables, measured side by side.

All are called in turn, round after round, each round in another order: a machine that slows down or
heats up slows all of them alike. Medians are taken over the rounds. Rounds go on until the medians
are steady or the budget is spent.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import torch
from tqdm.auto import tqdm

Call = Callable[[], object]
Timer = Callable[[], float]
"""Returns seconds since an arbitrary start, as `time.perf_counter` does."""

# Standard error of a median: 1.2533 sigma / sqrt(n), and sigma is 1.4826 times half the
# interquartile range, both for a normal distribution.
_ERROR_OF_SPREAD = 1.2533 * 1.4826


@dataclass(frozen=True)
class TimingBudget:
    """When a measurement stops.

    The defaults take seconds and give a steady median.

    Attributes:
        seconds: no round starts that would end later than this, warm-up included. The first
            `min_rounds` rounds are exempt.
        min_rounds: rounds to run in any case.
        max_rounds: rounds to run at most.
        tolerance: stop once the standard error of every result is below this fraction of it; 0
            never stops early.
        warm_up_rounds: rounds to run first and not count.
    """

    seconds: float = 6.0
    min_rounds: int = 5
    max_rounds: int = 50
    tolerance: float = 0.01
    warm_up_rounds: int = 2


DEFAULT_BUDGET = TimingBudget()


@dataclass(frozen=True)
class Timing:
    """How long a call takes.

    Attributes:
        median_ms: median of all rounds, in milliseconds.
        spread: half the interquartile range, as a fraction of the median.
        rounds: number of rounds, without the warm-up.
    """

    median_ms: float
    spread: float
    rounds: int

    @property
    def error(self) -> float:
        """Standard error of the median, as a fraction of it."""
        return _standard_error(self.spread, self.rounds)


@dataclass(frozen=True)
class Ratio:
    """How long one call takes as a fraction of another.

    Attributes:
        ratio: median over the rounds of pruned / original of the same round. A phase in which the
            machine is slow slows both and cancels.
        spread: half the interquartile range of these ratios, as a fraction of their median.
        original: time of the original alone.
        pruned: time of the pruned model alone.
    """

    ratio: float
    spread: float
    original: Timing
    pruned: Timing

    @property
    def error(self) -> float:
        """Standard error of the ratio, as a fraction of it."""
        return _standard_error(self.spread, self.original.rounds)


def time_interleaved(
    calls: Sequence[Call],
    device: torch.device | str,
    budget: TimingBudget = DEFAULT_BUDGET,
    *,
    normalise_rounds: bool = False,
    progress: bool = False,
    timer: Timer = time.perf_counter,
) -> list[Timing]:
    """Time every one of `calls`, all in turn.

    Args:
        calls: callables without arguments; their results are dropped.
        device: where the calls compute; on a GPU each is timed until its work is done.
        budget: when to stop. A median that is below the mean of all medians has to be as steady in
            milliseconds as one at that mean.
        normalise_rounds: divide every time by the slowness of its round, which cancels slow phases
            of the machine. Only for many calls: no single one may dominate a round.
        progress: whether to show a bar.
        timer: replaces the wall clock; on CUDA only the budget's seconds are taken from it.

    Returns:
        One `Timing` a call, in their order.
    """

    def timings_of(times: list[list[float]]) -> list[Timing]:
        return [_timing(own) for own in (_normalised(times) if normalise_rounds else times)]

    def is_steady(times: list[list[float]]) -> bool:
        timings = timings_of(times)
        mean = statistics.fmean(timing.median_ms for timing in timings)
        return all(
            timing.error * timing.median_ms < budget.tolerance * max(timing.median_ms, mean)
            for timing in timings
        )

    return timings_of(_time_rounds(calls, device, budget, is_steady, progress, timer))


def time_ratio(
    original: Call,
    pruned: Call,
    device: torch.device | str,
    budget: TimingBudget = DEFAULT_BUDGET,
    *,
    progress: bool = False,
    timer: Timer = time.perf_counter,
) -> Ratio:
    """Time `pruned` as a fraction of `original`; see `time_ratios`."""
    (ratio,) = time_ratios(original, [pruned], device, budget, progress=progress, timer=timer)
    return ratio


def time_ratios(
    original: Call,
    pruned: Sequence[Call],
    device: torch.device | str,
    budget: TimingBudget = DEFAULT_BUDGET,
    *,
    progress: bool = False,
    timer: Timer = time.perf_counter,
) -> list[Ratio]:
    """Time each of `pruned` as a fraction of `original`, all in turn; see `time_interleaved`.

    The tolerance of `budget` applies to the ratios, which are steadier than the times.
    """

    def ratios_of(times: list[list[float]]) -> list[Timing]:
        first, *others = times
        return [
            _timing(
                [own / base if base else math.nan for own, base in zip(each, first, strict=True)]
            )
            for each in others
        ]

    def is_steady(times: list[list[float]]) -> bool:
        return all(ratio.error < budget.tolerance for ratio in ratios_of(times))

    times = _time_rounds([original, *pruned], device, budget, is_steady, progress, timer)
    first, *others = (_timing(own) for own in times)
    return [
        Ratio(ratio.median_ms, ratio.spread, first, own)
        for ratio, own in zip(ratios_of(times), others, strict=True)
    ]


def _standard_error(spread: float, rounds: int) -> float:
    return _ERROR_OF_SPREAD * spread / math.sqrt(rounds) if rounds > 1 else math.inf


def _timing(values: Sequence[float]) -> Timing:
    if len(values) < 2:
        return Timing(values[0] if values else math.nan, 0.0, len(values))
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, (high - low) / (2 * median) if median else 0.0, len(values))


def _normalised(times: Sequence[Sequence[float]]) -> list[list[float]]:
    """Times by call and round, divided by the slowness of the round relative to the median round.

    The slowness of a round is the median over its calls: one slow call does not make a slow round.
    """
    usual = [statistics.geometric_mean([max(value, 1e-9) for value in own]) for own in times]
    slow = [
        statistics.median(value / own for value, own in zip(values, usual, strict=True)) or 1.0
        for values in zip(*times, strict=True)
    ]
    median = statistics.median(slow)
    return [[value * median / by for value, by in zip(own, slow, strict=True)] for own in times]


def _time_rounds(
    calls: Sequence[Call],
    device: torch.device | str,
    budget: TimingBudget,
    is_steady: Callable[[list[list[float]]], bool],
    progress: bool,
    timer: Timer,
) -> list[list[float]]:
    """Milliseconds by call and round, until `is_steady` is true or the budget is spent."""
    device, start = torch.device(device), timer()
    times: list[list[float]] = [[] for _ in calls]
    limit = max(1, round(budget.seconds))
    shape = "{desc} {percentage:3.0f}%|{bar}| {elapsed}, at most {total} s"
    with (
        _no_garbage_collection(),
        tqdm(
            total=limit, desc="timing", disable=not progress, leave=False, bar_format=shape
        ) as bar,
    ):

        def advance() -> None:
            bar.update(min(limit, timer() - start) - bar.n)

        for number in count(-budget.warm_up_rounds):
            round_start = timer()
            order = _order(number, len(calls))
            found = _time_all([calls[which] for which in order], device, timer, advance)
            if number < 0:
                continue
            for which, milliseconds in zip(order, found, strict=True):
                times[which].append(milliseconds)
            now, rounds = timer(), number + 1
            is_late = now + (now - round_start) - start > budget.seconds
            if rounds >= budget.max_rounds or (
                rounds >= budget.min_rounds and (is_late or is_steady(times))
            ):
                return times
    raise AssertionError("unreachable")


def _order(number: int, size: int) -> list[int]:
    """The order of the calls in a round.

    Each round starts with another call and changes which call follows which, since a call leaves
    traces in caches and allocator.
    """
    strides = [stride for stride in range(1, size + 1) if math.gcd(stride, size) == 1]
    stride = strides[number % len(strides)]
    return [(number + position * stride) % size for position in range(size)]


def _time_all(
    calls: Sequence[Call], device: torch.device, timer: Timer, advance: Callable[[], None]
) -> list[float]:
    """Milliseconds of each call; `advance` is called after each."""
    if device.type == "cuda":
        return _time_by_events(calls, device, advance)
    milliseconds = []
    for call in calls:
        start = timer()
        call()
        if device.type == "mps":
            torch.mps.synchronize()
        milliseconds.append(1000 * (timer() - start))
        advance()
    return milliseconds


def _time_by_events(
    calls: Sequence[Call], device: torch.device, advance: Callable[[], None]
) -> list[float]:
    """Milliseconds of each call by CUDA events.

    The device is synchronised before each call: otherwise the kernel-launch overhead of a call
    would overlap with the work of the one before, and the call would look faster than it is alone.
    """
    events = []
    with torch.cuda.device(device):
        for call in calls:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            events.append((start, end))
            advance()
        torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection takes as long as a short call, and would be counted to the one it interrupts."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
