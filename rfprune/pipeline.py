"""prune(): the method on one page.

    mask gradients -> Fisher importance -> search under the constraint -> rearrangement ->
    compaction -> tuning

The model that is given stays as it is: masks act through hooks that are gone afterwards, and the
student is a copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
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
from rfprune.stages.fisher import Gradients, block_fisher, collect_gradients, diagonal_fisher
from rfprune.stages.objective import LABELS
from rfprune.stages.rearrange import rearrange
from rfprune.stages.search import search
from rfprune.stages.tune import tune_scales


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
    labelled = [
        {name: value.to(model.device) for name, value in batch.items()} for batch in batches
    ]
    if not labelled or not layout.blocks:
        raise UserError(
            "there is nothing to calibrate on, or nothing to prune; give at least one batch, and a "
            "model with heads or neurons"
        )
    inputs = [
        {name: value for name, value in batch.items() if name not in LABELS} for batch in labelled
    ]
    clock = Clock()
    with clock("collect"), frozen(model):
        gradients = collect_gradients(
            model,
            layout,
            labelled,
            use_labels=settings.use_labels,
            per_batch=settings.gradients == "per-batch",
            seed=settings.seed,
            progress=progress,
        )
    for constraint in constraints:
        yield _prune_kwon(
            model, layout, inputs, constraint, gradients, settings, clock.fork(), progress
        )


def _prune_kwon(
    model: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    constraint: Constraint,
    gradients: Gradients,
    settings: Settings,
    clock: Clock,
    progress: bool,
) -> PruneResult:
    """Kwon et al. 2022, section 4, from the mask gradients on."""
    costs = cost_model(constraint.metric, model, layout, batches)
    warnings: list[str] = []
    with clock("search"):
        importance = diagonal_fisher(gradients)
        masks = search(layout, importance, costs, costs.budget(constraint))
    if settings.rearrange:
        with clock("rearrange"):
            masks = tuple(
                rearrange(m, block_fisher(g)) for m, g in zip(masks, gradients, strict=True)
            )
    with clock("compact"):
        student = compact(model, layout, masks)
    if settings.tune:
        with clock("tune"), frozen(model), frozen(student):
            teacher: AbstractContextManager[None] = nullcontext()
            if settings.teacher == "scheduled":
                halfway = Constraint(constraint.metric, math.sqrt(constraint.ratio))
                teacher = masked(
                    model, layout, search(layout, importance, costs, costs.budget(halfway))
                )
            with teacher:
                scales, warnings = tune_scales(model, student, layout, batches, progress=progress)
            masks = _with_scales(layout, masks, scales)
    return summarise(model, student, layout, masks, constraint, batches, clock, warnings)


def _with_scales(layout: Layout, masks: Masks, scales: dict[str, torch.Tensor]) -> Masks:
    tuned = [mask.clone() for mask in masks]
    for block, mask in zip(layout.blocks, tuned, strict=True):
        if block.consumer in scales:
            mask[mask != 0] = scales[block.consumer].to(mask.dtype)
    return tuple(tuned)


def summarise(
    model: PreTrainedModel,
    student: PreTrainedModel,
    layout: Layout,
    masks: Masks,
    constraint: Constraint,
    batches: Sequence[Batch],
    clock: Clock,
    warnings: Sequence[str],
) -> PruneResult:
    """Put a pruned model together with what it kept and what that took."""
    tokens = mean_tokens(batches)
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
            "params": total_params(student) / total_params(model),
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
