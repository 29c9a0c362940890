"""Classical importance criteria as baselines: magnitude, gradient, Taylor, Fisher, random.

collect   one number per unit, see `rfprune.stages.importance` for the criteria and their papers
choose    the most important units within the budget, or the same fraction of every block
fit       as in `rfprune.methods.curvature`, so that only the choice of units differs
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from rfprune.cost.constraint import Constraint, CostModel
from rfprune.cost.sizes import Sizes
from rfprune.methods.allocation import choose_most_important
from rfprune.methods.curvature import refit_weights
from rfprune.methods.problem import Problem
from rfprune.model.frozen import frozen
from rfprune.model.masks import Masks
from rfprune.stages.importance import Importance, compute_importance


@dataclass(frozen=True)
class CriterionStatistics:
    """The importance (U,) of the units of each block."""

    importance: Importance
    curves: None = None

    def choose_units(self, problem: Problem, costs: CostModel, budget: float) -> Masks:
        """The most important units."""
        with problem.timer.stage("search"):
            return choose_most_important(problem, self.importance, costs, budget)

    def of_blocks(self, blocks: Sequence[int]) -> CriterionStatistics:
        """The same for a model that has only these blocks."""
        return replace(self, importance=tuple(self.importance[b] for b in blocks))

    def fit(
        self,
        problem: Problem,
        student: PreTrainedModel,
        _: Constraint | Sizes,
        removed: Collection[int] = (),
    ) -> tuple[dict[str, Tensor], list[str]]:
        """All weights of every out-projection; no scales of units."""
        return {}, refit_weights(problem, student, removed)


def collect(problem: Problem) -> CriterionStatistics:
    """Importance by the criterion of the settings."""
    return CriterionStatistics(problem.load_or_collect(_importance))


def _importance(problem: Problem) -> Importance:
    with problem.timer.stage("collect"), frozen(problem.model):
        return compute_importance(problem.settings.importance, problem.calibration)
