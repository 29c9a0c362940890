"""Sizes that are the same in every layer: the best within the budget, and no block is emptied.

Without these tests the uniform baseline could exceed its budget, or waste it and look worse than it
is.
"""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rfprune.cost.constraint import Constraint, CostModel, linear_costs
from rfprune.errors import UserError
from rfprune.model.layout import Layout
from rfprune.model.masks import num_kept
from rfprune.stages.uniform import (
    min_same_sizes_cost,
    same_fraction,
    same_fraction_counts,
    same_sizes,
)
from tests.stages.test_search import made_layout

Problem = tuple[list[int], CostModel, float]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Blocks of different sizes and costs, and any budget."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    unit_costs = draw(st.lists(st.floats(0.1, 10), min_size=len(sizes), max_size=len(sizes)))
    costs = linear_costs("mac", unit_costs, sizes, draw(st.sampled_from([0.0, 50.0])))
    return sizes, costs, draw(st.floats(0, 1)) * (costs.original - costs.constant)


@given(problems())
def test_the_same_fraction_everywhere_is_the_largest_within_the_budget(problem: Problem) -> None:
    """At the next larger fraction the first block keeps one more unit."""
    sizes, costs, budget = problem
    try:
        kept = same_fraction_counts(*problem)
    except UserError:
        assert costs.total([1] * len(sizes)) > budget + costs.constant
        return
    assert costs.total(kept) <= (budget + costs.constant) * (1 + 1e-9)
    assert all(1 <= n <= units for n, units in zip(kept, sizes, strict=True))
    for (a, of_a), (b, of_b) in itertools.permutations(zip(kept, sizes, strict=True), 2):
        assert (a - 1) / of_a < b / of_b + 1e-12, "fractions differ by rounding up alone"
        assert a == b or of_a != of_b
    if kept != tuple(sizes):
        fraction = min(n / units for n, units in zip(kept, sizes, strict=True))
        larger = [math.ceil((fraction + 1e-9) * units) for units in sizes]
        assert larger != list(kept)
        assert costs.total(larger) > budget + costs.constant


def test_every_block_keeps_its_most_important_units() -> None:
    layout = made_layout([2, 2], [4, 4])
    importance = [
        *(torch.tensor([1.0, 2]), torch.tensor([4.0, 1, 3, 2])),
        *(torch.tensor([90.0, 80]), torch.tensor([70.0, 70, 70, 70])),
    ]
    costs = linear_costs("mac", [4.0, 1, 4, 1], [2, 4, 2, 4])
    masks = same_fraction(layout, importance, costs, 12.0)
    assert [mask.tolist() for mask in masks] == [[0, 1], [1, 0, 1, 0], [1, 0], [1, 1, 0, 0]]


def test_half_of_the_budget_is_half_of_the_units() -> None:
    """A rounding error would give one head less in each layer."""
    layout = made_layout([12] * 6, [1536] * 6)
    costs = linear_costs("mac", [1.1, 0.1] * 6, [12, 1536] * 6, constant=0.7)
    importance = [torch.rand(block.num_units) for block in layout.blocks]
    budget = 0.5 * (costs.original - costs.constant)
    assert num_kept(same_fraction(layout, importance, costs, budget)) == (6, 768) * 6


def test_the_smallest_constraint_is_named_and_can_be_met() -> None:
    layout = made_layout([2], [5])
    importance = [torch.ones(2), torch.ones(5)]
    costs = linear_costs("mac", [3.0, 1.0], [2, 5])
    with pytest.raises(UserError, match="too little for one head and one neuron") as raised:
        same_fraction(layout, importance, costs, costs.budget(Constraint("mac", 0.2)))
    named = re.search(r"at least ([\d.]+\d)", str(raised.value))
    assert named
    budget = costs.budget(Constraint("mac", float(named[1])))
    assert num_kept(same_fraction(layout, importance, costs, budget)) == (1, 1)
    restricted = CostModel("mac", (np.array([0.0, np.inf, 2.0, np.inf, 4.0]),))
    with pytest.raises(UserError, match=r"at least 0\.5,"):
        same_fraction_counts([4], restricted, 1.0)


Sizes = tuple[Layout, list[NDArray[np.float64]], CostModel, float]


@st.composite
def size_problems(draw: st.DrawFn) -> Sizes:
    """One to three layers of different sizes; tables of any shape, in whole numbers."""
    layers = draw(st.integers(1, 3))
    sizes = st.lists(st.integers(1, 4), min_size=layers, max_size=layers)
    layout = made_layout(draw(sizes), draw(sizes))
    errors, tables = [], []
    for block in layout.blocks:
        falls = draw(
            st.lists(st.integers(0, 9), min_size=block.num_units, max_size=block.num_units)
        )
        errors.append(np.array([*np.cumsum(falls[::-1])[::-1], 0.0], dtype=np.float64))
        table = st.integers(0, 20) | st.just(np.inf)
        middle = draw(st.lists(table, min_size=block.num_units, max_size=block.num_units))
        tables.append(np.array([0.0, *middle[:-1], draw(st.integers(1, 20))], dtype=np.float64))
    costs = CostModel("latency", tuple(tables), draw(st.sampled_from([0.0, 7.0])))
    return layout, errors, costs, float(draw(st.integers(0, 60)))


@given(size_problems(), st.data())
def test_no_other_pair_of_sizes_within_the_budget_is_better(
    problem: Sizes, data: st.DataObject
) -> None:
    layout, errors, costs, budget = problem
    most = {
        kind: min(block.num_units for block in layout.blocks if block.kind == kind)
        for kind in ("head", "neuron")
    }
    numbers = {
        kind: st.lists(st.integers(1, n), min_size=1, unique=True) for kind, n in most.items()
    }
    allowed = data.draw(st.fixed_dictionaries({}, optional=numbers))
    found = {}
    for heads, neurons in itertools.product(
        *(allowed.get(kind, range(1, n + 1)) for kind, n in most.items())
    ):
        kept = [heads if block.kind == "head" else neurons for block in layout.blocks]
        found[tuple(kept)] = (
            sum(float(error[n]) for error, n in zip(errors, kept, strict=True)),
            costs.total(kept),
        )
    assert min_same_sizes_cost(layout, costs, allowed) == min(cost for _, cost in found.values())
    fitting = {
        kept: (error, cost)
        for kept, (error, cost) in found.items()
        if cost <= budget + costs.constant
    }
    if not fitting:
        with pytest.raises(UserError, match="leave out --uniform"):
            same_sizes(layout, errors, costs, budget, allowed=allowed)
        return
    chosen = same_sizes(layout, errors, costs, budget, allowed=allowed)
    assert fitting[chosen] == min(fitting.values()), "of equal errors the cheapest"


def test_the_smallest_constraint_for_a_fixed_number_of_heads() -> None:
    layout = made_layout([2, 2], [5, 5])
    costs = linear_costs("mac", [10.0, 1.0] * 2, [2, 5] * 2)
    errors = [np.linspace(1, 0, len(table)) for table in costs.tables]
    allowed = {"head": (2,)}
    with pytest.raises(UserError, match="all heads stay") as raised:
        same_sizes(layout, errors, costs, costs.budget(Constraint("mac", 0.5)), allowed=allowed)
    named = re.findall(r"at least ([\d.]+\d)", str(raised.value))
    assert set(named) == {"0.84"}
    budget = costs.budget(Constraint("mac", 0.84))
    assert same_sizes(layout, errors, costs, budget, allowed=allowed) == (2, 1, 2, 1)
