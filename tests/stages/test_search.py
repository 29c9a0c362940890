"""Mask search against brute force over all masks.

Without these tests the search could exceed the budget, or miss a better choice of units.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from rfprune.cost.constraint import Constraint, CostModel, linear_costs
from rfprune.errors import UserError
from rfprune.families.schema import Sublayer
from rfprune.model.layout import Block, Layout
from rfprune.model.masks import num_kept
from rfprune.stages.search import additive_errors, keep_most_important, search

Tiny = Callable[..., Any]
Problem = tuple[Layout, list[Tensor], CostModel, float]


def made_layout(heads: list[int], neurons: list[int]) -> Layout:
    """A layout with these numbers of heads and neurons; a sublayer without any has no block."""
    blocks = []
    for layer, sizes in enumerate(itertools.zip_longest(heads, neurons, fillvalue=0)):
        for kind, size in zip(("head", "neuron"), sizes, strict=True):
            row = Sublayer(kind, (), f"{layer}.{kind}", "", None)  # type: ignore[arg-type]
            block = Block(layer, row, (), size, 1, tuple(range(size)))
            if size:
                blocks.append(block)
    return Layout("made", 4, tuple(f"layer.{i}" for i in range(len(heads))), tuple(blocks))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Equal costs of heads and of neurons, or tables of any shape; ties and zeros in importance."""
    sizes = st.lists(st.integers(0, 3), min_size=2, max_size=2)
    layout = made_layout(draw(sizes), draw(sizes))
    assume(layout.blocks)
    values = st.sampled_from([0.0, 0.1, 1, 2, 2.5, 7]) | st.floats(0, 10)
    importance = [
        torch.tensor(draw(st.lists(values, min_size=block.num_units, max_size=block.num_units)))
        for block in layout.blocks
    ]
    if draw(st.booleans()):
        head_cost = draw(st.sampled_from([1.0, 3.0, 0.3]) | st.floats(0.1, 10))
        neuron_cost = draw(st.sampled_from([1.0, 0.1]) | st.floats(0.1, 10))
        unit_costs = [{"head": head_cost, "neuron": neuron_cost}[b.kind] for b in layout.blocks]
        constant = draw(st.floats(0, 100))
        costs = linear_costs("params", unit_costs, [b.num_units for b in layout.blocks], constant)
        return layout, importance, costs, draw(st.floats(0, 1.2)) * (costs.original - constant)
    tables = []
    for block in layout.blocks:
        units = block.num_units
        shape = draw(st.sampled_from(["linear", "stepped", "flat", "noisy", "off the grid"]))
        unit, kept = draw(st.integers(1, 5)), np.arange(units + 1)
        noise = draw(st.lists(st.integers(-1, 3), min_size=units, max_size=units))
        tables.append(
            {
                "linear": unit * kept,
                "stepped": unit * 2 * ((kept + 1) // 2),
                "flat": unit * np.minimum(kept, 1),
                "noisy": unit * kept + np.array([0, *noise]),
                "off the grid": np.where((kept % 2 == 0) | (kept == units), unit * kept, np.inf),
            }[shape].astype(np.float64)
        )
        tables[-1][0] = draw(st.sampled_from([0.0, 1.0]))  # an empty block may have a cost
    costs = CostModel("latency", tuple(tables), draw(st.sampled_from([0.0, 10.0])))
    budget = draw(st.integers(0, int(costs.original - costs.constant)))
    return layout, importance, costs, float(budget)


def all_masks(layout: Layout) -> Iterator[tuple[tuple[int, ...], ...]]:
    return itertools.product(
        *(itertools.product((0, 1), repeat=block.num_units) for block in layout.blocks)
    )


def value_of(importance: list[Tensor], masks: Any) -> float:
    return sum(
        float((values.double() * torch.as_tensor(mask)).sum())
        for values, mask in zip(importance, masks, strict=True)
    )


def test_the_smallest_constraint_is_named_and_can_be_met() -> None:
    layout = made_layout([1], [1])
    importance = [torch.ones(1), torch.ones(1)]
    costs = linear_costs("mac", [3.0, 7.0], [1, 1], constant=90.0)
    with pytest.raises(UserError, match="less than one head or neuron costs") as raised:
        search(layout, importance, costs, costs.budget(Constraint("mac", 0.92)))
    named = re.search(r"at least ([\d.]+)", str(raised.value))
    assert named
    assert float(named[1]) == pytest.approx(0.93)
    budget = costs.budget(Constraint("mac", float(named[1])))
    assert num_kept(search(layout, importance, costs, budget)) == (1, 0)
    unequal = linear_costs("params", [2.0, 1.0], [1, 2])
    with pytest.raises(UserError, match=r"at least 0\.25$"):
        search(made_layout([1, 2], []), [torch.ones(1), torch.ones(2)], unequal, 0.9)


@given(problems())
def test_the_search_is_as_good_as_brute_force_and_within_the_budget(problem: Problem) -> None:
    layout, importance, costs, budget = problem
    allowed = (budget + costs.constant) * (1 + 1e-9)
    affordable = [
        masks
        for masks in all_masks(layout)
        if any(map(any, masks)) and costs.total([sum(mask) for mask in masks]) <= allowed
    ]
    best = max((value_of(importance, masks) for masks in affordable), default=0.0)
    try:
        masks = search(layout, importance, costs, budget)
    except UserError:
        assert not affordable or best == pytest.approx(0.0, abs=1e-9)
        return
    assert costs.total(num_kept(masks)) <= allowed
    assert [len(mask) for mask in masks] == [block.num_units for block in layout.blocks]
    assert all(set(mask.tolist()) <= {0.0, 1.0} for mask in masks)
    assert value_of(importance, masks) >= best - 1e-6 * max(1.0, best)


def test_unequal_unit_costs_are_left_to_the_allocation() -> None:
    """The published search also keeps units without importance, the allocation does not."""
    layout = made_layout([2, 2], [])
    importance = [torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0])]
    equal = linear_costs("mac", [2.0, 2.0], [2, 2])
    unequal = linear_costs("params", [2.0, 1.0], [2, 2])
    assert num_kept(search(layout, importance, equal, 8.0)) == (2, 2)
    assert num_kept(search(layout, importance, unequal, 6.0)) == (0, 1)
    free = linear_costs("params", [2.0, 0.0], [2, 2])
    assert num_kept(search(layout, importance, free, 0.0)) == (0, 1)


def test_errors_are_the_importance_of_the_pruned_units() -> None:
    values = torch.tensor([1.0, 9, 2, 9])
    assert additive_errors([values])[0].tolist() == [21, 12, 3, 1, 0]
    assert keep_most_important([values], [1])[0].tolist() == [0, 1, 0, 0]
    for kept, error in enumerate(additive_errors([values])[0]):
        mask = keep_most_important([values], [kept])[0]
        assert float(values[mask == 0].sum()) == error
