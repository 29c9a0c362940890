"""The allocation against enumeration, over tables of every shape."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rfprune.cost.constraint import CostModel
from rfprune.errors import UserError
from rfprune.stages.allocate import allocate

Tables = list[NDArray[np.float64]]


def brute_force(errors: Tables, costs: CostModel, budget: float) -> float:
    """The least total error of all choices within the budget."""
    choices = product(*(range(len(error)) for error in errors))
    return min(
        sum(float(error[n]) for error, n in zip(errors, kept, strict=True))
        for kept in choices
        if costs.total(kept) <= budget
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tables, CostModel, float]:
    """Up to four blocks with falling errors and costs in whole numbers: linear, stepped, flat, or
    rough (a measured table need not rise with every unit), where keeping nothing is free."""
    errors, tables = [], []
    for _ in range(draw(st.integers(1, 4))):
        units = draw(st.integers(1, 5))
        falls = draw(st.lists(st.floats(0.01, 10), min_size=units, max_size=units))
        errors.append(np.array([*np.cumsum(falls[::-1])[::-1], 0.0]))
        shape = draw(st.sampled_from(["linear", "stepped", "flat", "rough"]))
        unit = draw(st.integers(1, 9))
        kept = np.arange(units + 1)
        table = {
            "linear": unit * kept,
            "stepped": unit * 2 * ((kept + 1) // 2),
            "flat": unit * np.minimum(kept, 1),
            "rough": np.array(
                [0, *draw(st.lists(st.integers(1, 30), min_size=units, max_size=units))]
            ),
        }[shape]
        tables.append(table.astype(np.float64))
    costs = CostModel("mac", tuple(tables))
    return errors, costs, float(draw(st.integers(1, max(1, int(costs.original)))))


@settings(max_examples=200)
@given(problems())
def test_no_choice_within_the_budget_is_better(problem: tuple[Tables, CostModel, float]) -> None:
    errors, costs, budget = problem
    best = brute_force(errors, costs, budget)
    try:
        # as many cells as the budget has units of cost: the grid is exact
        kept = allocate(errors, costs, budget, cells=int(budget))
    except UserError:
        assert best == pytest.approx(sum(float(error[0]) for error in errors))
        return
    assert costs.total(kept) <= budget
    found = sum(float(error[n]) for error, n in zip(errors, kept, strict=True))
    assert found == pytest.approx(best)


@given(problems(), st.integers(30, 200))
def test_a_coarse_grid_never_exceeds_the_budget_and_wastes_a_cell_a_block(
    problem: tuple[Tables, CostModel, float], cells: int
) -> None:
    errors, costs, budget = problem
    spared = budget * (1 - len(errors) / cells)
    try:
        kept = allocate(errors, costs, budget, cells=cells)
    except UserError:
        assert brute_force(errors, costs, spared) == pytest.approx(
            sum(float(error[0]) for error in errors)
        )
        return
    assert costs.total(kept) <= budget
    found = sum(float(error[n]) for error, n in zip(errors, kept, strict=True))
    assert found <= brute_force(errors, costs, spared) + 1e-9


def test_a_sublayer_whose_removal_saves_most_is_dropped_whole() -> None:
    stepped = np.array([0.0, 10.0, 11.0, 12.0])  # the first unit costs nearly all
    linear = np.array([0.0, 4.0, 8.0, 12.0])
    errors = [np.array([0.5, 0.3, 0.1, 0.0]), np.array([9.0, 5.0, 2.0, 0.0])]
    assert allocate(errors, CostModel("mac", (stepped, linear)), 14.0) == (0, 3)


def test_a_budget_for_nothing_is_refused_and_the_least_is_named() -> None:
    costs = CostModel("mac", (np.array([0.0, 5.0, 10.0]), np.array([0.0, 4.0, 10.0])))
    errors = [np.array([2.0, 1.0, 0.0])] * 2
    with pytest.raises(UserError, match=r"above 0\.2"):
        allocate(errors, costs, 3.0)


def test_units_that_are_worth_nothing_are_not_blamed_on_the_constraint() -> None:
    """So it is where the outputs are constant, or probabilities exactly 0 and 1."""
    costs = CostModel("mac", (np.array([0.0, 5.0, 10.0]), np.array([0.0, 4.0, 10.0])))
    with pytest.raises(UserError, match="no head or neuron has any influence"):
        allocate([np.zeros(3)] * 2, costs, 12.0)
