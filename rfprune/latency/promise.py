"""Meet a promised latency: measure the latency that a table predicts, and correct the choice.

A table adds up the times of single sublayers, but caches, threads and kernel-launch overhead do not
add up. So the chosen sizes are timed beside the original before anything is fitted. If the promise
is missed, the predicted saving is scaled to the measured one and the sizes are chosen again. Where
the true latency differs from the table by a factor or a constant, one correction is enough. The
published methods do not measure the latency of the pruned model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeVar

from rfprune.cost.constraint import Constraint, CostModel
from rfprune.errors import UserError

Choice = TypeVar("Choice")
"""What is kept of a model, such as its masks."""

TOLERANCE = 0.03
"""Largest relative deviation from the promised latency, to either side: a slower model breaks the
promise, and a faster one has lost more accuracy than necessary."""

TARGET_TOLERANCE = 0.015
"""Deviation at which corrections stop; the rest of `TOLERANCE` allows for measurement noise."""

MAX_CORRECTIONS = 3

_MIN_SAVING = 0.05
"""Smallest factor on the predicted saving: one bad measurement must not end the search."""


@dataclass(frozen=True)
class LatencyAttempt:
    """One choice of sizes, with latencies as fractions of the original's.

    Attributes:
        kept: units by block.
        predicted: by the table, with the corrections so far.
        measured: median of paired measurements.
        error: standard error of `measured`, as a fraction of it.
    """

    kept: tuple[int, ...]
    predicted: float
    measured: float
    error: float


@dataclass(frozen=True)
class LatencyPromise:
    """A promised latency and the attempts to meet it.

    Attributes:
        promised: fraction of the original's latency.
        attempts: all choices that were measured, in order.
        chosen: index of the attempt whose sizes were used.
    """

    promised: float
    attempts: tuple[LatencyAttempt, ...]
    chosen: int

    @property
    def predicted(self) -> float:
        """The predicted fraction of the chosen attempt."""
        return self.attempts[self.chosen].predicted

    @property
    def measured(self) -> float:
        """The measured fraction of the chosen attempt."""
        return self.attempts[self.chosen].measured

    @property
    def is_met(self) -> bool:
        """Whether the measured fraction is within `TOLERANCE` of the promised one."""
        return abs(self.measured / self.promised - 1) <= TOLERANCE


def meet_latency(
    costs: CostModel,
    constraint: Constraint,
    choose: Callable[[CostModel, float], Choice],
    measure: Callable[[Choice], tuple[float, float]],
    count_kept: Callable[[Choice], tuple[int, ...]],
    removed_layers: Callable[[Choice], Collection[int]] = lambda _: (),
) -> tuple[Choice, LatencyPromise]:
    """Choose sizes whose measured latency is the promised fraction of the original's.

    Args:
        costs: in milliseconds, from a latency table.
        choose: from costs and a budget to what is kept.
        measure: from what is kept to the measured fraction of the original's latency, and its
            relative standard error.
        count_kept: from what is kept to units by block of `costs`, which may be those of a model
            that was pruned before.
        removed_layers: from what is kept to the indices of the layers that are removed whole.

    Returns:
        The choice of the attempt nearest to the promise, and all attempts. An attempt that is too
        slow counts as further away than one that is too fast.

    Raises:
        UserError: the constraint cannot be met according to the table.
    """
    corrected, budget = costs, costs.budget(constraint)
    found: list[tuple[Choice, LatencyAttempt]] = []
    for _ in range(1 + MAX_CORRECTIONS):
        try:
            choice = choose(corrected, budget)
        except UserError:
            if not found:
                raise
            break  # no smaller sizes are left
        kept, removed = count_kept(choice), removed_layers(choice)
        if any(kept == attempt.kept for _, attempt in found):
            break
        predicted = corrected.total(kept, removed) / costs.original
        attempt = LatencyAttempt(kept, predicted, *measure(choice))
        found.append((choice, attempt))
        if abs(attempt.measured / constraint.ratio - 1) <= TARGET_TOLERANCE:
            break
        saving = 1 - costs.total(kept, removed) / costs.original
        corrected = costs.with_savings(max((1 - attempt.measured) / saving, _MIN_SAVING))
        try:
            budget = corrected.budget(constraint)
        except UserError:
            # One measurement says that no sizes can meet it: halve the cost and measure again.
            blocks_cost = costs.total(kept, removed) - costs.constant
            corrected, budget = costs, (blocks_cost + costs.min_block_cost) / 2
    attempts = tuple(attempt for _, attempt in found)
    chosen = min(range(len(found)), key=lambda i: _distance(attempts[i], constraint.ratio))
    return found[chosen][0], LatencyPromise(constraint.ratio, attempts, chosen)


def _distance(attempt: LatencyAttempt, promised: float) -> tuple[bool, float]:
    """Sorts attempts that are too slow behind all others."""
    deviation = attempt.measured / promised - 1
    return deviation > TOLERANCE, abs(deviation)


def missed_latency_warnings(promise: LatencyPromise | None) -> list[str]:
    """A warning if the promised latency is missed, else none."""
    if promise is None or promise.is_met:
        return []
    attempts = f"{len(promise.attempts)} attempt{'s' * (len(promise.attempts) > 1)}"
    if promise.measured > promise.promised:
        return [
            f"the promised latency of {promise.promised:g} of the original's is missed: "
            f"{promise.measured:.3g} is measured, the nearest of {attempts}; pruning saves less "
            "than that on this device; choose a larger --constraint, or a larger batch size"
        ]
    return [
        f"the model is faster than promised: {promise.measured:.3g} of the original's latency is "
        f"measured instead of {promise.promised:g}, the nearest of {attempts}; no larger model was "
        "found that keeps the promise"
    ]
