"""Solves from moments against solvers that have the data.

Without these tests a fit could lack its intercept, have a ridge of the wrong size, or fit nothing.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rfprune.stages import least_squares
from rfprune.stages.least_squares import (
    Moments,
    NumericalFailure,
    StoredMoments,
    fit_with_validation,
    solve_scales,
    solve_weights,
)
from rfprune.stages.tensor_store import TensorStore


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(features: Tensor, targets: Tensor) -> Moments:
    moments = Moments.zeros(features.shape[1], targets.shape[1])
    moments.add(features, targets)
    return moments


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_moments_add_up_over_batches_in_float64(dtype: torch.dtype) -> None:
    features, targets = draw(30, 6).to(dtype), draw(30, 4, seed=1).to(dtype)
    whole = moments_of(features, targets)
    moments = Moments.zeros(6, 4)
    for rows in (slice(0, 7), slice(7, 7), slice(7, 30)):
        moments += moments_of(features[rows], targets[rows])
    assert moments.count == whole.count == 30
    assert moments.target_energy == pytest.approx(whole.target_energy)
    x, y = features.double(), targets.double()
    expected = {"gram": x.T @ x, "cross": x.T @ y, "feature_sum": x.sum(0), "target_sum": y.sum(0)}
    for name, value in expected.items():
        torch.testing.assert_close(getattr(moments, name), value, rtol=1e-4, atol=1e-4)


@given(st.integers(1, 40), st.integers(0, 7), st.integers(1, 5), st.integers(0, 10**6))
def test_the_error_of_moments_is_that_of_the_data(tokens: int, p: int, d: int, seed: int) -> None:
    features, targets = draw(tokens, p, seed=seed), draw(tokens, d, seed=seed + 1)
    weight, bias = draw(d, p, seed=seed + 2), draw(d, seed=seed + 3)
    brute = float((targets - features @ weight.T - bias).square().sum())
    assert moments_of(features, targets).error(weight, bias) == pytest.approx(brute, abs=1e-9)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_weights_are_those_of_lstsq_with_a_relative_ridge_that_spares_the_intercept(
    ridge: float,
) -> None:
    features, targets = draw(60, 6) + 1, draw(60, 4, seed=1) + 2
    weight, bias = solve_weights(moments_of(features, targets), ridge)
    x, y = features - features.mean(0), targets - targets.mean(0)
    penalty = (ridge * x.square().sum() / 6).sqrt() * torch.eye(6, dtype=torch.float64)
    stacked = torch.cat([x, penalty])
    expected = torch.linalg.lstsq(stacked, torch.cat([y, torch.zeros(6, 4, dtype=y.dtype)]))
    torch.testing.assert_close(weight, expected.solution.T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias, targets.mean(0) - weight @ features.mean(0))
    free, _ = solve_weights(moments_of(features, targets), 0.0)
    assert (weight.norm() < 0.9 * free.norm()) == (ridge > 0)


def test_a_strong_ridge_gives_the_prior() -> None:
    features, targets, prior = draw(60, 6) + 1, draw(60, 4, seed=1), draw(4, 6, seed=2)
    moments = moments_of(features, targets)
    free, _ = solve_weights(moments, 0.0)
    for ridge, nearest in ((1e9, prior), (1e-9, free)):
        weight, bias = solve_weights(moments, ridge, prior)
        torch.testing.assert_close(weight, nearest, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(bias, targets.mean(0) - weight @ features.mean(0))


@pytest.mark.parametrize("features", [torch.full((10, 3), 2.0), torch.zeros(10, 0)])
def test_constant_or_no_features_leave_the_mean_to_the_intercept(features: Tensor) -> None:
    targets = draw(10, 4)
    weight, bias = solve_weights(moments_of(features.double(), targets), ridge=1e-2)
    assert weight.abs().sum() < 1e-5
    assert weight.shape == (4, features.shape[1])
    assert bias is not None
    torch.testing.assert_close(weight.sum(1) * 2 + bias, targets.mean(0))


def test_failures_are_named() -> None:
    with pytest.raises(NumericalFailure, match="no tokens"):
        solve_weights(Moments.zeros(3, 2), 1e-2)
    broken = moments_of(torch.full((4, 3), torch.nan), torch.ones(4, 2))
    with pytest.raises(NumericalFailure, match="singular or not finite"):
        solve_weights(broken, 1e-2)
    with pytest.raises(NumericalFailure, match="singular or not finite"):
        solve_scales(broken, torch.ones(2, 3), torch.zeros(2), 1, 1.0, 10.0)


def unit_outputs(features: Tensor, weight: Tensor, unit_width: int) -> Tensor:
    """Output of every unit, (tokens * d, U)."""
    units = features.shape[1] // unit_width
    parts = [
        features[:, u * unit_width : (u + 1) * unit_width]
        @ weight[:, u * unit_width : (u + 1) * unit_width].T
        for u in range(units)
    ]
    return torch.stack([part.flatten() for part in parts], dim=1)


@pytest.mark.parametrize("unit_width", [1, 3])
@pytest.mark.parametrize("damping", [1.0, 30.0])
def test_scales_are_the_damped_least_squares_on_the_normal_equations(
    unit_width: int, damping: float
) -> None:
    """The solution of the authors' LSMR, here by a dense solver on the outputs of the units."""
    features, weight, bias = draw(20, 6), draw(4, 6, seed=1), draw(4, seed=2)
    targets = draw(20, 4, seed=3)
    moments = moments_of(features, targets)
    scales = solve_scales(moments, weight, bias, unit_width, damping, limit=100.0)
    outputs = unit_outputs(features, weight, unit_width)
    gram = outputs.T @ outputs
    residual = outputs.T @ ((targets - bias).flatten() - outputs.sum(1))
    units = len(gram)
    stacked = torch.cat([gram, damping * torch.eye(units, dtype=gram.dtype)])
    wanted = torch.cat([residual, torch.zeros(units, dtype=gram.dtype)])
    expected = 1 + torch.linalg.lstsq(stacked, wanted[:, None]).solution[:, 0]
    torch.testing.assert_close(scales, expected)
    assert (scales - 1).abs().max() > 1e-3


