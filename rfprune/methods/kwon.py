"""Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers".

    4.1  gradients of the loss with respect to a mask on every head and neuron give the diagonal of
         the Fisher information, the importance of each unit; a search keeps the most important
         units within the budget
    4.2  rearrangement: kept and pruned units of a block are swapped while that lowers the error
         that the block's full Fisher information predicts
    4.3  mask tuning: one scale per kept unit, by least squares against the original

Section numbers are those of the paper (NeurIPS 2022, arXiv 2204.09656).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from rfprune.cost.constraint import Constraint, CostModel
from rfprune.cost.sizes import Sizes
from rfprune.errors import UserError
from rfprune.methods.allocation import choose_most_important
from rfprune.methods.budget import cost_model
from rfprune.methods.problem import Problem
from rfprune.model.frozen import frozen
from rfprune.model.masks import Masks, masked
from rfprune.stages.fisher import Gradients, block_fisher, collect_gradients, diagonal_fisher
from rfprune.stages.least_squares import DampedSolver
from rfprune.stages.rearrange import rearrange
from rfprune.stages.search import search
from rfprune.stages.tune import tune_scales


@dataclass(frozen=True)
class KwonStatistics:
    """Mask gradients, and the importance that follows from them.

    Attributes:
        gradients: (n, U) per block, one row per example and factor of the Fisher information.
        importance: (U,) per block, the diagonal of the Fisher information.
        solver: of the scales of a block, in place of the closed form.
    """

    gradients: Gradients
    importance: tuple[Tensor, ...]
    solver: DampedSolver | None = None
    curves: None = None

    def choose_units(self, problem: Problem, costs: CostModel, budget: float) -> Masks:
        """Sections 4.1 and 4.2: search by importance, then rearrange within each block."""
        with problem.timer.stage("search"):
            masks = choose_most_important(problem, self.importance, costs, budget)
        if problem.settings.rearrange:
            with problem.timer.stage("rearrange"):
                masks = tuple(
                    rearrange(mask, block_fisher(gradient))
                    for mask, gradient in zip(masks, self.gradients, strict=True)
                )
        return masks

    def of_blocks(self, blocks: Sequence[int]) -> KwonStatistics:
        """The same for a model that has only these blocks."""
        return replace(
            self,
            gradients=tuple(self.gradients[b] for b in blocks),
            importance=tuple(self.importance[b] for b in blocks),
        )

    def fit(
        self,
        problem: Problem,
        student: PreTrainedModel,
        constraint: Constraint | Sizes,
        removed: Collection[int] = (),
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Section 4.3: mask tuning."""
        with self._teacher(problem, constraint):
            return tune_scales(
                problem.model,
                student,
                problem.layout,
                problem.inputs,
                removed=removed,
                progress=problem.progress,
                solver=self.solver,
            )

    def _teacher(
        self, problem: Problem, constraint: Constraint | Sizes
    ) -> AbstractContextManager[None]:
        """The original model, or, as in the authors' code, masked at the constraint's square root.

        The original measures better.
        """
        if problem.settings.teacher == "dense":
            return nullcontext()
        if isinstance(constraint, Sizes):
            raise UserError("teacher='scheduled' needs a constraint, which sizes are not")
        costs = cost_model(problem, constraint.metric)
        halfway = Constraint(constraint.metric, math.sqrt(constraint.ratio))
        masks = search(problem.layout, self.importance, costs, costs.budget(halfway))
        return masked(problem.model, problem.layout, masks)


def collect(problem: Problem) -> KwonStatistics:
    """Section 4.1: mask gradients over the calibration batches."""
    gradients = problem.load_or_collect(_mask_gradients)
    with problem.timer.stage("collect"):
        return KwonStatistics(gradients, diagonal_fisher(gradients))


def _mask_gradients(problem: Problem) -> Gradients:
    with problem.timer.stage("collect"), frozen(problem.model):
        return collect_gradients(
            problem.calibration, per_batch=problem.settings.gradients == "per-batch"
        )
