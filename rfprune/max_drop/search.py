"""`--max-drop` on a model: prune to a ratio, score the result, choose the next ratio.

`rfprune.max_drop.rules` chooses the ratios. The drop is measured on all validation examples, the
divergence on calibration batches that the fits hold out. Statistics are collected once for all
trials.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedModel

from rfprune import distributed
from rfprune.checkpoints.precision import round_to_stored_dtype
from rfprune.cost.constraint import Constraint
from rfprune.errors import UserError
from rfprune.max_drop.rules import Trial, next_ratio, smallest_within_limit
from rfprune.methods.budget import min_ratio, ratio_step
from rfprune.report.measure import Batches, Outcome, Prepared
from rfprune.report.summary import METRIC_NAMES, trial_line
from rfprune.result import PruneResult
from rfprune.stages.reconstruct import HELD_OUT_EVERY
from rfprune.tasks.bootstrap import Drop, paired_drop
from rfprune.tasks.evaluation import (
    Evaluation,
    Logits,
    divergence_of_logits,
    evaluate_model,
    logits_of_batches,
)
from rfprune.tasks.seq2seq import target_divergence

Prune = Callable[[Iterable[Constraint]], Iterator[PruneResult]]
"""Prunes to each constraint; takes the next one only after it has yielded the result."""


@dataclass(frozen=True)
class DropSearch:
    """What all trials of a search share.

    Attributes:
        max_drop: the largest drop of the task's score that is allowed, in points.
        metric: of the constraints; see `Constraint`.
        prepared: the model, its data and the settings.
        original: the score of the original.
        progress: whether to show bars.
    """

    max_drop: float
    metric: str
    prepared: Prepared
    original: Evaluation
    progress: bool

    @cached_property
    def min_ratio(self) -> float:
        """The smallest ratio that is possible."""
        return min_ratio(self.prepared.problem, self.metric)

    @cached_property
    def original_logits(self) -> Logits:
        """Of the original on the held-out calibration batches."""
        return self._held_out_logits(self.prepared.loaded.model)

    def divergence(self, model: PreTrainedModel) -> float:
        """KL(original || model) on the held-out calibration batches, in nats per row."""
        kind = self.prepared.evaluation_set.task.kind
        if kind == "seq2seq":
            return target_divergence(model, self.prepared.loaded.model, self._held_out)
        return divergence_of_logits(self.original_logits, self._held_out_logits(model), kind)

    @property
    def _held_out(self) -> Batches:
        batches = self.prepared.batches
        return batches[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or batches

    def _held_out_logits(self, model: PreTrainedModel) -> Logits:
        return logits_of_batches(model, self.prepared.evaluation_set.task, self._held_out)


@dataclass(frozen=True)
class _ScoredTrial:
    """A trial with its score; its model only if that may be the answer."""

    trial: Trial
    score: float
    drop: Drop
    result: PruneResult | None
    evaluation: Evaluation | None

    @property
    def summary(self) -> dict[str, float]:
        """The trial's entry in report.json."""
        return {
            "ratio": self.trial.ratio,
            "achieved": self.trial.size,
            "score": self.score,
            "drop": self.trial.drop,
            "divergence": self.trial.divergence,
        }


def constraints_to_try(
    metric: str, decide: Callable[[], float | None] = lambda: None
) -> Iterator[Constraint]:
    """Constraints at the ratios that `decide` returns, until it returns None.

    With several processes, `decide` of the main process chooses for all.
    """
    while (ratio := distributed.broadcast_from_main(decide)) is not None:
        yield Constraint(metric, ratio)


def find_smallest_model(search: DropSearch, prune: Prune, show: Callable[[str], None]) -> Outcome:
    """Find the smallest model whose score drops by at most `search.max_drop` points.

    Args:
        show: prints a line about each trial.

    Raises:
        UserError: even the largest ratio that was tried loses more points.
    """
    started = time.perf_counter()
    min_ratio, step = search.min_ratio, ratio_step(search.prepared.problem, search.metric)
    scored: list[_ScoredTrial] = []

    def trials() -> list[Trial]:
        return [one.trial for one in scored]

    def decide() -> float | None:
        return next_ratio(trials(), search.max_drop, min_ratio, step)

    for result in prune(constraints_to_try(search.metric, decide)):
        scored.append(_score(search, result))
        show(f"Tried {trial_line(scored[-1].summary)}")
    best = smallest_within_limit(trials(), search.max_drop)
    if best is None:
        raise UserError(_drop_too_large(search, trials()))
    chosen = next(one for one in scored if one.trial is best)
    assert chosen.result is not None
    return Outcome(
        chosen.result,
        chosen.evaluation,
        {
            "points": search.max_drop,
            "drop": chosen.drop.points,
            "standard_error": chosen.drop.standard_error,
            "sure": chosen.drop.within,
            "path": [one.summary for one in scored],
            "least_possible": min_ratio,
            "seconds": search.original.seconds + time.perf_counter() - started,
        },
    )


def _score(search: DropSearch, result: PruneResult) -> _ScoredTrial:
    """Score a pruned model with its weights rounded to the dtype that they are saved in."""
    prepared = search.prepared
    round_to_stored_dtype(prepared.stored, result.model)
    data = prepared.evaluation_set
    pruned = evaluate_model(
        result.model,
        data,
        reference=prepared.reference,
        reference_evaluation=search.original,
        progress=search.progress,
    )
    drop = paired_drop(data, search.original, pruned, search.max_drop)
    assert result.ratio is not None, "the search asks for constraints"
    # A latency is measured, so it is not quite the same for the same model.
    achieved = None if search.metric == "latency" else result.achieved[search.metric]
    trial = Trial(
        result.ratio,
        drop.points,
        search.divergence(result.model),
        drop.standard_error,
        achieved,
    )
    if smallest_within_limit([trial], search.max_drop) is None:
        return _ScoredTrial(trial, pruned.score, drop, None, None)
    return _ScoredTrial(trial, pruned.score, drop, result, pruned)


def _drop_too_large(search: DropSearch, trials: Sequence[Trial]) -> str:
    largest = max(trials, key=lambda trial: trial.ratio)
    return (
        f"--max-drop {search.max_drop:g} cannot be met: with {largest.ratio:g} of the "
        f"{METRIC_NAMES[search.metric]} kept, the largest ratio that was tried, the score drops by "
        f"{largest.drop:.2f} points (standard error {largest.standard_error:.2f}); give a larger "
        "--max-drop, or a size with --constraint"
    )
