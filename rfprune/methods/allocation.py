"""How a budget is divided among blocks: freely, the same fraction, or the same sizes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rfprune.cost.constraint import CostModel
from rfprune.methods.problem import Problem
from rfprune.model.masks import Masks
from rfprune.model.plain import plain_sizes
from rfprune.stages.allocate import allocate
from rfprune.stages.search import additive_errors, keep_most_important, search
from rfprune.stages.uniform import same_fraction, same_sizes


def divide_budget(
    problem: Problem, errors: Sequence[NDArray[np.float64]], costs: CostModel, budget: float
) -> tuple[int, ...]:
    """The number of units that each block keeps, for the least total error.

    Args:
        errors: per block, `errors[b][n]` is the error of keeping n units.

    Raises:
        UserError: not a single unit fits the budget, or, with `uniform`, no allowed size does.
    """
    if problem.settings.uniform:
        allowed = plain_sizes(problem.model, problem.layout)
        return same_sizes(problem.layout, errors, costs, budget, allowed=allowed)
    return allocate(errors, costs, budget)


def choose_most_important(
    problem: Problem, importance: Sequence[Tensor], costs: CostModel, budget: float
) -> Masks:
    """Masks of the most important units within a budget.

    Args:
        importance: (U,) per block.

    Raises:
        UserError: not a single unit fits the budget, or, with `uniform`, no allowed size does.
    """
    if problem.settings.uniform:
        kept = divide_budget(problem, additive_errors(importance), costs, budget)
        return keep_most_important(importance, kept)
    if problem.settings.allocation == "uniform":
        return same_fraction(problem.layout, importance, costs, budget)
    return search(problem.layout, importance, costs, budget)
