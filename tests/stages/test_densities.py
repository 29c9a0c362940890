"""Densities of maps by error curves: the budget is met exactly, and the error is the least.

Without these tests `--sparsity-scope global` could miss its density or waste it.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfprune.stages.densities import STEPS, allocate_weights, error_curve
from tests.stages.test_sparsify import moments_of, random_map


@settings(max_examples=60)
@given(
    curves=st.lists(st.lists(st.floats(0, 100), min_size=5, max_size=5), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 200), min_size=4, max_size=4),
    fraction=st.floats(0, 1),
)
def test_the_budget_is_met_to_the_weight(
    curves: list[list[float]], sizes: list[int], fraction: float
) -> None:
    sizes = sizes[: len(curves)]
    budget = round(fraction * sum(sizes))
    errors = [np.array([*sorted(curve, reverse=True)[:-1], 0.0]) for curve in curves]
    kept = allocate_weights(errors, sizes, budget)
    assert sum(kept) == budget
    assert all(0 <= n <= size for n, size in zip(kept, sizes, strict=True))


def test_the_error_is_the_least_over_all_grid_points() -> None:
    generator = np.random.default_rng(0)
    curves = [np.sort(generator.random(5) ** 3).cumsum()[::-1] for _ in range(3)]
    curves = [curve - curve[-1] for curve in curves]  # convex, as falling gains make them
    sizes = [40, 40, 40]
    kept = allocate_weights(curves, sizes, budget=60)
    grid = np.linspace(0, 40, 5)

    def error(numbers: tuple[float, ...]) -> float:
        return sum(
            float(np.interp(n, grid, curve)) for n, curve in zip(numbers, curves, strict=True)
        )

    best = min(error(one) for one in product(grid, repeat=3) if sum(one) == 60)
    assert error(kept) == pytest.approx(best)
    assert len(set(kept)) > 1, "the curves differ"


def test_an_error_curve_falls_to_zero() -> None:
    weight, bias, x = random_map(6, 20)
    curve = error_curve(weight, bias, moments_of(x), "obs", torch.ones(6, dtype=torch.float64))
    assert len(curve) == STEPS + 1
    assert curve[-1] == 0
    assert (np.diff(curve) < 0).all()
