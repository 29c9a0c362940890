"""prune(): the method on one page.

    kwon:       mask gradients -> Fisher importance -> search under the constraint ->
                rearrangement -> compaction -> one scale per kept unit by least squares
    curvature:  input and gradient moments -> error curve of every block -> exact allocation ->
                compaction -> every out-projection by least squares, and what reads the hidden
                states aligned with the original's
    importance: a classical criterion -> search, or the same fraction everywhere ->
                compaction -> every out-projection by least squares

Which units stay is in `rfprune.methods.selection`; the stages are in `rfprune.stages`. The model
that is given stays as it is: masks act through hooks that are gone afterwards, and the student is a
copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rfprune import distributed
from rfprune.cost.constraint import Constraint, CostModel
from rfprune.cost.macs import mac_costs
from rfprune.cost.memory import total_bytes
from rfprune.cost.params import total_params
from rfprune.cost.rounding import restrict_to_multiples
from rfprune.errors import UserError
from rfprune.latency.profile import load_or_profile
from rfprune.latency.promise import LatencyPromise, meet_latency, missed_latency_warnings
from rfprune.latency.speedup import measure_ratio
from rfprune.latency.table import LatencyTable
from rfprune.latency.timed_batch import timed_batch
from rfprune.methods.budget import cost_model, mean_decoder_tokens, mean_tokens
from rfprune.methods.selection import Selection, check_possible, collect_statistics
from rfprune.model.batch import LABEL_NAMES, Batch, split_batch, to_device, token_mask
from rfprune.model.compact import compact
from rfprune.model.encoder_decoder import add_decoder_inputs
from rfprune.model.frozen import frozen
from rfprune.model.layerwise import add_image_token_mask
from rfprune.model.layout import Layout, layout_of
from rfprune.model.masks import Masks, full_masks, masked, num_kept
from rfprune.model.plain import to_plain
from rfprune.model.validation import check_finite_weights, check_layer_outputs
from rfprune.result import PruneResult, StageTimer, units_of_layers
from rfprune.settings import Settings
from rfprune.stages.objective import Loss
from rfprune.stages.search import search
from rfprune.stages.tune import refit, tune_scales


def prune(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    constraint: Constraint,
    settings: Settings | None = None,
    *,
    loss: Loss | None = None,
    latency_table: LatencyTable | None = None,
    cache: Path | None = None,
    progress: bool = False,
) -> PruneResult:
    """Prune a fine-tuned Transformer to a constraint, without retraining.

    Args:
        model: with a sequence-classification or question-answering head; left untouched, also after
            an error.
        batches: calibration batches of input_ids (B, S), attention_mask, ...; no labels needed;
            read once.
        loss: from the model's outputs and a batch, its labels included, to a loss an example, (B,),
            or their mean: importance is by its gradients, not by those of the model's own
            predictions. Nothing is kept in the cache then.
        latency_table: for a constraint on latency; without one the model is profiled first, on the
            batch of median length.
        cache: a folder where what is collected is kept: it serves any other constraint.

    Raises:
        UserError: the model type is not supported, the constraint cannot be met, there are no
            batches, or weights or gradients are not finite.
    """
    return next(
        prune_family(
            model,
            batches,
            [constraint],
            settings,
            loss=loss,
            latency_table=latency_table,
            cache=cache,
            progress=progress,
        )
    )


def prune_family(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    constraints: Iterable[Constraint],
    settings: Settings | None = None,
    *,
    loss: Loss | None = None,
    latency_table: LatencyTable | None = None,
    cache: Path | None = None,
    progress: bool = False,
) -> Iterator[PruneResult]:
    """Prune to several constraints from one collection of statistics; see `prune`. Yields results
    in their order; what is no sequence is asked for the next constraint when one is wanted, so that
    a search can decide by the results so far."""
    settings = settings or Settings()
    layout = layout_of(model)
    check_finite_weights(model)
    given = (to_device(batch, model.device) for batch in batches)
    labelled = [
        add_token_mask(model, layout, part) for batch in given for part in split_batch(model, batch)
    ]
    if not any(token_mask(batch).any() for batch in labelled) or not layout.blocks:
        raise UserError(
            "there is nothing to calibrate on, or nothing to prune; give at least one example, and "
            "a model with heads or neurons"
        )
    with frozen(model):
        check_layer_outputs(model, layout, labelled[0])
    inputs = [
        {name: value for name, value in batch.items() if name not in LABEL_NAMES}
        for batch in labelled
    ]
    if isinstance(constraints, Sequence):
        if latency_table is None and any(wanted.metric == "latency" for wanted in constraints):
            latency_table = load_or_profile(
                None, model, inputs, round_to=settings.round_to, progress=progress
            )
        check_possible(model, inputs, constraints, settings, latency_table)
    else:
        constraints = _checked_in_turn(model, inputs, constraints, settings, latency_table)
    job = _Job(model, layout, labelled, inputs, settings, loss, latency_table, cache, progress)
    results = _family(job, constraints)
    while True:
        with torch.inference_mode(False), torch.enable_grad():  # in whatever mode the caller is
            result = next(results, None)
        if result is None:
            return
        yield result


def add_token_mask(model: PreTrainedModel, layout: Layout, batch: Batch) -> Batch:
    """A batch and which of its tokens are real, also where a model makes them itself."""
    if layout.is_encoder_decoder:
        return add_decoder_inputs(model, batch)
    return add_image_token_mask(model, layout, batch)


def _checked_in_turn(
    model: PreTrainedModel,
    inputs: Sequence[Batch],
    constraints: Iterable[Constraint],
    settings: Settings,
    table: LatencyTable | None,
) -> Iterator[Constraint]:
    for constraint in constraints:
        check_possible(model, inputs, [constraint], settings, table)
        yield constraint


@dataclass(frozen=True)
class _Job:
    """What all constraints share; `inputs` are the `batches` without labels."""

    model: PreTrainedModel
    layout: Layout
    batches: Sequence[Batch]
    inputs: Sequence[Batch]
    settings: Settings
    loss: Loss | None
    table: LatencyTable | None
    cache: Path | None
    progress: bool

    def collect_statistics(
        self, model: PreTrainedModel, layout: Layout, timer: StageTimer
    ) -> Selection:
        cache = self.cache if model is self.model else None  # students are not met again
        with_labels = self.settings.use_labels or self.loss is not None
        batches = self.batches if with_labels else self.inputs
        return collect_statistics(
            model,
            layout,
            batches,
            self.settings,
            timer,
            loss=self.loss,
            cache=cache,
            progress=self.progress,
        )

    def costs(self, metric: str) -> CostModel:
        costs = cost_model(metric, self.model, self.layout, self.inputs, self.table)
        return restrict_to_multiples(costs, self.layout, self.settings.round_to)


def _family(job: _Job, constraints: Iterable[Constraint]) -> Iterator[PruneResult]:
    """What is learnt about the model itself is learnt once; what the later rounds need is not."""
    shared = StageTimer()
    selection = job.collect_statistics(job.model, job.layout, shared)
    for constraint in constraints:
        timer = shared.fork()
        step = _Step(job.model, full_masks(job.layout))
        for ratio in schedule(constraint.ratio, job.settings.rounds):
            step = _round(job, step, Constraint(constraint.metric, ratio), selection, timer)
        if job.settings.uniform:
            step = replace(step, student=to_plain(step.student))
        yield _summarise(job, step, constraint, timer, selection)


def schedule(ratio: float, rounds: int) -> list[float]:
    """The constraint of every round: each removes the same fraction of what is left."""
    return [ratio ** (i / rounds) for i in range(1, rounds)] + [ratio]


@dataclass(frozen=True)
class _Step:
    """A model on its way to a constraint, and its masks of the original's units."""

    student: PreTrainedModel
    masks: Masks
    warnings: Sequence[str] = ()
    promise: LatencyPromise | None = None


