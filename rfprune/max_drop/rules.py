"""`--max-drop`: the smallest model that loses at most so many points, by a search over ratios.

A trial prunes to a ratio and looks at two numbers: how many points the score drops, which is what
was asked about and noisy (one example more or less), and the KL divergence of the predictions from
the original's, which is smooth and grows as the ratio falls. The rules are:

1. The nearer a model is to the original by its divergence, the less it should lose. Where two
   scores say otherwise that is noise, and both models count with the mean of their drops
   (isotonic regression of the drop on the divergence).
2. A model is within the limit if its own drop is, and the drop that it counts with is, too.
3. Between a size that is within and one that is not, the drop is interpolated along the
   divergence, and the logarithm of the divergence along the ratio. Where a trial does not halve
   what is left to search, the next one is in its middle, as in Brent's method.

The search ends when the two sizes are RESOLUTION apart, when they are NEAR and the rest is not
expected to gain more than RESOLUTION, or after MAX_TRIALS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

RESOLUTION = 0.02
NEAR = 0.1
LEAST_GAIN = 0.05
"""Of what can be pruned at all: where even that much costs too many points, nothing is pruned."""

MAX_TRIALS = 6

_STEEPNESS = 7.0
"""By how much the logarithm of the divergence falls over the whole ratio, where one trial says
nothing of it; measured on four checkpoints between 0.2 and 0.7 of the MACs (5 to 8)."""

_MOST_GROWTH = 8.0  # of the divergence, from the last size that was within the limit
_ONE_SIDED = 3  # trials, all with the same answer, after which the extreme is tried
_ROUNDING = 1e-9  # of scores that are 100 x a fraction


@dataclass(frozen=True)
class Trial:
    """One size that was tried.

    Attributes:
        ratio: of the cost that was kept, as in `Constraint`.
        drop: points of the score lost; negative where the model got better.
        divergence: KL(original || pruned), in nats a row.
        standard_error: of the drop, in points.
    """

    ratio: float
    drop: float
    divergence: float
    standard_error: float = 0.0


def monotone_drops(trials: Sequence[Trial]) -> dict[float, float]:
    """The drop that every trial counts with, by its ratio, the nearest to the original first.

    Isotonic regression by pooling adjacent violators; a divergence of two trials that is equal is
    told apart by the ratio.
    """
    pools: list[tuple[float, list[float]]] = []  # a mean drop, and the ratios it is of
    for trial in sorted(trials, key=lambda trial: (trial.divergence, -trial.ratio)):
        mean, ratios = trial.drop, [trial.ratio]
        while pools and pools[-1][0] > mean:
            before, others = pools.pop()
            mean = (before * len(others) + mean * len(ratios)) / (len(others) + len(ratios))
            ratios = others + ratios
        pools.append((mean, ratios))
    return {ratio: mean for mean, ratios in pools for ratio in ratios}


def smallest_within_limit(trials: Sequence[Trial], points: float) -> Trial | None:
    """The trial of the smallest ratio that is within the limit; None where none is."""
    counted = monotone_drops(trials)
    within = [
        trial for trial in trials if max(trial.drop, counted[trial.ratio]) <= points + _ROUNDING
    ]
    return min(within, key=lambda trial: trial.ratio, default=None)


def next_ratio(trials: Sequence[Trial], points: float, least: float) -> float | None:
    """The ratio to try after these trials, in their order; None where the search is at its end.

    Args:
        points: the largest drop that is allowed.
        least: the least ratio that is possible.

    Returns:
        A ratio that has not been tried, from `least` to `largest_ratio`.
    """
    largest = largest_ratio(least)
    if not trials:
        return _middle(least)
    above, below = _bracket(trials, points)
    if above is None:
        if below is None or below.ratio >= largest:
            return None  # even the largest loses too much
        if len(trials) >= _ONE_SIDED or below.ratio + RESOLUTION >= largest:
            return largest
    elif above.ratio <= least or len(trials) >= MAX_TRIALS:
        return None
    elif below is None and (len(trials) >= _ONE_SIDED or above.ratio - RESOLUTION <= least):
        return least
    low = least if below is None else below.ratio
    high = largest if above is None else above.ratio
    wanted = _ratio_at(_divergence_wanted(trials, points, above, below), trials, above, below)
    if above is not None and below is not None:
        gain = high - wanted if high - low <= NEAR else high - low
        if min(gain, high - low) <= RESOLUTION + _ROUNDING:
            return None
        if high - low <= 2 * RESOLUTION or _is_slow(trials, points):
            return _rounded((low + high) / 2, low, high)
    lowest = low if below is None else low + RESOLUTION
    highest = high if above is None else high - RESOLUTION
    return _rounded(min(max(wanted, lowest), highest), lowest, highest)


def largest_ratio(least: float) -> float:
    """The largest that is tried, 0.95 where next to all of the cost can be pruned."""
    return max(math.floor(100 * (1 - LEAST_GAIN * (1 - least))) / 100, _middle(least))


def _middle(least: float) -> float:
    return max(math.floor(50 * (1 + least)) / 100, least)


def _bracket(trials: Sequence[Trial], points: float) -> tuple[Trial | None, Trial | None]:
    """The smallest that is within the limit, and the largest below it that is not."""
    above = smallest_within_limit(trials, points)
    ceiling = math.inf if above is None else above.ratio
    failed = [trial for trial in trials if trial.ratio < ceiling]
    return above, max(failed, key=lambda trial: trial.ratio, default=None)


def _is_slow(trials: Sequence[Trial], points: float) -> bool:
    """Whether the last trial left more than half of what there was between two sizes."""
    above, below = _bracket(trials, points)
    earlier_above, earlier_below = _bracket(trials[:-1], points)
    if not (above and below and earlier_above and earlier_below):
        return False
    return above.ratio - below.ratio > (earlier_above.ratio - earlier_below.ratio) / 2


def _divergence_wanted(
    trials: Sequence[Trial], points: float, above: Trial | None, below: Trial | None
) -> float:
    """The divergence at which the drop should be `points`; an unpruned model has none, and no drop.

    Where nothing has lost too much yet, the drop is taken to be proportional to the divergence.
    """
    counted = monotone_drops(trials)
    near = 0.0 if above is None else above.divergence
    drop = 0.0 if above is None else counted[above.ratio]
    if below is None:
        growth = points / drop if drop > 0 else math.inf
        return near * min(max(growth, 1.0), _MOST_GROWTH)
    lost = max(counted[below.ratio], below.drop)
    share = (points - drop) / (lost - drop) if lost > drop else 0.5
    return near + (below.divergence - near) * min(max(share, 0.0), 1.0)


def _ratio_at(
    divergence: float, trials: Sequence[Trial], above: Trial | None, below: Trial | None
) -> float:
    """Where the divergence should be that, its logarithm linear between or past two trials."""
    if above is not None and below is not None:
        first, second = above, below
    else:
        edge = above or below
        assert edge is not None
        first, second = (
            edge,
            min(
                (trial for trial in trials if trial is not edge),
                key=lambda trial: abs(trial.ratio - edge.ratio),
                default=edge,
            ),
        )
    steepness = _STEEPNESS
    rise = _log(second.divergence) - _log(first.divergence)
    if first.ratio != second.ratio and rise * (first.ratio - second.ratio) > 0:
        steepness = rise / (first.ratio - second.ratio)
    return first.ratio - (_log(divergence) - _log(first.divergence)) / steepness


def _log(divergence: float) -> float:
    return math.log(max(divergence, 1e-12))


def _rounded(ratio: float, low: float, high: float) -> float:
    """To two decimals, as people write it, as far as these are within the bounds."""
    return round(min(max(round(ratio, 2), low), high), 4)
