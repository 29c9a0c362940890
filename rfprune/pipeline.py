"""prune(): the method on one page.

    kwon:       mask gradients -> Fisher importance -> search under the constraint ->
                rearrangement -> compaction -> one scale per kept unit by least squares
    curvature:  input and gradient moments -> error curve of every block -> exact allocation ->
                compaction -> every out-projection by least squares, and what reads the hidden
                states aligned with the original's
    importance: a classical criterion -> search, or the same fraction everywhere ->
                compaction -> every out-projection by least squares

Which units stay is in `rfprune.selection`; the stages themselves are in `rfprune.stages`. The model
that is given stays as it is: masks act through hooks that are gone afterwards, and the student is a
copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rfprune.cost.constraint import Constraint, CostModel
from rfprune.cost.grid import on_grid
from rfprune.cost.macs import mac_costs, total_macs
from rfprune.cost.memory import total_bytes
from rfprune.cost.metrics import check_constraints, cost_model, mean_tokens
from rfprune.cost.params import total_params
from rfprune.errors import UserError
from rfprune.model.compact import compact
from rfprune.model.layout import Layout, layout_of
from rfprune.model.masks import Masks, frozen, full_masks, masked, num_kept
from rfprune.model.plain import to_plain
from rfprune.model.replay import LABELS, Batch, token_mask, with_tokens
from rfprune.result import Clock, PruneResult, Settings
from rfprune.selection import Selection, check_sizes, learn
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
        cache: a folder where what is collected is kept: it serves any other constraint.

    Raises:
        UserError: the model type is not supported, the constraint cannot be met, there are no
            batches, or weights or gradients are not finite.
    """
    return next(
        prune_family(
            model, batches, [constraint], settings, loss=loss, cache=cache, progress=progress
        )
    )


def prune_family(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    constraints: Iterable[Constraint],
    settings: Settings | None = None,
    *,
    loss: Loss | None = None,
    cache: Path | None = None,
    progress: bool = False,
) -> Iterator[PruneResult]:
    """Prune to several constraints from one collection of statistics; see `prune`. Yields results
    in their order; what is no sequence is asked for the next constraint when one is wanted, so that
    a search can decide by the results so far."""
    settings = settings or Settings()
    layout = layout_of(model)
    check_finite(model)
    labelled = [with_tokens(model, layout, _on_device(batch, model.device)) for batch in batches]
    if not any(token_mask(batch).any() for batch in labelled) or not layout.blocks:
        raise UserError(
            "there is nothing to calibrate on, or nothing to prune; give at least one example, and "
            "a model with heads or neurons"
        )
    inputs = [
        {name: value for name, value in batch.items() if name not in LABELS} for batch in labelled
    ]
    if isinstance(constraints, Sequence):
        check_constraints(model, inputs, constraints)
    else:
        constraints = _checked_in_turn(model, inputs, constraints)
    job = _Job(model, layout, labelled, inputs, settings, loss, cache, progress)
    results = _family(job, constraints)
    while True:
        with torch.inference_mode(False), torch.enable_grad():  # in whatever mode the caller is
            result = next(results, None)
        if result is None:
            return
        yield result


def _checked_in_turn(
    model: PreTrainedModel, inputs: Sequence[Batch], constraints: Iterable[Constraint]
) -> Iterator[Constraint]:
    for constraint in constraints:
        check_constraints(model, inputs, [constraint])
        yield constraint


def _on_device(batch: Any, device: torch.device) -> Batch:
    """Raises UserError where a batch is none."""
    if not (isinstance(batch, Mapping) and all(isinstance(v, Tensor) for v in batch.values())):
        raise UserError(
            f"a batch must map names to tensors, as a data collator's output does; got a "
            f"{type(batch).__name__}: collate the examples with tensors first"
        )
    return {name: value.to(device) for name, value in batch.items()}


@dataclass(frozen=True)
class _Job:
    """What all constraints share; `inputs` are the `batches` without labels."""

    model: PreTrainedModel
    layout: Layout
    batches: Sequence[Batch]
    inputs: Sequence[Batch]
    settings: Settings
    loss: Loss | None
    cache: Path | None
    progress: bool

    def learn(self, model: PreTrainedModel, layout: Layout, clock: Clock) -> Selection:
        cache = self.cache if model is self.model else None  # students are not met again
        with_labels = self.settings.use_labels or self.loss is not None
        batches = self.batches if with_labels else self.inputs
        return learn(
            model,
            layout,
            batches,
            self.settings,
            clock,
            loss=self.loss,
            cache=cache,
            progress=self.progress,
        )

    def costs(self, metric: str, model: PreTrainedModel, layout: Layout) -> CostModel:
        costs = cost_model(metric, model, layout, self.inputs)
        return on_grid(costs, layout, self.settings.round_to)


