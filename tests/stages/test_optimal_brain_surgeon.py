"""Greedy removal against the closed form for every subset, and on planted redundancies.

Without these tests an error curve could differ from the error of the units that were removed.
"""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from rfprune.stages.least_squares import NumericalFailure
from rfprune.stages.optimal_brain_surgeon import ErrorCurve, removal_curve


def random_block(features: int, outputs: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A (p, p), W (d, p), G (d, d) of a random block with correlated inputs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing = torch.eye(features, dtype=torch.float64) + 0.3 * normal(features, features)
    x, g = normal(4 * features, features) @ mixing, normal(20, outputs)
    inputs = x.T @ x / len(x)
    inputs.diagonal().add_(1e-3 * inputs.diagonal().mean())
    return inputs, normal(outputs, features), g.T @ g / len(g)


def cost_of_removing(block: tuple[Tensor, Tensor, Tensor], columns: list[int]) -> float:
    """The least tr((W - W')·A·(W - W')ᵀ·G) over all W' that are zero in `columns`."""
    inputs, weight, gradients = block
    kept = [column for column in range(len(inputs)) if column not in columns]
    # The best W' is the same for every G: W projected onto the kept columns in the metric of A.
    compensated = torch.zeros_like(weight)
    if kept:
        part = inputs[kept][:, kept]
        compensated[:, kept] = torch.linalg.solve(part, inputs[kept] @ weight.T).T
    difference = weight - compensated
    return float(torch.trace(difference @ inputs @ difference.T @ gradients))


def features_of(units: list[int], width: int) -> list[int]:
    return [unit * width + i for unit in units for i in range(width)]


@pytest.mark.parametrize(("units", "width"), [(8, 1), (4, 3)])
def test_every_point_of_a_curve_is_the_exact_cost_of_the_removed_units(
    units: int, width: int
) -> None:
    block = random_block(units * width)
    curve = removal_curve(*block, width)
    assert sorted(curve.order.tolist()) == list(range(units))
    for removed in range(units + 1):
        columns = features_of(curve.order[:removed].tolist(), width)
        expected = cost_of_removing(block, columns)
        assert float(curve.errors[units - removed]) == pytest.approx(expected, rel=1e-8, abs=1e-10)
    assert float(curve.errors[units]) == 0.0
    assert float(curve.errors[0]) > 0.0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("units", "width"), [(8, 1), (4, 2)])
def test_greedy_is_near_the_best_of_all_subsets(units: int, width: int, seed: int) -> None:
    block = random_block(units * width, seed=seed)
    curve = removal_curve(*block, width)
    for removed in range(1, units + 1):
        best = min(
            cost_of_removing(block, features_of(list(subset), width))
            for subset in combinations(range(units), removed)
        )
        found = float(curve.errors[units - removed])
        assert found >= best * (1 - 1e-8)
        assert found <= 2 * best
    first = curve.order[:1].tolist()
    cheapest = min(cost_of_removing(block, features_of([unit], width)) for unit in range(units))
    assert cost_of_removing(block, features_of(first, width)) == pytest.approx(cheapest)


def test_a_group_holds_no_two_copies_of_a_neuron() -> None:
    """Each copy is cheap to remove, both together are expensive."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(500, 64, generator=generator, dtype=torch.float64)
    x = torch.cat([half, half], dim=1)  # feature i and feature 64 + i are the same
    inputs = x.T @ x / len(x)
    inputs.diagonal().add_(1e-6)
    weight = torch.randn(8, 128, generator=generator, dtype=torch.float64)
    curve = removal_curve(inputs, weight, torch.eye(8, dtype=torch.float64), 1)
    assert {int(unit) % 64 for unit in curve.order[:64]} == set(range(64))
    assert float(curve.errors[64]) < 1e-3 * float(curve.errors[63])


def test_a_dead_head_goes_first_at_no_cost() -> None:
    inputs, weight, gradients = random_block(12)
    weight[:, 3:6] = 0.0  # head 1, of width 3
    inputs[3:6], inputs[:, 3:6] = 0.0, 0.0
    inputs[3:6, 3:6] = torch.eye(3, dtype=torch.float64)
    curve = removal_curve(inputs, weight, gradients, 3)
    assert int(curve.order[0]) == 1
    assert float(curve.errors[3]) == pytest.approx(0.0, abs=1e-12)
    assert float(curve.errors[2]) > 1e-3


def test_groups_cost_little_more_than_one_neuron_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = random_block(160, outputs=24)
    grouped = removal_curve(*block, 1)
    monkeypatch.setattr("rfprune.stages.optimal_brain_surgeon.CHUNK", 0.0)
    single = removal_curve(*block, 1)
    assert grouped.order.tolist() != single.order.tolist()  # groups were removed
    assert (grouped.errors[8:-1] <= 1.2 * single.errors[8:-1]).all()


@pytest.mark.parametrize("width", [1, 4])
def test_the_order_of_units_does_not_matter(width: int) -> None:
    inputs, weight, gradients = random_block(16)
    units = torch.randperm(16 // width, generator=torch.Generator().manual_seed(3))
    columns = torch.tensor(features_of(units.tolist(), width))
    curve = removal_curve(inputs, weight, gradients, width)
    shuffled = removal_curve(inputs[columns][:, columns], weight[:, columns], gradients, width)
    assert units.tolist() != sorted(units.tolist())
    assert units[shuffled.order].tolist() == curve.order.tolist()
    torch.testing.assert_close(shuffled.errors, curve.errors)


def test_masks_keep_the_units_that_are_removed_last() -> None:
    curve = ErrorCurve(torch.tensor([2, 0, 3, 1]), torch.arange(5.0))
    masks = [curve.mask(kept).tolist() for kept in (4, 2, 0)]
    assert masks == [[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]]


def test_moments_that_are_not_positive_definite_are_a_numerical_failure() -> None:
    inputs, weight, gradients = random_block(6)
    with pytest.raises(NumericalFailure, match="positive definite"):
        removal_curve(-inputs, weight, gradients, 1)
