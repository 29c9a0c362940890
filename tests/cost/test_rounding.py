"""Multiples: exactly the sizes off the grid are infinite, and nothing else changes.

Deleting this lets neurons come in numbers that hardware does not like, or heads be rounded away.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfprune.cost.constraint import linear_costs
from rfprune.cost.rounding import on_grid
from rfprune.errors import UserError
from rfprune.settings import MULTIPLES
from rfprune.stages.allocate import allocate
from rfprune.stages.uniform import same_fraction_counts
from tests.stages.test_search import made_layout


def test_off_the_grid_is_infinite_for_neurons_alone() -> None:
    layout = made_layout([3], [20])
    costs = linear_costs("mac", [5.0, 1.0], [3, 20], constant=2.0)
    rounded = on_grid(costs, layout, 8)
    assert rounded.tables[0].tolist() == [0, 5, 10, 15]
    finite = np.flatnonzero(np.isfinite(rounded.tables[1])).tolist()
    assert finite == [0, 8, 16, 20]
    assert rounded.tables[1][finite].tolist() == finite
    assert (rounded.metric, rounded.constant, rounded.original) == ("mac", 2.0, costs.original)
    assert np.isfinite(costs.tables[1]).all(), "the costs that were given stay as they are"


def test_without_a_multiple_nothing_changes() -> None:
    layout = made_layout([3], [20])
    costs = linear_costs("mac", [5.0, 1.0], [3, 20])
    assert on_grid(costs, layout, None) is costs


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=3),
    st.sampled_from(MULTIPLES),
    st.floats(0.3, 1),
)
def test_what_is_allocated_is_on_the_grid_and_within_the_budget(
    sizes: list[int], multiple: int, part: float
) -> None:
    layout = made_layout([1] * len(sizes), sizes)
    units = [block.num_units for block in layout.blocks]
    costs = linear_costs("mac", [20.0, 1.0] * len(sizes), units)
    budget = part * costs.original
    errors = [np.linspace(1.0, 0.0, n + 1) for n in units]
    rounded = on_grid(costs, layout, multiple)
    try:
        kept = allocate(errors, rounded, budget)
    except UserError:
        assert budget < min(float(table[1:].min()) for table in rounded.tables)
        return
    assert costs.total(kept) <= budget * (1 + 1e-9)
    for block, n in zip(layout.blocks, kept, strict=True):
        assert block.kind == "head" or n % multiple == 0 or n == block.num_units


@pytest.mark.parametrize("multiple", MULTIPLES)
def test_the_same_fraction_everywhere_keeps_to_the_grid_too(multiple: int) -> None:
    sizes = [16, 256] * 2
    layout = made_layout([16, 16], [256, 256])
    costs = linear_costs("mac", [1.0, 1.0] * 2, sizes)
    free = same_fraction_counts(sizes, costs, 0.61 * costs.original)
    kept = same_fraction_counts(sizes, on_grid(costs, layout, multiple), 0.61 * costs.original)
    assert free[1] % 8, "without a grid it would be off it"
    assert kept[1] % multiple == 0
    assert kept[1] > 0
