"""A constraint that cannot be met is refused before any work; the smallest possible one is named.

Deleting this lets a run fail after minutes, or refuse a constraint that it could meet.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from rfprune.cost.constraint import Constraint
from rfprune.errors import UserError
from rfprune.methods.budget import check_constraints, cost_model, min_ratio, ratio_step
from rfprune.methods.problem import Problem, prepare_problem
from rfprune.model.masks import num_kept
from rfprune.pruning import prune
from rfprune.settings import METHODS, Settings

Tiny = Callable[..., Any]


@pytest.fixture
def problem_of(tiny_model: Tiny, tiny_batch: Tiny) -> Callable[..., Problem]:
    """`problem_of(**settings)`: a tiny problem."""

    def make(**settings: Any) -> Problem:
        return prepare_problem(tiny_model(), [tiny_batch(6, 7)], Settings(**settings))

    return make


@pytest.mark.parametrize("method", METHODS)
def test_the_named_constraint_keeps_a_single_unit(
    method: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    settings, batches = Settings(method=method, round_to=None), [tiny_batch(6, 7)]
    with pytest.raises(UserError, match=r"constraint 0\.1 on params cannot be met") as raised:
        prune(tiny_model(), batches, Constraint("params", 0.1), settings)
    named = re.search(r"choose (0\.\d+) or more", str(raised.value))
    assert named
    result = prune(tiny_model(), batches, Constraint("params", float(named[1])), settings)
    assert sum(num_kept(result.masks)) == 1


RULES: tuple[dict[str, Any], ...] = (
    *({"uniform": uniform, "round_to": size} for uniform in (False, True) for size in (None, 8)),
    *({"depth": depth} for depth in ("layers", "joint", "1")),
    {"depth": "layers", "uniform": True, "round_to": 8},
)


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("metric", ["mac", "params", "memory"])
def test_the_smallest_ratio_is_the_smallest_that_is_accepted(
    metric: str, rules: dict[str, Any], problem_of: Callable[..., Problem]
) -> None:
    problem = problem_of(**rules)
    smallest = min_ratio(problem, metric)
    check_constraints(problem, [Constraint(metric, smallest)])
    with pytest.raises(UserError, match=f"{smallest:g}"):
        check_constraints(problem, [Constraint(metric, smallest - 1e-4)])


@pytest.mark.parametrize("metric", ["mac", "params", "memory"])
def test_sizes_without_whole_layers_are_a_layer_apart(
    metric: str, problem_of: Callable[..., Problem], tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    """Layers of this model are alike."""
    problem = problem_of(depth="layers", round_to=None)
    step = ratio_step(problem, metric)
    just_enough = Constraint(metric, 1 - step + 1e-6)
    without_a_layer = prune(tiny_model(), [tiny_batch(6, 7)], just_enough, problem.settings)
    assert 0.05 < step < 0.9
    assert without_a_layer.achieved[metric] == pytest.approx(1 - step, abs=1e-4)
    assert len(without_a_layer.removed_layers) == 1
    assert ratio_step(problem_of(depth="joint"), metric) == ratio_step(problem_of(), metric) == 0


def test_latency_needs_a_table(problem_of: Callable[..., Problem]) -> None:
    with pytest.raises(UserError, match=r"needs a latency table.*profile_latency"):
        cost_model(problem_of(), "latency")
