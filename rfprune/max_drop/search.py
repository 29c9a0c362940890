"""`--max-drop` on a model: prune, score, decide what to try next; what is learnt serves all trials.

The rules of the search are in max_drop.py. The divergence that leads it is measured on calibration
batches held out from the fits, the drop on all validation examples, since it is what is promised.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rfprune import distributed
from rfprune.checkpoints.precision import round_to_stored_dtype
from rfprune.cost.constraint import Constraint
from rfprune.errors import UserError
from rfprune.max_drop.rules import Trial, next_ratio, smallest_within_limit
from rfprune.methods.budget import cost_model
from rfprune.methods.selection import least_possible
from rfprune.model.layout import layout_of
from rfprune.report.measure import Batches, Outcome, Prepared
from rfprune.report.summary import METRIC_NAMES, points_text, trial_line
from rfprune.result import PruneResult
from rfprune.stages.reconstruct import HELD_OUT_EVERY
from rfprune.tasks.bootstrap import Drop, paired_drop
from rfprune.tasks.evaluation import (
    Evaluation,
    divergence_of_logits,
    evaluate_model,
    logits_of_batches,
)

Prune = Callable[[Iterable[Constraint]], Iterator[PruneResult]]


@dataclass(frozen=True)
class _Tried:
    """A trial, and the model where it may be the one that is wanted."""

    trial: Trial
    score: float
    drop: Drop
    result: PruneResult | None
    pruned: Evaluation | None


def constraints_to_try(
    metric: str, decide: Callable[[], float | None] = lambda: None
) -> Iterator[Constraint]:
    """Constraints as they are wanted; of several processes the main one's `decide` is asked."""
    while (ratio := distributed.broadcast_from_main(decide)) is not None:
        yield Constraint(metric, ratio)


def find_smallest_model(
    points: float,
    metric: str,
    prepared: Prepared,
    original: Evaluation,
    prune: Prune,
    tell: Callable[[str], None],
    *,
    progress: bool,
) -> Outcome:
    """The smallest model, by a metric, that loses at most so many points of the task's score.

    Args:
        prune: to constraints, each of which is asked for when the result before it is here.
        tell: says to the user what was tried.

    Raises:
        UserError: even the largest size that is tried loses more.
    """
    started = time.perf_counter()
    model, batches = prepared.loaded.model, prepared.batches
    held_out = batches[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or batches
    reference = logits_of_batches(model, prepared.evaluation_set.task, held_out)
    table = prepared.latency_table
    layout = layout_of(model)
    costs = cost_model(metric, model, layout, batches, table)
    least = least_possible(model, layout, costs, prepared.settings)
    tried: list[_Tried] = []

    def decide() -> float | None:
        return next_ratio([one.trial for one in tried], points, least)

    for result in prune(constraints_to_try(metric, decide)):
        one = _try(result, points, prepared, original, held_out, reference, progress)
        tried.append(one)
        tell(f"Tried {trial_line(_summary_of(one))}")
    best = smallest_within_limit([one.trial for one in tried], points)
    if best is None:
        raise UserError(_too_much(tried, points, metric))
    chosen = next(one for one in tried if one.trial is best)
    assert chosen.result is not None
    return Outcome(
        chosen.result,
        chosen.pruned,
        {
            "points": points,
            "drop": chosen.drop.points,
            "standard_error": chosen.drop.standard_error,
            "sure": chosen.drop.within,
            "path": [_summary_of(one) for one in tried],
            "least_possible": least,
            "seconds": original.seconds + time.perf_counter() - started,
        },
    )


def _try(
    result: PruneResult,
    points: float,
    prepared: Prepared,
    original: Evaluation,
    held_out: Batches,
    reference: Any,
    progress: bool,
) -> _Tried:
    """Score a pruned model as it would be stored."""
    round_to_stored_dtype(prepared.stored, result.model)
    data = prepared.evaluation_set
    pruned = evaluate_model(result.model, data, progress=progress)
    drop = paired_drop(data, original, pruned, points)
    trial = Trial(
        result.constraint.ratio,
        drop.points,
        divergence_of_logits(
            reference, logits_of_batches(result.model, data.task, held_out), data.task.kind
        ),
        drop.standard_error,
    )
    within = smallest_within_limit([trial], points) is not None
    return _Tried(trial, pruned.score, drop, result if within else None, pruned if within else None)


def _summary_of(one: _Tried) -> dict[str, float]:
    return {
        "ratio": one.trial.ratio,
        "score": one.score,
        "drop": one.trial.drop,
        "divergence": one.trial.divergence,
    }


def _too_much(tried: Sequence[_Tried], points: float, metric: str) -> str:
    largest = max((one.trial for one in tried), key=lambda trial: trial.ratio)
    return (
        f"No model loses at most {points_text(points)}: with {largest.ratio:g} of the "
        f"{METRIC_NAMES[metric]} kept, the most that was tried, it is {largest.drop:.2f} "
        f"(standard error {largest.standard_error:.2f}); give a larger --max-drop, or a size with "
        f"--constraint"
    )
