"""Greedy removal against the closed form for every subset, and on planted redundancies.

Without these tests an error curve could differ from the error of the units that were removed.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import pytest
import torch
from torch import Tensor

from rfprune.stages.least_squares import NumericalFailure
from rfprune.stages.optimal_brain_surgeon import removal_curve


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


@pytest.fixture(params=["float32", "float64"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """The relative error of a curve, in float32 or after the fall-back to float64."""
    if request.param == "float64":
        monkeypatch.setattr("rfprune.stages.optimal_brain_surgeon.MAX_ROUNDING", -1.0)
    return {"float32": 1e-4, "float64": 1e-8}[request.param]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("units", "width"), [(8, 1), (4, 2), (4, 3)])
def test_a_curve_is_the_exact_cost_of_the_removed_units_and_near_the_best_of_all_subsets(
    units: int, width: int, seed: int, precision: float
) -> None:
    block = random_block(units * width, seed=seed)
    curve = removal_curve(*block, width)
    assert sorted(curve.order.tolist()) == list(range(units))

    def cost(removed: Iterable[int]) -> float:
        return cost_of_removing(block, features_of(list(removed), width))

    for removed in range(units + 1):
        found = float(curve.errors[units - removed])
        exact = cost(curve.order[:removed].tolist())
        assert found == pytest.approx(exact, rel=precision, abs=1e-10)
        best = min(cost(subset) for subset in combinations(range(units), removed))
        assert found <= 2 * best
        assert removed != 1 or found == pytest.approx(best, rel=precision)
    assert float(curve.errors[units]) == 0.0 < float(curve.errors[0])


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
def test_the_order_of_units_does_not_matter(width: int, precision: float) -> None:
    inputs, weight, gradients = random_block(16)
    units = torch.randperm(16 // width, generator=torch.Generator().manual_seed(3))
    columns = torch.tensor(features_of(units.tolist(), width))
    curve = removal_curve(inputs, weight, gradients, width)
    shuffled = removal_curve(inputs[columns][:, columns], weight[:, columns], gradients, width)
    assert units.tolist() != sorted(units.tolist())
    assert units[shuffled.order].tolist() == curve.order.tolist()
    torch.testing.assert_close(shuffled.errors, curve.errors, rtol=precision, atol=0)


def test_an_ill_conditioned_block_is_computed_in_float64() -> None:
    """In float32 its curve would be wrong by a tenth."""
    inputs, weight, gradients = random_block(32)
    inputs = inputs.repeat(2, 2)  # every neuron has a copy
    inputs.diagonal().add_(1e-7)
    block = inputs, torch.cat([weight, weight], 1), gradients
    curve = removal_curve(*block, 1)
    removed = curve.order[:32].tolist()
    assert {unit % 32 for unit in removed} == set(range(32))
    assert float(curve.errors[32]) == pytest.approx(cost_of_removing(block, removed), rel=1e-3)


def test_outputs_without_gradient_in_some_directions_cost_nothing_there() -> None:
    inputs, weight, _ = random_block(12)
    direction = torch.randn(5, 1, generator=torch.Generator().manual_seed(1)).double()
    curve = removal_curve(inputs, weight, direction @ direction.T, 1)
    one_output = removal_curve(inputs, direction.T @ weight, torch.ones(1, 1), 1)
    assert curve.order.tolist() == one_output.order.tolist()
    torch.testing.assert_close(curve.errors, one_output.errors, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("width", [1, 4])
def test_outputs_without_any_gradient_cost_nothing(width: int) -> None:
    inputs, weight, _ = random_block(16)
    curve = removal_curve(inputs, weight, torch.zeros(5, 5), width)
    assert sorted(curve.order.tolist()) == list(range(16 // width))
    assert not curve.errors.any()


def test_many_heads_are_removed_in_groups() -> None:
    block = random_block(96 * 2)
    curve = removal_curve(*block, 2)
    for removed in (1, 3, 40, 95):
        columns = features_of(curve.order[:removed].tolist(), 2)
        exact = cost_of_removing(block, columns)
        assert float(curve.errors[96 - removed]) == pytest.approx(exact, rel=1e-4)


def test_moments_that_are_not_positive_definite_are_a_numerical_failure() -> None:
    inputs, weight, gradients = random_block(6)
    with pytest.raises(NumericalFailure, match="positive definite"):
        removal_curve(-inputs, weight, gradients, 1)
