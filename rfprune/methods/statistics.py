"""The interface of a method: what it has collected about a model, and what it does with it.

kwon:       mask gradients                                       `rfprune.methods.kwon`
curvature:  removal order and error curve of every block         `rfprune.methods.curvature`
importance: one number per unit, by a classical criterion        `rfprune.methods.criteria`
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from rfprune.cost.constraint import Constraint, CostModel
from rfprune.cost.sizes import Sizes
from rfprune.methods import criteria, curvature, kwon
from rfprune.methods.problem import Problem
from rfprune.model.masks import Masks
from rfprune.stages.optimal_brain_surgeon import ErrorCurve


class Statistics(Protocol):
    """What a method has collected about one model. It serves every constraint."""

    @property
    def importance(self) -> tuple[Tensor, ...] | None:
        """Importance (U,) of the units of each block; None for a method without it."""

    @property
    def curves(self) -> tuple[ErrorCurve, ...] | None:
        """Error curve of each block; None for a method without it."""

    def choose_units(self, problem: Problem, costs: CostModel, budget: float) -> Masks:
        """Masks of ones and zeros within a budget, for the model that was collected from.

        Raises:
            UserError: not a single unit fits the budget.
        """

    def of_blocks(self, blocks: Sequence[int]) -> Statistics:
        """The same statistics for a model that has only these blocks, by index."""

    def fit(
        self,
        problem: Problem,
        student: PreTrainedModel,
        constraint: Constraint | Sizes,
        removed: Collection[int] = (),
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Fit the weights of a pruned model to the original, in place.

        Args:
            problem: that of the original model, from which these statistics were collected.
            constraint: that the student has been pruned to, or its sizes.
            removed: indices of the layers that the student lacks.

        Returns:
            Scales of the kept units by consumer, if the method scales units, and a warning for each
            block that could not be fitted.
        """


def collect_statistics(problem: Problem) -> Statistics:
    """Collect what the method of the settings needs, or load it from the cache.

    Raises:
        UserError: gradients or activations are not finite.
    """
    methods: dict[str, Callable[[Problem], Statistics]] = {
        "kwon": kwon.collect,
        "curvature": curvature.collect,
        "importance": criteria.collect,
    }
    return methods[problem.settings.method](problem)