def _round(
    job: _Job, step: _Step, constraint: Constraint, selection: Selection, timer: StageTimer
) -> _Step:
    """Prune the student on to a constraint (a fraction of the original), and fit what is left."""
    student, layout, chosen = step.student, job.layout, selection
    if student is not job.model:
        layout = layout_of(student)
        chosen = job.collect_statistics(student, layout, timer)
    kept, promise = _choose(job, step, layout, chosen, constraint, timer)
    with timer.stage("compact"):
        student = compact(student, layout, kept)
        masks = _composed(job.layout, step.masks, layout, kept)
    warnings = missed_latency_warnings(promise)
    if not job.settings.tune:
        return _Step(student, masks, warnings, promise)
    with timer.stage("tune"), frozen(job.model), frozen(student):
        if job.settings.method != "kwon":
            warnings += refit(job.model, student, job.layout, job.inputs, progress=job.progress)
            return _Step(student, masks, warnings, promise)
        with _teacher(job, constraint, selection):
            scales, failures = tune_scales(
                job.model, student, job.layout, job.inputs, progress=job.progress
            )
        masks = _with_scales(job.layout, masks, scales)
        return _Step(student, masks, warnings + failures, promise)


def _choose(
    job: _Job,
    step: _Step,
    layout: Layout,
    selection: Selection,
    constraint: Constraint,
    timer: StageTimer,
) -> tuple[Masks, LatencyPromise | None]:
    """Masks of the student's units, of which `layout` is; a latency is measured as well."""
    costs = job.costs(constraint.metric)
    consumers = [block.consumer for block in job.layout.blocks]
    places = [consumers.index(block.consumer) for block in layout.blocks]
    num_units = [block.num_units for block in layout.blocks]

    def choose(costs: CostModel, budget: float) -> Masks:
        return selection.choose(costs.select_blocks(places, num_units), budget, timer)

    if constraint.metric != "latency":
        return choose(costs, costs.budget(constraint)), None

    def measure(kept: Masks) -> tuple[float, float]:
        with timer.stage("verify"), frozen(job.model):
            small = compact(step.student, layout, kept)
            return distributed.broadcast_from_main(
                lambda: measure_ratio(job.model, small, timed_batch(job.inputs, job.table))
            )

    def kept_by(kept: Masks) -> tuple[int, ...]:
        return num_kept(_composed(job.layout, step.masks, layout, kept))

    return meet_latency(costs, constraint, choose, measure, kept_by)