def _family(job: _Job, constraints: Iterable[Constraint]) -> Iterator[PruneResult]:
    """What is learnt about the model itself is learnt once; what the later rounds need is not."""
    for constraint in constraints if isinstance(constraints, Sequence) else ():
        costs = job.costs(constraint.metric, job.model, job.layout)
        check_sizes(job.model, job.layout, costs, constraint, job.settings)
    shared = Clock()
    selection = job.learn(job.model, job.layout, shared)
    for constraint in constraints:
        clock = shared.fork()
        student, masks = job.model, full_masks(job.layout)
        warnings: list[str] = []
        for ratio in schedule(constraint.ratio, job.settings.rounds):
            milestone = Constraint(constraint.metric, ratio)
            student, masks, warnings = _round(job, student, masks, milestone, selection, clock)
        if job.settings.uniform:
            student = to_plain(student)
        yield _summarise(job, student, masks, constraint, clock, warnings, selection)


def schedule(ratio: float, rounds: int) -> list[float]:
    """The constraint of every round: each removes the same fraction of what is left."""
    return [ratio ** (i / rounds) for i in range(1, rounds)] + [ratio]


def _round(
    job: _Job,
    student: PreTrainedModel,
    masks: Masks,
    constraint: Constraint,
    selection: Selection,
    clock: Clock,
) -> tuple[PreTrainedModel, Masks, list[str]]:
    """Prune the student on to a constraint (a fraction of the original), and fit what is left."""
    costs = job.costs(constraint.metric, job.model, job.layout)
    budget, layout, chosen = costs.budget(constraint), job.layout, selection
    if student is not job.model:
        layout = layout_of(student)
        chosen = job.learn(student, layout, clock)
        costs = job.costs(constraint.metric, student, layout)
    kept = chosen.choose(costs, budget, clock)
    with clock("compact"):
        student = compact(student, layout, kept)
        masks = _composed(job.layout, masks, layout, kept)
    if not job.settings.tune:
        return student, masks, []
    with clock("tune"), frozen(job.model), frozen(student):
        if job.settings.method != "kwon":
            warnings = refit(job.model, student, job.layout, job.inputs, progress=job.progress)
            return student, masks, warnings
        with _teacher(job, constraint, selection):
            scales, warnings = tune_scales(
                job.model, student, job.layout, job.inputs, progress=job.progress
            )
        return student, _with_scales(job.layout, masks, scales), warnings


def _teacher(
    job: _Job, constraint: Constraint, selection: Selection
) -> AbstractContextManager[None]:
    """The model as it is, or, as in the authors' code, masked at the constraint's square root."""
    if job.settings.teacher == "dense" or selection.importance is None:
        return nullcontext()
    costs = job.costs(constraint.metric, job.model, job.layout)
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
    job: _Job,
    student: PreTrainedModel,
    masks: Masks,
    constraint: Constraint,
    clock: Clock,
    warnings: Sequence[str],
    selection: Selection,
) -> PruneResult:
    """Put a pruned model together with what it kept and what that took."""
    layout = job.layout
    tokens = mean_tokens(job.inputs)
    kept = num_kept(masks)
    layers = [{"heads": 0, "neurons": 0} for _ in layout.layers]
    for block, count in zip(layout.blocks, kept, strict=True):
        layers[block.layer][f"{block.kind}s"] = count
    return PruneResult(
        model=student,
        masks=masks,
        layout=layout,
        constraint=constraint,
        achieved={
            "mac": mac_costs(layout, tokens).total(kept) / total_macs(layout, tokens),
            "params": total_params(student) / total_params(job.model),
            "memory": total_bytes(student) / total_bytes(job.model),
        },
        seconds=clock.report(),
        warnings=tuple(warnings),
        layers=tuple(layers),
        mean_tokens=tokens,
        importance=selection.importance,
        curves=selection.curves,
        cached=tuple(sorted(clock.cached)),
    )


def check_finite(model: PreTrainedModel) -> None:
    """Refuse weights that are not finite, or not there to look at.

    Raises:
        UserError: the first such parameter is named.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UserError(
                f"parameter '{name}' is not in memory: it was offloaded, and every weight is "
                "looked at and some are changed; load the model onto devices that hold all of it"
            )
        if not torch.isfinite(parameter).all():
            raise UserError(
                f"parameter '{name}' holds NaN or infinity; save or download the checkpoint again"
            )
