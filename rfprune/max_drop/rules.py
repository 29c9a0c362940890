"""The rules of `--max-drop`: which ratio to try next, and which of the trials is the answer.

A trial prunes to a ratio and measures two numbers. The user limits the drop of the score; it is
noisy, since it moves by one example at a time. The KL divergence of the predictions from the
original's is smooth and grows as the ratio falls. Three rules use both:

1. Drops are made monotone in the divergence (isotonic regression): where a model with a larger
   divergence scores better, the difference is noise.
2. A model is within the limit if both its measured drop and its monotone drop are.
3. Between the smallest size that is within the limit and the largest ratio below it that is not,
   the drop is interpolated in the divergence, and the logarithm of the divergence in the ratio.
   Where a trial has not halved that interval, the next trial bisects it, as in Brent's method.

The search ends when no size is left in the interval, when it is RESOLUTION wide, when it is NEAR
wide and the expected gain is at most RESOLUTION, or after MAX_TRIALS. `rfprune.max_drop.search`
runs the trials.

A model may be smaller than the ratio asks for, above all where whole layers are removed. Every
ratio between the two gives that model again. So a trial that is within the limit counts by the
size of its model, and one that is not by the ratio that was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.optimize import isotonic_regression

RESOLUTION = 0.02
NEAR = 0.1
MIN_GAIN = 0.05
"""The smallest part of the prunable cost that is worth removing. If even that loses too many
points, nothing is pruned."""

MAX_TRIALS = 6

_STEEPNESS = 7.0
"""Fall of the logarithm of the divergence from ratio 0 to ratio 1, used until two trials give a
better value; between 5 and 8 on four checkpoints at 0.2 to 0.7 of the MACs."""

_MAX_GROWTH = 8.0  # of the divergence, from one trial to the next while nothing has failed
_MAX_ONE_SIDED = (
    3  # trials that all pass or all fail, before the smallest or largest ratio is tried
)
_RATIO_ROUNDING = 1e-4  # ratios have four decimals
_ROUNDING = 1e-9  # of scores that are 100 times a fraction


@dataclass(frozen=True)
class Trial:
    """One ratio that was tried.

    Attributes:
        ratio: fraction of the cost that was asked for, as in `Constraint`.
        drop: points of the score that were lost; negative where the score rose.
        divergence: KL(original || pruned), in nats per row.
        standard_error: of the drop, in points.
        achieved: fraction of the cost that the model keeps (default: `ratio`).
    """

    ratio: float
    drop: float
    divergence: float
    standard_error: float = 0.0
    achieved: float | None = None

    @property
    def size(self) -> float:
        """Fraction of the cost that the model keeps, at most `ratio`."""
        return self.ratio if self.achieved is None else min(self.achieved, self.ratio)


def monotone_drops(trials: Sequence[Trial]) -> dict[float, float]:
    """Isotonic regression of the drop on the divergence.

    Returns:
        The monotone drops by the ratios of their trials, in order of increasing divergence. Trials
        of equal divergence are ordered by decreasing ratio.
    """
    ordered = sorted(trials, key=lambda trial: (trial.divergence, -trial.ratio))
    fitted = isotonic_regression([trial.drop for trial in ordered]).x
    return {trial.ratio: float(drop) for trial, drop in zip(ordered, fitted, strict=True)}


def smallest_within_limit(trials: Sequence[Trial], max_drop: float) -> Trial | None:
    """The trial of the smallest size that is within the limit, if there is one.

    Args:
        max_drop: the largest drop that is allowed, in points.
    """
    fitted = monotone_drops(trials)
    within = [
        trial for trial in trials if max(trial.drop, fitted[trial.ratio]) <= max_drop + _ROUNDING
    ]
    return min(within, key=lambda trial: trial.size, default=None)


def next_ratio(
    trials: Sequence[Trial], max_drop: float, min_ratio: float, step: float = 0.0
) -> float | None:
    """The ratio to try next, or None once the search is complete.

    Args:
        trials: all trials so far, in their order.
        max_drop: the largest drop that is allowed, in points.
        min_ratio: the smallest ratio that is possible.
        step: the smallest difference between two sizes, as a fraction of the cost.

    Returns:
        A ratio that has not been tried, from `min_ratio` to `largest_ratio(min_ratio)`.
    """
    max_ratio = largest_ratio(min_ratio)
    if not trials:
        return _middle(min_ratio)
    passing, failing = _interval(trials, max_drop)
    if passing is None:
        if failing is None or max(failing.ratio, _next_size(failing, step)) >= max_ratio:
            return None  # even the largest ratio loses too much
        if len(trials) >= _MAX_ONE_SIDED or failing.ratio + RESOLUTION >= max_ratio:
            return max_ratio
    elif passing.size <= min_ratio + _ROUNDING or len(trials) >= MAX_TRIALS:
        return None
    elif failing is None and (
        len(trials) >= _MAX_ONE_SIDED or passing.size - RESOLUTION <= min_ratio
    ):
        return min_ratio
    low = min_ratio if failing is None else failing.ratio
    high = max_ratio if passing is None else passing.size
    wanted = _ratio_at(_divergence_at_limit(trials, max_drop), trials, passing, failing)
    if passing is not None and failing is not None:
        if high - step <= low + _RATIO_ROUNDING:
            return None  # the next smaller size is a trial that was not within the limit
        gain = high - wanted if high - low <= NEAR else high - low
        if min(gain, high - low) <= RESOLUTION + _ROUNDING:
            return None
        if high - low <= 2 * RESOLUTION or _is_slow(trials, max_drop):
            return _rounded((low + high) / 2, max(low, _next_size(failing, step)), high)
    lowest = low if failing is None else max(low + RESOLUTION, _next_size(failing, step))
    highest = high if passing is None else high - RESOLUTION
    return _rounded(min(max(wanted, lowest), highest), lowest, highest)


def largest_ratio(min_ratio: float) -> float:
    """The largest ratio to try: 0.95 if nearly all of the cost can be pruned."""
    return max(math.floor(100 * (1 - MIN_GAIN * (1 - min_ratio))) / 100, _middle(min_ratio))


def _next_size(trial: Trial, step: float) -> float:
    """A ratio that gives the smallest size above that of a trial."""
    return trial.size + step + _RATIO_ROUNDING if step else trial.size


def _middle(min_ratio: float) -> float:
    return max(math.floor(50 * (1 + min_ratio)) / 100, min_ratio)


def _interval(trials: Sequence[Trial], max_drop: float) -> tuple[Trial | None, Trial | None]:
    """The smallest size that is within the limit, and the largest ratio below it that is not."""
    passing = smallest_within_limit(trials, max_drop)
    ceiling = math.inf if passing is None else passing.size
    below = [trial for trial in trials if trial.ratio < ceiling]
    return passing, max(below, key=lambda trial: trial.ratio, default=None)


def _is_slow(trials: Sequence[Trial], max_drop: float) -> bool:
    """Whether the last trial left more than half of the interval."""
    passing, failing = _interval(trials, max_drop)
    old_passing, old_failing = _interval(trials[:-1], max_drop)
    if not (passing and failing and old_passing and old_failing):
        return False
    return passing.size - failing.ratio > (old_passing.size - old_failing.ratio) / 2


def _divergence_at_limit(trials: Sequence[Trial], max_drop: float) -> float:
    """The divergence at which the drop should be `max_drop`.

    The unpruned model, without divergence or drop, stands in for a passing trial. Without a failing
    trial the drop is taken to be proportional to the divergence.
    """
    passing, failing = _interval(trials, max_drop)
    fitted = monotone_drops(trials)
    near = 0.0 if passing is None else passing.divergence
    drop = 0.0 if passing is None else fitted[passing.ratio]
    if failing is None:
        growth = max_drop / drop if drop > 0 else math.inf
        return near * min(max(growth, 1.0), _MAX_GROWTH)
    lost = max(fitted[failing.ratio], failing.drop)
    share = (max_drop - drop) / (lost - drop) if lost > drop else 0.5
    return near + (failing.divergence - near) * min(max(share, 0.0), 1.0)


def _ratio_at(
    divergence: float, trials: Sequence[Trial], passing: Trial | None, failing: Trial | None
) -> float:
    """The ratio at which a divergence is expected.

    The logarithm of the divergence is taken to be linear in the ratio: through both ends of the
    interval, or through the only end and the trial nearest to it.
    """
    if passing is not None and failing is not None:
        first, second = passing, failing
    else:
        edge = passing or failing
        assert edge is not None
        first, second = (
            edge,
            min(
                (trial for trial in trials if trial is not edge),
                key=lambda trial: abs(trial.size - edge.size),
                default=edge,
            ),
        )
    steepness = _STEEPNESS
    rise = _log(second.divergence) - _log(first.divergence)
    if first.size != second.size and rise * (first.size - second.size) > 0:
        steepness = rise / (first.size - second.size)
    return first.size - (_log(divergence) - _log(first.divergence)) / steepness


def _log(divergence: float) -> float:
    return math.log(max(divergence, 1e-12))


def _rounded(ratio: float, low: float, high: float) -> float:
    """Two decimals, as people write ratios, unless the bounds leave no room for that."""
    return round(min(max(round(ratio, 2), low), high), 4)