def _teacher(
    job: _Job, constraint: Constraint, selection: Selection
) -> AbstractContextManager[None]:
    """The model as it is, or, as in the authors' code, masked at the constraint's square root."""
    if job.settings.teacher == "dense" or selection.importance is None:
        return nullcontext()
    costs = job.costs(constraint.metric)
    halfway = Constraint(constraint.metric, math.sqrt(constraint.ratio))
    masks = search(job.layout, selection.importance, costs, costs.budget(halfway))
    return masked(job.model, job.layout, masks)


def _composed(layout: Layout, masks: Masks, later: Layout, kept: Masks) -> Masks:
    """Masks of the original's units, after a pruned model has been pruned on."""
    by_consumer = {block.consumer: mask for block, mask in zip(later.blocks, kept, strict=True)}
    composed = tuple(mask.clone() for mask in masks)
    for block, mask in zip(layout.blocks, composed, strict=True):
        if block.consumer in by_consumer:  # else nothing was left of it to prune
            mask[mask != 0] *= by_consumer[block.consumer]
    return composed


def _with_scales(layout: Layout, masks: Masks, scales: dict[str, Tensor]) -> Masks:
    tuned = tuple(mask.clone() for mask in masks)
    for block, mask in zip(layout.blocks, tuned, strict=True):
        if block.consumer in scales:
            mask[mask != 0] *= scales[block.consumer].to(mask.dtype)
    return tuned


def _summarise(
    job: _Job, step: _Step, constraint: Constraint, timer: StageTimer, selection: Selection
) -> PruneResult:
    """Put a pruned model together with what it kept and what that took."""
    layout = job.layout
    tokens = mean_tokens(job.inputs)
    macs = mac_costs(layout, tokens, mean_decoder_tokens(layout, job.inputs))
    kept = num_kept(step.masks)
    return PruneResult(
        model=step.student,
        masks=step.masks,
        layout=layout,
        constraint=constraint,
        achieved={
            "mac": macs.total(kept) / macs.original,
            "params": total_params(step.student) / total_params(job.model),
            "memory": total_bytes(step.student) / total_bytes(job.model),
            **({"latency": step.promise.measured} if step.promise else {}),
        },
        seconds=timer.report(),
        warnings=tuple(step.warnings),
        layers=tuple(units_of_layers(layout, kept)),
        mean_tokens=tokens,
        importance=selection.importance,
        curves=selection.curves,
        cached=tuple(sorted(timer.cached)),
        promise=step.promise,
    )