@pytest.mark.parametrize("factor", [50.0, -50.0])
def test_scales_beyond_the_limit_are_a_failure(factor: float) -> None:
    features, weight = draw(200, 3), draw(4, 3, seed=1)
    moments = moments_of(features, factor * features @ weight.T)
    with pytest.raises(NumericalFailure, match=r"a scale of 5\d.* is beyond ±10|a scale of 4\d"):
        solve_scales(moments, weight, torch.zeros(4), 1, damping=1e-3, limit=10.0)
    assert solve_scales(moments, weight, torch.zeros(4), 1, 1e-3, limit=100.0).abs().min() > 40


def data(tokens: int, p: int, d: int, seed: int, noise: float) -> tuple[Tensor, Tensor, Moments]:
    """A planted linear map with noise: its weight, its bias and moments of fresh tokens."""
    torch.manual_seed(0)
    weight, bias = torch.randn(d, p, dtype=torch.float64), torch.randn(d, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(tokens, p, generator=generator)
    targets = features @ weight.T.float() + bias.float()
    targets = targets + noise * torch.randn(tokens, d, generator=generator)
    moments = Moments.zeros(p, d)
    moments.add(features, targets)
    return weight, bias, moments


@pytest.mark.parametrize("noise", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("distance", [0.0, 0.1, 1.0])
def test_an_accepted_fit_never_raises_the_held_out_error(noise: float, distance: float) -> None:
    weight, bias, train = data(40, 12, 5, 1, noise)
    held_out = data(30, 12, 5, 2, noise)[2]
    old = weight + distance * torch.randn_like(weight), bias
    new = fit_with_validation(train, held_out, (1e-3, 1e-1, 10.0), *old)
    accepted = not torch.equal(new[0], old[0])
    assert held_out.error(*new) <= held_out.error(*old)
    if distance == 1.0 and noise < 1:
        assert accepted
        assert held_out.error(*new) < 0.1 * held_out.error(*old)
    if distance == 0.0 and noise == 30.0:
        assert not accepted, "the true weights can only be fitted to noise"


def test_constant_features_far_from_zero_do_not_stop_a_fit() -> None:
    """Sums of their float32 products may have eigenvalues below zero once they are centred."""
    features = torch.linspace(1, 9, 300).repeat(640, 1)
    features[:, :100] = 5 + 0.001 * draw(640, 100).float()
    moments = moments_of(features, draw(640, 4, seed=1).float())
    centred = moments.centred()[0]
    assert torch.linalg.eigvalsh(centred).min() < -1e-10 * centred.diagonal().mean()
    weight, bias = solve_weights(moments, 0.0)
    assert bias is not None
    assert torch.isfinite(weight).all()
    assert moments.error(weight, bias) <= moments.error(torch.zeros_like(weight), bias * 0) + 1e-6


def test_held_out_tokens_choose_the_ridge() -> None:
    weight, bias, train = data(14, 12, 5, 1, 3.0)  # few tokens: a weak ridge fits the noise
    held_out = data(200, 12, 5, 2, 1.0)[2]
    old = 0.0 * weight, bias
    both = train + held_out
    new = fit_with_validation(train, held_out, (1e-8, 1.0), *old)
    torch.testing.assert_close(new, solve_weights(both, 1.0, prior=old[0]))
    first = fit_with_validation(train, Moments.zeros(12, 5), (1e-8, 1.0), *old)
    torch.testing.assert_close(first, solve_weights(train, 1e-8, prior=old[0]))
    assert not torch.allclose(first[0], new[0], atol=0.1)


@pytest.mark.parametrize("intercept", [True, False])
def test_stored_moments_give_the_same_fit(intercept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_squares, "ROWS", 5)  # 12 features: three blocks of rows
    weight, bias, train = data(60, 12, 5, 1, 0.1)
    held_out = data(30, 12, 5, 2, 0.1)[2]
    before = torch.zeros_like(weight), bias if intercept else None
    ridges = (1e-3, 1e-1)
    expected = fit_with_validation(train, held_out, ridges, *before)
    with TensorStore(max_bytes_in_memory=0) as store:
        stored = StoredMoments(train, store), StoredMoments(held_out, store)
        assert not train.gram.numel(), "they are in one place only"
        found = fit_with_validation(*stored, ridges, *before, overwrite=True)
    assert not torch.equal(expected[0], before[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_fit_without_an_intercept_is_that_of_lstsq() -> None:
    features, targets = draw(60, 5) + 1.0, draw(60, 3, seed=1) + 2.0
    moments = moments_of(features, targets)
    weight, bias = solve_weights(moments, 0.0, intercept=False)
    assert bias is None
    expected = torch.linalg.lstsq(features, targets).solution.T
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-6)
    residual = (targets - features @ weight.T).square().sum()
    assert moments.error(weight, None) == pytest.approx(float(residual), rel=1e-6)
    free, intercept = solve_weights(moments, 0.0)
    assert moments.error(free, intercept) < 0.9 * moments.error(weight, None)


def test_validation_of_a_fit_without_an_intercept() -> None:
    features, planted = draw(400, 4) + 1.0, draw(3, 4, seed=1)
    targets = features @ planted.T
    train = moments_of(features[:300], targets[:300])
    held_out = moments_of(features[300:], targets[300:])
    weight, bias = fit_with_validation(train, held_out, (1e-6,), torch.zeros(3, 4), None)
    assert bias is None
    torch.testing.assert_close(weight, planted, rtol=1e-4, atol=1e-4)
    kept, _ = fit_with_validation(train, held_out, (1e3,), planted, None)
    assert torch.equal(kept, planted)
    empty, bias = solve_weights(moments_of(draw(10, 0), targets[:10]), 1e-2, intercept=False)
    assert empty.shape == (3, 0)
    assert bias is None


def test_no_bias_is_a_bias_of_zero() -> None:
    features, weight = draw(50, 6), draw(4, 6, seed=1)
    moments = moments_of(features, 1.3 * features @ weight.T)
    with_zero = solve_scales(moments, weight, torch.zeros(4), 2, 1.0, 10.0)
    assert torch.equal(solve_scales(moments, weight, None, 2, 1.0, 10.0), with_zero)
    assert (with_zero - 1).abs().max() > 0.1
