"""prune(): the method on one page.

    kwon:       mask gradients -> Fisher importance -> search under the constraint ->
                rearrangement -> compaction -> one scale per kept unit by least squares
    curvature:  input and gradient moments -> error curve of every block -> exact allocation ->
                compaction -> every out-projection by least squares

The model that is given stays as it is: masks act through hooks that are gone afterwards, and the
student is a copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rfprune.cost.constraint import Constraint, CostModel
from rfprune.cost.macs import mac_costs, total_macs
from rfprune.cost.params import param_costs, total_params
from rfprune.errors import UserError
from rfprune.model.compact import compact
from rfprune.model.layout import Layout, layout_of
from rfprune.model.masks import Masks, frozen, masked, num_kept
from rfprune.model.replay import Batch, token_mask
from rfprune.result import Clock, PruneResult, Settings
from rfprune.stages.allocate import allocate
from rfprune.stages.curvature import collect_curvature, error_curves
from rfprune.stages.fisher import block_fisher, collect_gradients, diagonal_fisher
from rfprune.stages.objective import LABELS
from rfprune.stages.rearrange import rearrange
from rfprune.stages.search import search
from rfprune.stages.tune import refit, tune_scales


def prune(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    constraint: Constraint,
    settings: Settings | None = None,
    *,
    progress: bool = False,
) -> PruneResult:
    """Prune a fine-tuned Transformer to a constraint, without retraining.

    Args:
        model: with a sequence-classification or question-answering head; left untouched, also after
            an error.
        batches: calibration batches of input_ids (B, S), attention_mask, ...; no labels needed;
            read once.

    Raises:
        UserError: the model type is not supported, the constraint cannot be met, there are no
            batches, or weights or gradients are not finite.
    """
    return next(prune_family(model, batches, [constraint], settings, progress=progress))


def prune_family(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    constraints: Sequence[Constraint],
    settings: Settings | None = None,
    *,
    progress: bool = False,
) -> Iterator[PruneResult]:
    """Prune to several constraints from one collection of statistics; see `prune`. Yields results
    in their order."""
    settings = settings or Settings()
    layout = layout_of(model)
    check_finite(model)
    labelled = [_on_device(batch, model.device) for batch in batches]
    if not any(token_mask(batch).any() for batch in labelled) or not layout.blocks:
        raise UserError(
            "there is nothing to calibrate on, or nothing to prune; give at least one example, and "
            "a model with heads or neurons"
        )
    inputs = [
        {name: value for name, value in batch.items() if name not in LABELS} for batch in labelled
    ]
    check_constraints(model, inputs, constraints)
    job = _Job(model, layout, labelled, inputs, settings, progress)
    methods = {"kwon": _kwon, "curvature": _curvature}
    results = methods[settings.method](job, constraints)
    while True:
        with torch.inference_mode(False), torch.enable_grad():  # in whatever mode the caller is
            result = next(results, None)
        if result is None:
            return
        yield result


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
    progress: bool


def _kwon(job: _Job, constraints: Sequence[Constraint]) -> Iterator[PruneResult]:
    """The published method (Kwon et al. 2022, section 4)."""
    model, layout, settings = job.model, job.layout, job.settings
    shared = Clock()
    with shared("collect"), frozen(model):
        gradients = collect_gradients(
            model,
            layout,
            job.batches,
            use_labels=settings.use_labels,
            per_batch=settings.gradients == "per-batch",
            seed=settings.seed,
            progress=job.progress,
        )
        importance = diagonal_fisher(gradients)
    for constraint in constraints:
        clock = shared.fork()
        warnings: list[str] = []
        costs = cost_model(constraint.metric, model, layout, job.inputs)
        with clock("search"):
            masks = search(layout, importance, costs, costs.budget(constraint))
        if settings.rearrange:
            with clock("rearrange"):
                masks = tuple(
                    rearrange(mask, block_fisher(gradient))
                    for mask, gradient in zip(masks, gradients, strict=True)
                )
        with clock("compact"):
            student = compact(model, layout, masks)
        if settings.tune:
            with (
                clock("tune"),
                frozen(model),
                frozen(student),
                _teacher(job, constraint, costs, importance),
            ):
                scales, warnings = tune_scales(
                    model, student, layout, job.inputs, progress=job.progress
                )
                masks = _with_scales(layout, masks, scales)
        yield _summarise(job, student, masks, constraint, clock, warnings)


def _teacher(
    job: _Job, constraint: Constraint, costs: CostModel, importance: Sequence[Tensor]
) -> AbstractContextManager[None]:
    """The model as it is, or, as in the authors' code, masked at the constraint's square root."""
    if job.settings.teacher == "dense":
        return nullcontext()
    halfway = Constraint(constraint.metric, math.sqrt(constraint.ratio))
    masks = search(job.layout, importance, costs, costs.budget(halfway))
    return masked(job.model, job.layout, masks)


def _curvature(job: _Job, constraints: Sequence[Constraint]) -> Iterator[PruneResult]:
    """Past the published method: error curves, exact allocation, refitted out-projections."""
    model, layout, settings = job.model, job.layout, job.settings
    shared = Clock()
    with shared("collect"), frozen(model):
        collected = collect_curvature(
            model,
            layout,
            job.batches,
            use_labels=settings.use_labels,
            seed=settings.seed,
            progress=job.progress,
        )
    with shared("search"):
        curves = error_curves(model, layout, collected, progress=job.progress)
    for constraint in constraints:
        clock = shared.fork()
        warnings: list[str] = []
        costs = cost_model(constraint.metric, model, layout, job.inputs)
        with clock("search"):
            errors = [curve.errors.numpy() for curve in curves]
            kept = allocate(errors, costs, costs.budget(constraint))
            masks = tuple(curve.mask(n) for curve, n in zip(curves, kept, strict=True))
        with clock("compact"):
            student = compact(model, layout, masks)
        if settings.tune:
            with clock("tune"), frozen(model), frozen(student):
                warnings = refit(model, student, layout, job.inputs, progress=job.progress)
        yield _summarise(job, student, masks, constraint, clock, warnings)


def _with_scales(layout: Layout, masks: Masks, scales: dict[str, Tensor]) -> Masks:
    tuned = [mask.clone() for mask in masks]
    for block, mask in zip(layout.blocks, tuned, strict=True):
        if block.consumer in scales:
            mask[mask != 0] = scales[block.consumer].to(mask.dtype)
    return tuple(tuned)


def _summarise(
    job: _Job,
    student: PreTrainedModel,
    masks: Masks,
    constraint: Constraint,
    clock: Clock,
    warnings: Sequence[str],
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
        },
        seconds=clock.report(),
        warnings=tuple(warnings),
        layers=tuple(layers),
        mean_tokens=tokens,
    )


def cost_model(
    metric: str, model: PreTrainedModel, layout: Layout, batches: Sequence[Batch]
) -> CostModel:
    """What kept units cost by the metric of a constraint."""
    if metric == "params":
        return param_costs(model, layout)
    return mac_costs(layout, mean_tokens(batches))


def check_constraints(
    model: PreTrainedModel, batches: Sequence[Batch], constraints: Iterable[Constraint]
) -> None:
    """Refuse what cannot be met before any work is done for it.

    Raises:
        UserError: a constraint is too small for a single head or neuron; the least is named.
    """
    layout = layout_of(model)
    for constraint in constraints:
        costs = cost_model(constraint.metric, model, layout, batches)
        cheapest = min(
            (float(table[1:].min()) for table in costs.tables if len(table) > 1), default=0.0
        )
        least = costs.constant + cheapest
        if constraint.ratio * costs.original < least:
            ratio = costs.ratio_for(least)
            raise UserError(
                f"constraint {constraint.ratio:g} on {constraint.metric} cannot be met: what is "
                f"never pruned and a single head or neuron already cost {ratio:g} of the original; "
                f"choose {ratio:g} or more"
            )


def mean_tokens(batches: Sequence[Batch]) -> float:
    """Mean number of real tokens an example."""
    masks = [token_mask(batch) for batch in batches]
    return float(sum(int(mask.sum()) for mask in masks) / sum(len(mask) for mask in masks))


def check_finite(model: PreTrainedModel) -> None:
    """Refuse weights that are not finite.

    Raises:
        UserError: the first such parameter is named.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(
                f"parameter '{name}' holds NaN or infinity; save or download the checkpoint again"
            )
