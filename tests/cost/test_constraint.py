"""Constraints and budgets.

Without these tests, a ratio that makes no sense could pass, and an error could suggest a constraint
that cannot be met either.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfprune.cost.constraint import Constraint, CostModel, linear_costs
from rfprune.errors import UserError


@pytest.mark.parametrize("ratio", [0, 1, 1.5, -1, math.nan, math.inf, "0.5", None])
def test_a_ratio_outside_0_and_1_is_refused(ratio: Any) -> None:
    with pytest.raises(UserError, match=rf"{ratio!r} is not .* between 0 and 1 .*0\.5"):
        Constraint("mac", ratio)
    assert Constraint("mac", np.float32(0.5)).ratio == 0.5  # type: ignore[arg-type]


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(UserError, match="'flops' is unknown; choose .*mac, params"):
        Constraint("flops", 0.5)


def test_totals_are_sums_over_the_tables_and_budgets_exclude_the_constant() -> None:
    costs = CostModel("mac", (np.array([0.0, 3, 4]), np.array([0.0, 1])), constant=10)
    assert costs.total([1, 0]) == 13
    assert costs.total([2, 1]) == costs.original == 15
    with pytest.raises(ValueError, match="shorter"):
        costs.total([1])
    costs = linear_costs("params", [2.0, 1.0], [10, 20], constant=60)
    assert costs.original == 100
    assert costs.budget(Constraint("params", 0.75)) == pytest.approx(15)


@given(
    constant=st.floats(0, 1e9),
    unit_costs=st.lists(st.floats(0.1, 1e6), min_size=1, max_size=4),
    ratio=st.floats(0.0001, 0.9999),
)
def test_a_budget_that_cannot_be_met_names_a_constraint_that_can(
    constant: float, unit_costs: list[float], ratio: float
) -> None:
    costs = linear_costs("params", unit_costs, [3] * len(unit_costs), constant)
    try:
        assert costs.budget(Constraint("params", ratio)) >= 0
    except UserError as error:
        assert ratio * costs.original < constant
        named = re.search(r"at least ([\d.]+)", str(error))
        assert named
        if float(named[1]) < 1:
            assert costs.budget(Constraint("params", float(named[1]))) >= 0
    else:
        assert ratio * costs.original >= constant
