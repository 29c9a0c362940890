"""Keep a promise of latency: what a table predicts is measured, and the choice corrected.

A table adds up what sublayers take on their own. The whole model may differ: caches, threads and
Python do not add up. So the chosen sizes are timed beside the original before anything is fitted.
Where the promise is missed, the saving that was predicted is scaled to the saving that was seen,
and the search runs again. That finds the true cost in one step where it differs from the table by
a factor or by a constant. None of the published methods measures what it has promised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rfprune.cost.constraint import Constraint, CostModel
from rfprune.errors import UserError
from rfprune.model.masks import Masks, num_kept

TOLERANCE = 0.03
"""A promise is kept within this fraction of it, to either side: slower than promised is a broken
promise, and faster has cost accuracy that nobody asked for."""

AIM = 0.015
"""What the choice is corrected for; the rest of the tolerance is for the noise of measurements."""

CORRECTIONS = 3

_LEAST_SHARE = 0.05  # of a predicted saving, so that one bad measurement does not end the search


@dataclass(frozen=True)
class LatencyAttempt:
    """One choice of sizes: fractions of the original's latency.

    Attributes:
        kept: units by block.
        predicted: by the table, as far as it had been corrected.
        measured: median of paired measurements. error: its standard error, as a fraction of it.
    """

    kept: tuple[int, ...]
    predicted: float
    measured: float
    error: float


@dataclass(frozen=True)
class LatencyPromise:
    """What was promised, and the attempts to keep it; `chosen` is the one that was pruned to."""

    promised: float
    attempts: tuple[LatencyAttempt, ...]
    chosen: int

    @property
    def predicted(self) -> float:
        return self.attempts[self.chosen].predicted

    @property
    def measured(self) -> float:
        return self.attempts[self.chosen].measured

    @property
    def is_kept(self) -> bool:
        return abs(self.measured / self.promised - 1) <= TOLERANCE


def meet_latency(
    costs: CostModel,
    constraint: Constraint,
    choose: Callable[[CostModel, float], Masks],
    measure: Callable[[Masks], tuple[float, float]],
    kept_by: Callable[[Masks], tuple[int, ...]] = num_kept,
) -> tuple[Masks, LatencyPromise]:
    """Masks whose measured latency is the promised fraction of the original's, as near as it gets.

    Args:
        costs: in milliseconds, by a latency table.
        choose: from costs and a budget to masks.
        measure: the fraction of the original's latency that is measured under masks, and its
            standard error.
        kept_by: units by block of `costs` under masks, which may be those of a student.

    Raises:
        UserError: by the table the constraint cannot be met.
    """
    corrected, budget, found = costs, costs.budget(constraint), list[tuple[Masks, LatencyAttempt]]()
    for _ in range(1 + CORRECTIONS):
        try:
            masks = choose(corrected, budget)
        except UserError:
            if not found:
                raise
            break  # nothing smaller is left: the nearest is what there is
        kept = kept_by(masks)
        if any(kept == attempt.kept for _, attempt in found):
            break
        predicted = corrected.total(kept) / costs.original
        attempt = LatencyAttempt(kept, predicted, *measure(masks))
        found.append((masks, attempt))
        if abs(attempt.measured / constraint.ratio - 1) <= AIM:
            break
        saved = 1 - costs.total(kept) / costs.original
        corrected = costs.with_savings(max((1 - attempt.measured) / saved, _LEAST_SHARE))
        try:
            budget = corrected.budget(constraint)
        except UserError:  # by one measurement it cannot be met: nearer to nothing tells
            corrected, budget = (
                costs,
                (costs.total(kept) - costs.constant + costs.min_block_cost) / 2,
            )
    attempts = tuple(attempt for _, attempt in found)
    chosen = min(range(len(found)), key=lambda i: _miss(attempts[i], constraint.ratio))
    return found[chosen][0], LatencyPromise(constraint.ratio, attempts, chosen)


def _miss(attempt: LatencyAttempt, promised: float) -> tuple[bool, float]:
    """Too slow is worse than too fast."""
    miss = attempt.measured / promised - 1
    return miss > TOLERANCE, abs(miss)


def missed_latency_warnings(promise: LatencyPromise | None) -> list[str]:
    """A sentence where a promise is not kept."""
    if promise is None or promise.is_kept:
        return []
    return [
        f"a latency of {promise.promised:g} of the original's was asked for, and "
        f"{promise.measured:.3g} is measured, the nearest of {len(promise.attempts)} attempts: "
        f"{_why(promise)}"
    ]


def _why(promise: LatencyPromise) -> str:
    if promise.measured > promise.promised:
        return "on this device pruning gains less than that; ask for less, or time larger batches"
    return "the next larger sizes are slower than promised"
