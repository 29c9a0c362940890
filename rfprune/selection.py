"""Which units to keep, by method: what is collected once serves any budget.

kwon:       mask gradients -> Fisher importance -> search -> rearrangement
curvature:  input and gradient moments -> error curve of every block -> exact allocation
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from rfprune.cost.constraint import CostModel
from rfprune.model.layout import Layout
from rfprune.model.masks import Masks, frozen
from rfprune.model.replay import Batch
from rfprune.result import Clock, Settings
from rfprune.stages.allocate import allocate
from rfprune.stages.curvature import collect_curvature, error_curves
from rfprune.stages.fisher import block_fisher, collect_gradients, diagonal_fisher
from rfprune.stages.obs import Curve
from rfprune.stages.rearrange import rearrange
from rfprune.stages.search import search


@dataclass(frozen=True)
class Selection:
    """What a method has learnt about a model.

    Attributes:
        choose: the masks that keep within a budget; the clock takes the time by stage.
        importance: per block the importance (U,) of its units, where the method has one.
        curves: per block its error curve, where the method has one.
    """

    choose: Callable[[CostModel, float, Clock], Masks]
    importance: tuple[Tensor, ...] | None = None
    curves: tuple[Curve, ...] | None = None


def learn(
    model: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    settings: Settings,
    clock: Clock,
    *,
    progress: bool = False,
) -> Selection:
    """Collect what the method of `settings` needs.

    Args:
        batches: calibration batches, with labels where the settings ask for them.
        clock: takes the time by stage.

    Raises:
        UserError: gradients or activations are not finite.
    """
    methods = {"kwon": _kwon, "curvature": _curvature}
    return methods[settings.method](model, layout, batches, settings, clock, progress)


def _kwon(
    model: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    settings: Settings,
    clock: Clock,
    progress: bool,
) -> Selection:
    """Kwon et al. 2022, sections 4.1 and 4.2."""
    with clock("collect"), frozen(model):
        gradients = collect_gradients(
            model,
            layout,
            batches,
            use_labels=settings.use_labels,
            per_batch=settings.gradients == "per-batch",
            seed=settings.seed,
            progress=progress,
        )
        importance = diagonal_fisher(gradients)

    def choose(costs: CostModel, budget: float, clock: Clock) -> Masks:
        with clock("search"):
            masks = search(layout, importance, costs, budget)
        if settings.rearrange:
            with clock("rearrange"):
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
    clock: Clock,
    progress: bool,
) -> Selection:
    """Past the published method: error curves with correlations, and their exact allocation."""
    with clock("collect"), frozen(model):
        collected = collect_curvature(
            model,
            layout,
            batches,
            use_labels=settings.use_labels,
            seed=settings.seed,
            progress=progress,
        )
    with clock("search"):
        curves = error_curves(model, layout, collected, progress=progress)

    def choose(costs: CostModel, budget: float, clock: Clock) -> Masks:
        with clock("search"):
            kept = allocate([curve.errors.numpy() for curve in curves], costs, budget)
            return tuple(curve.mask(n) for curve, n in zip(curves, kept, strict=True))

    return Selection(choose, curves=curves)
