"""Wall-clock time of several callables, measured side by side.

All are called in turn, round after round, each round in another order, so that a machine that slows
down or heats up slows all alike. Medians are taken over the rounds, and rounds go on until the
medians are steady or the time is up.
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
Clock = Callable[[], float]

# Few enough to end in seconds, enough for a steady median.
SECONDS = 6.0
MIN_ROUNDS = 5
MAX_ROUNDS = 50
WARM_UP_ROUNDS = 2

TOLERANCE = 0.01
"""Medians are steady when their standard error is less than this fraction of them."""

# Standard error of a median: 1.2533 sigma / sqrt(n), and sigma is 1.4826 times half the
# interquartile range, both for a normal distribution.
_ERROR_OF_SPREAD = 1.2533 * 1.4826


@dataclass(frozen=True)
class Timing:
    """How long a call takes.

    Attributes:
        median_ms: median of all rounds, in milliseconds.
        spread: half the interquartile range, as a fraction of the median.
        rounds: how often it was called, the warm-up left out.
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
    """How much longer one call takes than another.

    Attributes:
        ratio: median over the rounds of pruned / original of the same round: what slows a machine
            down for a while slows both, and cancels.
        spread: half the interquartile range of these ratios, as a fraction of their median.
        original, pruned: the two apart.
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
    *,
    seconds: float = SECONDS,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    tolerance: float = TOLERANCE,
    warm_up_rounds: int = WARM_UP_ROUNDS,
    level: bool = False,
    progress: bool = False,
    clock: Clock = time.perf_counter,
) -> list[Timing]:
    """Time every one of `calls`, all in turn.

    Args:
        device: where they do their work; on a GPU their work is timed to its end.
        seconds: no round is begun that would end later than that, the warm-up included, but for
            `min_rounds`.
        tolerance: stop earlier, once the standard error of every median is below this fraction of
            it, or of the mean of all medians where that is more; 0: never.
        level: divide by how slow each round was as a whole, so that slow phases of the machine
            cancel; for many calls, of which no single one makes a round slow.
        clock: seconds now; not used where the device has a clock of its own (CUDA).
    """
    times: list[list[float]] = [[] for _ in calls]
    timings: list[Timing] = []
    rounds = _rounds(calls, device, seconds, warm_up_rounds, progress, clock)
    for number, (milliseconds, is_late) in enumerate(rounds, start=1):
        for own, value in zip(times, milliseconds, strict=True):
            own.append(value)
        timings = [_timing(own) for own in (_levelled(times) if level else times)]
        steady = number >= min_rounds and _are_steady(timings, tolerance)
        if steady or number >= max_rounds or (is_late and number >= min_rounds):
            break
    return timings


def time_ratio(
    original: Call,
    pruned: Call,
    device: torch.device | str,
    *,
    seconds: float = SECONDS,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    tolerance: float = TOLERANCE,
    warm_up_rounds: int = WARM_UP_ROUNDS,
    progress: bool = False,
    clock: Clock = time.perf_counter,
) -> Ratio:
    """How long `pruned` takes, as a fraction of `original`; see `time_ratios`."""
    (ratio,) = time_ratios(
        original,
        [pruned],
        device,
        seconds=seconds,
        min_rounds=min_rounds,
        max_rounds=max_rounds,
        tolerance=tolerance,
        warm_up_rounds=warm_up_rounds,
        progress=progress,
        clock=clock,
    )
    return ratio


def time_ratios(
    original: Call,
    pruned: Sequence[Call],
    device: torch.device | str,
    *,
    seconds: float = SECONDS,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    tolerance: float = TOLERANCE,
    warm_up_rounds: int = WARM_UP_ROUNDS,
    progress: bool = False,
    clock: Clock = time.perf_counter,
) -> list[Ratio]:
    """How long each of `pruned` takes, as a fraction of `original`; see `time_interleaved`.

    `tolerance` is that of the ratios, which are steadier than the times.
    """
    found: list[list[float]] = []
    ratios: list[Timing] = []
    calls = [original, *pruned]
    rounds = _rounds(calls, device, seconds, warm_up_rounds, progress, clock)
    for number, (milliseconds, is_late) in enumerate(rounds, start=1):
        found.append(milliseconds)
        by_call = [
            [each[which] / each[0] if each[0] else math.nan for each in found]
            for which in range(1, len(calls))
        ]
        ratios = [_timing(own) for own in by_call]
        steady = number >= min_rounds and all(ratio.error < tolerance for ratio in ratios)
        if steady or number >= max_rounds or (is_late and number >= min_rounds):
            break
    first, *others = (_timing([each[which] for each in found]) for which in range(len(calls)))
    return [
        Ratio(ratio.median_ms, ratio.spread, first, own)
        for ratio, own in zip(ratios, others, strict=True)
    ]


def _standard_error(spread: float, rounds: int) -> float:
    return _ERROR_OF_SPREAD * spread / math.sqrt(rounds) if rounds > 1 else math.inf


def _timing(values: Sequence[float]) -> Timing:
    if len(values) < 2:
        return Timing(values[0] if values else math.nan, 0.0, len(values))
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, (high - low) / (2 * median) if median else 0.0, len(values))


def _levelled(times: Sequence[Sequence[float]]) -> list[list[float]]:
    """Times by call and round, divided by how slow the round was beside the median round.

    The median over the calls says that: a hiccup in one of them is not the round's.
    """
    usual = [statistics.geometric_mean([max(value, 1e-9) for value in own]) for own in times]
    slow = [
        statistics.median(value / own for value, own in zip(values, usual, strict=True)) or 1.0
        for values in zip(*times, strict=True)
    ]
    median = statistics.median(slow)
    return [[value * median / by for value, by in zip(own, slow, strict=True)] for own in times]


def _are_steady(timings: Sequence[Timing], tolerance: float) -> bool:
    """What takes less time than the others need not be known any better, in milliseconds."""
    mean = statistics.fmean(timing.median_ms for timing in timings)
    return all(
        timing.error * timing.median_ms < tolerance * max(timing.median_ms, mean)
        for timing in timings
    )


def _rounds(
    calls: Sequence[Call],
    device: torch.device | str,
    seconds: float,
    warm_up_rounds: int,
    progress: bool,
    clock: Clock,
) -> Iterator[tuple[list[float], bool]]:
    """Milliseconds of each call, and whether the time is up, round after round without end."""
    device, start = torch.device(device), clock()
    limit = max(1, round(seconds))
    shape = "{desc} {percentage:3.0f}%|{bar}| {elapsed}, at most {total} s"
    with (
        _no_garbage_collection(),
        tqdm(
            total=limit, desc="timing", disable=not progress, leave=False, bar_format=shape
        ) as bar,
    ):

        def advance() -> None:
            bar.update(min(limit, clock() - start) - bar.n)

        for number in count(-warm_up_rounds):
            begun = clock()
            order = _order(number, len(calls))
            found = _time_all([calls[which] for which in order], device, clock, advance)
            if number >= 0:
                by_call = dict(zip(order, found, strict=True))
                is_late = 2 * clock() - begun - start > seconds  # by the end of another like it
                yield [by_call[which] for which in range(len(calls))], is_late


def _order(number: int, size: int) -> list[int]:
    """Each round starts with another call, and each call comes after another one than before: what
    one leaves behind in caches and allocator does not always fall on the same other."""
    strides = [stride for stride in range(1, size + 1) if math.gcd(stride, size) == 1]
    stride = strides[number % len(strides)]
    return [(number + position * stride) % size for position in range(size)]


def _time_all(
    calls: Sequence[Call], device: torch.device, clock: Clock, advance: Callable[[], None]
) -> list[float]:
    """Milliseconds of each call; `advance` is called after each."""
    if device.type == "cuda":
        return _time_by_events(calls, device, advance)
    milliseconds = []
    for call in calls:
        start = clock()
        call()
        if device.type == "mps":
            torch.mps.synchronize()
        milliseconds.append(1000 * (clock() - start))
        advance()
    return milliseconds


def _time_by_events(
    calls: Sequence[Call], device: torch.device, advance: Callable[[], None]
) -> list[float]:
    """The GPU notes when it starts and ends each call.

    Each begins when the work of the one before it is done: what a call spends on asking for its
    work would else hide behind the work of a longer one, and look faster than it is alone.
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
    """It takes as long as a short call, and would be counted to whichever it interrupts."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
