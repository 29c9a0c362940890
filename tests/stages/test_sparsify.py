"""Zeros of one linear map: against every possible choice, and what holds for any inputs.

Without these tests a pattern could be violated, a density missed, or the adjustment of the kept
weights make a map worse than masking alone.
"""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rfprune.settings import SPARSITY_CRITERIA
from rfprune.stages.least_squares import Moments, NumericalFailure
from rfprune.stages.sparsify import Pattern, keep_largest, mean_square_change, sparsify


def random_map(
    outputs: int, inputs: int, *, seed: int = 0, tokens: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """A weight (d, p), a bias (d,) and correlated inputs (tokens, p) whose mean is not zero."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(inputs) + 0.5 * torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(tokens, inputs, generator=generator) @ mixing + 1.0
    weight = torch.randn(outputs, inputs, generator=generator)
    return weight, torch.randn(outputs, generator=generator), x


def moments_of(x: Tensor) -> Moments:
    moments = Moments.zeros(x.shape[1], 0)
    moments.add(x, x[:, :0])
    return moments


def measured_errors(
    before: tuple[Tensor, Tensor | None], after: tuple[Tensor, Tensor | None], x: Tensor
) -> Tensor:
    """(d,): the mean square change of the outputs."""
    outputs = [
        x.double() @ weight.double().T + (0 if bias is None else bias.double())
        for weight, bias in (before, after)
    ]
    return (outputs[0] - outputs[1]).square().mean(0)


@settings(max_examples=40)
@given(
    outputs=st.integers(1, 9),
    inputs=st.integers(1, 21),
    pattern=st.sampled_from(["0.1", "0.5", "0.83", "1:2", "2:4", "4:8", "3:5"]),
    criterion=st.sampled_from(SPARSITY_CRITERIA),
    has_bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    tokens=st.sampled_from([1, 5, 64]),
    seed=st.integers(0, 99),
)
def test_every_map_keeps_its_pattern_and_says_its_error(
    outputs: int,
    inputs: int,
    pattern: str,
    criterion: str,
    has_bias: bool,
    dtype: torch.dtype,
    tokens: int,
    seed: int,
) -> None:
    weight, bias, x = random_map(outputs, inputs, seed=seed, tokens=tokens)
    weight, kept_bias = weight.to(dtype), bias.to(dtype) if has_bias else None
    wanted = Pattern.of(pattern)
    sparse = sparsify(weight, kept_bias, moments_of(x), wanted, criterion)
    assert sparse.weight.dtype == dtype
    nonzeros = int(sparse.weight.count_nonzero())
    assert nonzeros <= wanted.num_kept(outputs, inputs)
    if wanted.group is None:
        assert abs(nonzeros - wanted.density * outputs * inputs) <= 1
    else:
        kept, size = wanted.group
        for group in sparse.weight.split(size, dim=1):
            assert int(group.count_nonzero(dim=1).max()) <= kept
    assert (sparse.bias is None) == (not has_bias)
    found = measured_errors((weight, kept_bias), (sparse.weight, sparse.bias), x)
    masked = torch.where(sparse.weight == 0, 0, weight)
    alone = measured_errors((weight, kept_bias), (masked, kept_bias), x)
    if dtype == torch.float32:
        assert torch.allclose(
            sparse.errors, found, rtol=1e-3, atol=1e-4 * float(alone.sum()) + 1e-9
        )
    assert float(sparse.errors.sum()) <= float(alone.sum()) * (1 + 1e-4) + 1e-9


def least_error(weight: Tensor, x: Tensor, kept: list[int]) -> float:
    """The error of one row (p,) whose weights outside of `kept` are zero, adjusted optimally."""
    target = x.double() @ weight.double()
    features = x[:, kept].double()
    fit = torch.linalg.lstsq(features, target[:, None]).solution
    return float((target - (features @ fit)[:, 0]).square().mean())


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_eight_weights_against_every_choice(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adjustment is the best for its zeros; the choice is close to the best of all."""
    monkeypatch.setattr("rfprune.stages.sparsify.DAMPING", 1e-6)
    excess, magnitude_excess = [], []
    for seed in range(20):
        weight, _, x = random_map(1, 8, seed=seed)
        sets = [list(kept) for kept in combinations(range(8), 4)]
        if pattern == "2:4":
            sets = [kept for kept in sets if sum(place < 4 for place in kept) == 2]
        best = min(least_error(weight[0], x, kept) for kept in sets)
        sparse = sparsify(weight, None, moments_of(x), Pattern.of(pattern), "obs")
        kept = sparse.weight[0].nonzero().flatten().tolist()
        own = least_error(weight[0], x, kept)
        assert float(sparse.errors) == pytest.approx(own, rel=1e-2)
        excess.append(float(sparse.errors) / best)
        masked = sparsify(weight, None, moments_of(x), Pattern.of(pattern), "magnitude")
        magnitude_excess.append(float(masked.errors) / best)
    assert sorted(excess)[10] < 2
    assert sorted(magnitude_excess)[10] > 3


def test_wanda_and_magnitude_choose_as_published() -> None:
    weight = torch.tensor([[3.0, -2.0, 1.0, 0.5], [1.0, 4.0, 2.0, -9.0]])
    x = torch.diag(torch.tensor([1.0, 1.0, 10.0, 1.0]))
    by_magnitude = sparsify(weight, None, moments_of(x), Pattern.of("0.5"), "magnitude").weight
    assert by_magnitude.tolist() == [[3, 0, 0, 0], [0, 4, 2, -9]], "over the whole map"
    by_wanda = sparsify(weight, None, moments_of(x), Pattern.of("0.5"), "wanda").weight
    assert by_wanda.tolist() == [[3, 0, 1, 0], [0, 0, 2, -9]], "in every row"


def test_dead_inputs_lose_their_weights_first() -> None:
    weight, _, x = random_map(4, 8)
    x[:, ::2] = 0
    sparse = sparsify(weight, None, moments_of(x), Pattern.of("0.5"), "obs")
    assert float(sparse.errors.sum()) < 1e-6 * float(
        mean_square_change(weight, None, moments_of(x)).sum()
    )


@pytest.mark.parametrize("varying", [0, 100])
def test_constant_inputs_far_from_zero_do_not_stop_a_sweep(varying: int) -> None:
    """Sums of their float32 products may have eigenvalues below zero once they are centred."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(1, 9, 300).repeat(640, 1)
    x[:, :varying] = 5 + 0.001 * torch.randn(640, varying, generator=generator)
    inputs = moments_of(x)
    centred = inputs.centred()[0]
    assert torch.linalg.eigvalsh(centred).min() < -1e-7 * inputs.gram.trace()
    weight = torch.randn(8, 300, generator=generator)
    sparse = sparsify(weight, torch.zeros(8), inputs, Pattern.of("0.75"), "obs")
    assert int(sparse.weight.count_nonzero()) == 600
    assert sparse.bias is not None
    torch.testing.assert_close(x @ sparse.weight.T + sparse.bias, x @ weight.T, rtol=0, atol=0.3)


def test_several_blocks_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks share a density to within one weight, and one block is no better than several."""
    weight, _, x = random_map(7, 50, tokens=400)
    whole = sparsify(weight, None, moments_of(x), Pattern.of("0.7"), "obs")
    monkeypatch.setattr("rfprune.stages.sparsify.BLOCK_COLUMNS", 9)
    blocked = sparsify(weight, None, moments_of(x), Pattern.of("0.7"), "obs")
    assert int(blocked.weight.count_nonzero()) == int(whole.weight.count_nonzero()) == 105
    assert not torch.equal(blocked.weight, whole.weight)
    assert float(blocked.errors.sum()) < 2 * float(whole.errors.sum())


def test_shorter_groups_at_the_end_of_a_row() -> None:
    mask = keep_largest(torch.ones(3, 10), Pattern.of("2:4"))
    assert mask[:, 8:].all()
    assert mask.sum() == Pattern.of("2:4").num_kept(3, 10) == 18


@pytest.mark.parametrize("x", [torch.zeros(0, 4), torch.full((3, 4), float("nan"))])
def test_inputs_that_say_nothing_are_a_failure(x: Tensor) -> None:
    with pytest.raises(NumericalFailure):
        sparsify(torch.ones(2, 4), None, moments_of(x), Pattern.of("2:4"), "obs")
