"""Which units to keep, by method: what is collected once serves any budget.

kwon:       mask gradients -> Fisher importance -> search -> rearrangement
curvature:  input and gradient moments -> error curve of every block -> exact allocation
importance: a classical criterion -> search, or the same fraction of every block

With `uniform`, search and allocation make way for the best sizes that are the same in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from rfprune.cache import Remember, Tensors, remembering_statistics
from rfprune.cost.constraint import Constraint, CostModel
from rfprune.cost.rounding import restrict_to_multiples
from rfprune.latency.table import LatencyTable
from rfprune.methods.budget import check_constraints, cost_model, least_ratio
from rfprune.model.batch import Batch
from rfprune.model.frozen import frozen
from rfprune.model.layout import Layout, layout_of
from rfprune.model.masks import Masks
from rfprune.model.plain import plain_sizes
from rfprune.result import StageTimer
from rfprune.settings import Settings
from rfprune.stages.allocate import allocate
from rfprune.stages.calibration import Calibration
from rfprune.stages.curvature import collect_curvature, error_curves
from rfprune.stages.fisher import block_fisher, collect_gradients, diagonal_fisher
from rfprune.stages.importance import compute_importance
from rfprune.stages.objective import LABELLED, PREDICTIONS, Loss, Objective
from rfprune.stages.optimal_brain_surgeon import ErrorCurve
from rfprune.stages.rearrange import rearrange
from rfprune.stages.search import additive_errors, keep_most_important, search
from rfprune.stages.uniform import min_same_sizes_cost, same_fraction, same_sizes


@dataclass(frozen=True)
class Selection:
    """What a method has learnt about a model.

    Attributes:
        choose: the masks that keep within a budget; the timer takes the time by stage.
        importance: per block the importance (U,) of its units, where the method has one.
        curves: per block its error curve, where the method has one.
    """

    choose: Callable[[CostModel, float, StageTimer], Masks]
    importance: tuple[Tensor, ...] | None = None
    curves: tuple[ErrorCurve, ...] | None = None


def collect_statistics(
    model: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    settings: Settings,
    timer: StageTimer,
    *,
    loss: Loss | None = None,
    cache: Path | None = None,
    progress: bool = False,
) -> Selection:
    """Collect what the method of `settings` needs.

    Args:
        batches: calibration batches, with labels where the settings ask for them.
        timer: takes the time by stage.
        loss: differentiated instead of what the settings say.
        cache: a folder where what is collected is kept, and looked for first; not with a loss,
            since nobody can tell what it computes.

    Raises:
        UserError: gradients or activations are not finite.
    """
    methods = {"kwon": _kwon, "curvature": _curvature, "importance": _importance}
    objective: Objective = LABELLED if settings.use_labels else PREDICTIONS
    objective = objective if loss is None else loss
    cache = cache if loss is None else None
    remember = remembering_statistics(cache, model, batches, settings, timer)
    collect_for = methods[settings.method]
    return collect_for(model, layout, batches, settings, timer, objective, remember, progress)


def least_possible(
    model: PreTrainedModel, layout: Layout, costs: CostModel, settings: Settings
) -> float:
    """The least ratio of a constraint that the settings leave possible.

    Raises:
        UserError: none is: the model cannot have the same sizes in every layer.
    """
    costs = restrict_to_multiples(costs, layout, settings.round_to)
    if settings.uniform:
        return costs.ratio_for(min_same_sizes_cost(layout, costs, plain_sizes(model, layout)))
    return least_ratio(costs)


def check_possible(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    constraints: Iterable[Constraint],
    settings: Settings,
    table: LatencyTable | None = None,
) -> None:
    """Refuse what cannot be met before any work is done for it.

    Raises:
        UserError: a constraint is below the least possible one, which is named, or the model
            cannot have the same sizes in every layer where the settings want it.
    """
    wanted = list(constraints)
    check_constraints(model, batches, wanted, table, settings.round_to)
    if not settings.uniform:
        return
    layout = layout_of(model)
    allowed = plain_sizes(model, layout)
    for constraint in wanted:
        costs = cost_model(constraint.metric, model, layout, batches, table)
        costs = restrict_to_multiples(costs, layout, settings.round_to)
        nothing = [np.zeros(len(own)) for own in costs.tables]
        same_sizes(layout, nothing, costs, costs.budget(constraint), allowed=allowed)


def _division(
    model: PreTrainedModel, layout: Layout, settings: Settings
) -> Callable[[Sequence[NDArray[np.float64]], CostModel, float], tuple[int, ...]]:
    """How many units each block keeps, by error curves and a budget.

    Raises:
        UserError: the same sizes are asked for in every layer, and the model cannot have them.
    """
    if settings.uniform:
        return partial(same_sizes, layout, allowed=plain_sizes(model, layout))
    return allocate


def _by_importance(
    model: PreTrainedModel, layout: Layout, settings: Settings
) -> Callable[[Sequence[Tensor], CostModel, float], Masks]:
    """Which units stay, by the importance of each and a budget."""
    if settings.uniform:
        divide = _division(model, layout, settings)
        return lambda importance, costs, budget: keep_most_important(
            importance, divide(additive_errors(importance), costs, budget)
        )
    return partial({"global": search, "uniform": same_fraction}[settings.allocation], layout)


def _kwon(
    model: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    settings: Settings,
    timer: StageTimer,
    objective: Objective,
    remember: Remember,
    progress: bool,
) -> Selection:
    """Kwon et al. 2022, sections 4.1 and 4.2."""

    def collect() -> Tensors:
        with timer.stage("collect"), frozen(model):
            return collect_gradients(
                Calibration(model, layout, batches, objective, settings.seed, progress),
                per_batch=settings.gradients == "per-batch",
            )

    select = _by_importance(model, layout, settings)
    gradients = remember(collect)
    with timer.stage("collect"):
        importance = diagonal_fisher(gradients)

    def choose(costs: CostModel, budget: float, timer: StageTimer) -> Masks:
        with timer.stage("search"):
            masks = select(importance, costs, budget)
        if settings.rearrange:
            with timer.stage("rearrange"):
                masks = tuple(
                    rearrange(mask, block_fisher(gradient))
                    for mask, gradient in zip(masks, gradients, strict=True)
                )
        return masks

    return Selection(choose, importance=importance)


def _curvature(
    model: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    settings: Settings,
    timer: StageTimer,
    objective: Objective,
    remember: Remember,
    progress: bool,
) -> Selection:
    """Past the published method: error curves with correlations, and their exact allocation."""

    def collect() -> Tensors:
        with timer.stage("collect"), frozen(model):
            collected = collect_curvature(
                Calibration(model, layout, batches, objective, settings.seed, progress)
            )
        with timer.stage("search"):
            found = error_curves(model, layout, collected, progress=progress)
        return tuple(tensor for curve in found for tensor in (curve.order, curve.errors))

    divide = _division(model, layout, settings)
    known = remember(collect)  # kilobytes, where the moments are gigabytes
    curves = tuple(
        ErrorCurve(order, errors) for order, errors in zip(known[::2], known[1::2], strict=True)
    )

    def choose(costs: CostModel, budget: float, timer: StageTimer) -> Masks:
        with timer.stage("search"):
            kept = divide([curve.errors.numpy() for curve in curves], costs, budget)
            return tuple(curve.mask(n) for curve, n in zip(curves, kept, strict=True))

    return Selection(choose, curves=curves)


def _importance(
    model: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    settings: Settings,
    timer: StageTimer,
    objective: Objective,
    remember: Remember,
    progress: bool,
) -> Selection:
    """The classical criteria, as baselines."""

    def collect() -> Tensors:
        with timer.stage("collect"), frozen(model):
            return compute_importance(
                settings.importance,
                Calibration(model, layout, batches, objective, settings.seed, progress),
            )

    select = _by_importance(model, layout, settings)
    importance = remember(collect)

    def choose(costs: CostModel, budget: float, timer: StageTimer) -> Masks:
        with timer.stage("search"):
            return select(importance, costs, budget)

    return Selection(choose, importance=importance)
