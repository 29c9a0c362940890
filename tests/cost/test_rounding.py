"""Numbers of neurons that are not multiples become infinite; all other costs stay.

Without these tests, neurons could be kept in numbers that are slow in hardware, heads could be
rounded away, and a pruned model could exceed its budget.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfprune.cost.constraint import Constraint, linear_costs
from rfprune.cost.memory import total_bytes
from rfprune.cost.params import total_params
from rfprune.cost.rounding import restrict_to_multiples
from rfprune.errors import UserError
from rfprune.pruning import prune
from rfprune.settings import MULTIPLES, Settings
from rfprune.stages.allocate import allocate
from rfprune.stages.uniform import same_fraction_counts
from tests.stages.test_search import made_layout

Tiny = Callable[..., Any]


def test_only_neurons_are_restricted_and_only_to_multiples() -> None:
    layout = made_layout([3], [20])
    costs = linear_costs("mac", [5.0, 1.0], [3, 20], constant=2.0)
    rounded = restrict_to_multiples(costs, layout, 8)
    assert rounded.tables[0].tolist() == [0, 5, 10, 15]
    finite = np.flatnonzero(np.isfinite(rounded.tables[1])).tolist()
    assert finite == [0, 8, 16, 20]
    assert rounded.tables[1][finite].tolist() == finite
    assert (rounded.metric, rounded.constant, rounded.original) == ("mac", 2.0, costs.original)
    assert np.isfinite(costs.tables[1]).all(), "the given costs do not change"
    assert restrict_to_multiples(costs, layout, None) is costs


@pytest.mark.parametrize(("metric", "size"), [("params", total_params), ("memory", total_bytes)])
@pytest.mark.parametrize("model_type", ["t5", "mt5"])
def test_a_pruned_t5_is_within_its_budget(
    model_type: str, metric: str, size: Callable[[Any], int], tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    shape = {"num_hidden_layers": 3, "relative_attention_num_buckets": 32}
    model = tiny_model(model_type, "seq2seq-lm", **shape)
    batch = tiny_batch()
    batches = [batch | {"decoder_input_ids": batch["input_ids"]}]
    settings = Settings(method="importance", importance="magnitude-l2", round_to=8, tune=False)
    result = prune(model, batches, Constraint(metric, 0.8), settings)
    assert 0.75 * size(model) < size(result.model) <= 0.8 * size(model)


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=3),
    st.sampled_from(MULTIPLES),
    st.floats(0.3, 1),
)
def test_an_allocation_keeps_multiples_within_the_budget(
    sizes: list[int], multiple: int, part: float
) -> None:
    layout = made_layout([1] * len(sizes), sizes)
    units = [block.num_units for block in layout.blocks]
    costs = linear_costs("mac", [20.0, 1.0] * len(sizes), units)
    budget = part * costs.original
    errors = [np.linspace(1.0, 0.0, n + 1) for n in units]
    rounded = restrict_to_multiples(costs, layout, multiple)
    try:
        kept = allocate(errors, rounded, budget)
    except UserError:
        assert budget < min(float(table[1:].min()) for table in rounded.tables)
        return
    assert costs.total(kept) <= budget * (1 + 1e-9)
    for block, n in zip(layout.blocks, kept, strict=True):
        assert block.kind == "head" or n % multiple == 0 or n == block.num_units


@pytest.mark.parametrize("multiple", MULTIPLES)
def test_the_same_fraction_of_every_block_keeps_multiples_too(multiple: int) -> None:
    sizes = [16, 256] * 2
    layout = made_layout([16, 16], [256, 256])
    costs = linear_costs("mac", [1.0, 1.0] * 2, sizes)
    budget = 0.61 * costs.original
    free = same_fraction_counts(sizes, costs, budget)
    kept = same_fraction_counts(sizes, restrict_to_multiples(costs, layout, multiple), budget)
    assert free[1] % 8, "the restriction must matter"
    assert kept[1] % multiple == 0
    assert kept[1] > 0
