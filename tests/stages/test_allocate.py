"""Allocation against enumeration, over cost tables of every shape.

Without these tests a budget could be exceeded, or spent on the wrong blocks.
"""

from __future__ import annotations

import math
import re
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rfprune.cost.constraint import Constraint, CostModel
from rfprune.errors import UserError
from rfprune.stages.allocate import allocate

Tables = list[NDArray[np.float64]]


def brute_force(errors: Tables, costs: CostModel, budget: float) -> float:
    """The least total error of all choices within the budget."""
    choices = product(*(range(len(error)) for error in errors))
    totals = (
        sum(float(error[n]) for error, n in zip(errors, kept, strict=True))
        for kept in choices
        if costs.total(kept) <= budget
    )
    return min(totals, default=math.inf)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tables, CostModel, float]:
    """Up to four blocks with falling errors, some of them flat in part, and costs in whole numbers.

    Tables are linear, stepped, flat, or rough (a measured table need not rise with every unit);
    keeping nothing is free, cheap, or dearer than keeping something; some sizes are not allowed.
    """
    errors, tables = [], []
    for _ in range(draw(st.integers(1, 4))):
        units = draw(st.integers(1, 5))
        falls = draw(st.lists(st.just(0.0) | st.floats(0.01, 10), min_size=units, max_size=units))
        errors.append(np.array([*np.cumsum(falls[::-1])[::-1], 0.0]))
        shape = draw(st.sampled_from(["linear", "stepped", "flat", "rough"]))
        unit = draw(st.integers(0, 9))
        kept = np.arange(units + 1)
        table = {
            "linear": unit * kept,
            "stepped": unit * 2 * ((kept + 1) // 2),
            "flat": unit * np.minimum(kept, 1),
            "rough": np.array(draw(st.lists(st.integers(1, 30), min_size=units + 1,
                                            max_size=units + 1))),
        }[shape].astype(np.float64)  # fmt: skip
        table[0] = draw(st.sampled_from([0.0, table[0], table[0] + 1]))
        allowed = draw(st.lists(st.booleans(), min_size=units + 1, max_size=units + 1))
        allowed[0] = allowed[-1] = True
        tables.append(np.where(allowed, table, np.inf))
    costs = CostModel("mac", tuple(tables))
    return errors, costs, float(draw(st.integers(0, max(1, int(costs.original)))))


def to_spend(costs: CostModel, budget: float) -> float:
    """The rest of the budget when every block has its cheapest size."""
    return budget - sum(float(table.min()) for table in costs.tables)


@settings(max_examples=200)
@given(problems())
def test_no_choice_within_the_budget_is_better(problem: tuple[Tables, CostModel, float]) -> None:
    errors, costs, budget = problem
    best = brute_force(errors, costs, budget)
    try:
        # As many cells as there are units of cost to spend: the grid is exact.
        kept = allocate(errors, costs, budget, cells=max(1, int(to_spend(costs, budget))))
    except UserError:
        assert best >= sum(float(error[0]) for error in errors) - 1e-9
        return
    assert costs.total(kept) <= budget
    found = sum(float(error[n]) for error, n in zip(errors, kept, strict=True))
    assert found == pytest.approx(best)


@given(problems(), st.integers(30, 200))
def test_a_coarse_grid_never_exceeds_the_budget_and_wastes_a_cell_a_block(
    problem: tuple[Tables, CostModel, float], cells: int
) -> None:
    errors, costs, budget = problem
    spared = budget - to_spend(costs, budget) * len(errors) / cells
    try:
        kept = allocate(errors, costs, budget, cells=cells)
    except UserError:
        assert brute_force(errors, costs, spared) >= sum(float(e[0]) for e in errors) - 1e-9
        return
    assert costs.total(kept) <= budget
    found = sum(float(error[n]) for error, n in zip(errors, kept, strict=True))
    assert found <= brute_force(errors, costs, spared) + 1e-9


@pytest.mark.parametrize(
    ("tables", "constant", "budgets", "named", "kept"),
    [
        (([0, 5, 10], [0, 4, 10]), 0, (3, 0, -1), 0.2, (0, 1)),
        # Of 40 in total 20 are never pruned; two units of the first cost 6, none of the second 3.
        (([1, math.inf, 6, 10], [3, math.inf, math.inf, 10]), 20, (8.8, 0), 0.725, (2, 0)),
    ],
)
def test_a_budget_below_one_unit_is_refused_and_the_smallest_constraint_named(
    tables: tuple[list[float], ...],
    constant: float,
    budgets: tuple[float, ...],
    named: float,
    kept: tuple[int, ...],
) -> None:
    """It includes empty blocks and leaves out sizes that are not allowed."""
    costs = CostModel("mac", tuple(np.array(table, dtype=np.float64) for table in tables), constant)
    errors = [np.arange(len(table), dtype=np.float64)[::-1] for table in tables]
    for budget in budgets:
        with pytest.raises(UserError, match=re.escape(f"at least {named}") + "$"):
            allocate(errors, costs, budget)
    assert allocate(errors, costs, costs.budget(Constraint("mac", named))) == kept


def test_a_model_whose_units_have_no_influence_is_refused() -> None:
    """Its outputs are constant, or its probabilities exactly 0 and 1."""
    costs = CostModel("mac", (np.array([0.0, 5.0, 10.0]), np.array([0.0, 4.0, 10.0])))
    with pytest.raises(UserError, match="no head or neuron has any influence"):
        allocate([np.zeros(3)] * 2, costs, 12.0)
