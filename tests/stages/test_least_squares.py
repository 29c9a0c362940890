"""Normal equations against solvers that see the data themselves.

Deleting this lets a fit be the answer to another question: an intercept forgotten, a ridge of the
wrong size, scales that fit nothing.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rfprune.stages.least_squares import (
    Moments,
    NumericalFailure,
    fit_with_validation,
    solve_scales,
    solve_weights,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(features: Tensor, targets: Tensor) -> Moments:
    moments = Moments.zeros(features.shape[1], targets.shape[1])
    moments.add(features, targets)
    return moments


def test_moments_add_up_over_batches() -> None:
    features, targets = draw(30, 6), draw(30, 4, seed=1)
    whole = moments_of(features, targets)
    parts = Moments.zeros(6, 4)
    for rows in (slice(0, 7), slice(7, 7), slice(7, 30)):
        parts.add(features[rows], targets[rows])
    assert parts.count == whole.count == 30
    for name in ("gram", "cross", "feature_sum", "target_sum"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
    assert parts.target_energy == pytest.approx(whole.target_energy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments_are_float64_whatever_comes_in(dtype: torch.dtype) -> None:
    features, targets = draw(50, 6).to(dtype), draw(50, 4, seed=1).to(dtype)
    moments = moments_of(features, targets)
    assert moments.gram.dtype == torch.float64
    expected = features.double().T @ features.double()
    torch.testing.assert_close(moments.gram, expected, rtol=1e-5, atol=1e-4)


@given(st.integers(1, 40), st.integers(0, 7), st.integers(1, 5), st.integers(0, 10**6))
def test_the_error_is_that_of_the_data(tokens: int, p: int, d: int, seed: int) -> None:
    features, targets = draw(tokens, p, seed=seed), draw(tokens, d, seed=seed + 1)
    weight, bias = draw(d, p, seed=seed + 2), draw(d, seed=seed + 3)
    brute = float((targets - features @ weight.T - bias).square().sum())
    assert moments_of(features, targets).error(weight, bias) == pytest.approx(brute, abs=1e-9)


def test_centred_moments_are_those_about_the_means() -> None:
    features, targets = draw(30, 6) + 5, draw(30, 4, seed=1) - 3
    gram, cross = moments_of(features, targets).centred()
    x, y = features - features.mean(0), targets - targets.mean(0)
    torch.testing.assert_close(gram, x.T @ x)
    torch.testing.assert_close(cross, x.T @ y)


def test_weights_are_those_of_lstsq_with_an_intercept() -> None:
    features, targets = draw(60, 6) + 1, draw(60, 4, seed=1) + 2
    weight, bias = solve_weights(moments_of(features, targets), ridge=0.0)
    with_ones = torch.cat([features, torch.ones(60, 1, dtype=torch.float64)], dim=1)
    expected = torch.linalg.lstsq(with_ones, targets).solution
    torch.testing.assert_close(weight, expected[:-1].T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias, expected[-1], rtol=1e-5, atol=1e-6)


def test_ridge_is_a_fraction_of_the_mean_diagonal_and_spares_the_intercept() -> None:
    features, targets, ridge = draw(60, 6) + 1, draw(60, 4, seed=1) + 2, 0.3
    weight, bias = solve_weights(moments_of(features, targets), ridge)
    x, y = features - features.mean(0), targets - targets.mean(0)
    penalty = (ridge * x.square().sum() / 6).sqrt() * torch.eye(6, dtype=torch.float64)
    stacked = torch.cat([x, penalty])
    expected = torch.linalg.lstsq(stacked, torch.cat([y, torch.zeros(6, 4, dtype=y.dtype)]))
    torch.testing.assert_close(weight, expected.solution.T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias, targets.mean(0) - weight @ features.mean(0))
    free, _ = solve_weights(moments_of(features, targets), 0.0)
    assert weight.norm() < 0.9 * free.norm()


def test_the_ridge_draws_to_the_prior() -> None:
    features, targets, prior = draw(60, 6) + 1, draw(60, 4, seed=1), draw(4, 6, seed=2)
    moments = moments_of(features, targets)
    free, _ = solve_weights(moments, 0.0)
    for ridge, nearest in ((1e9, prior), (1e-9, free)):
        weight, bias = solve_weights(moments, ridge, prior)
        torch.testing.assert_close(weight, nearest, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(bias, targets.mean(0) - weight @ features.mean(0))


def test_planted_weights_are_found() -> None:
    features, weight, bias = draw(40, 6), draw(4, 6, seed=1), draw(4, seed=2)
    found = solve_weights(moments_of(features, features @ weight.T + bias), ridge=1e-9)
    torch.testing.assert_close(found[0], weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], bias, rtol=1e-5, atol=1e-5)


def test_features_that_are_all_alike_leave_the_intercept() -> None:
    targets = draw(10, 4)
    weight, bias = solve_weights(moments_of(torch.full((10, 3), 2.0).double(), targets), ridge=1e-2)
    assert weight.abs().max() < 1e-6
    assert bias is not None
    torch.testing.assert_close(weight @ torch.full((3,), 2.0).double() + bias, targets.mean(0))


def test_without_features_the_mean_is_left() -> None:
    targets = draw(10, 4)
    weight, bias = solve_weights(moments_of(draw(10, 0), targets), ridge=1e-2)
    assert weight.shape == (4, 0)
    torch.testing.assert_close(bias, targets.mean(0))


def test_failures_are_named() -> None:
    with pytest.raises(NumericalFailure, match="no tokens"):
        solve_weights(Moments.zeros(3, 2), 1e-2)
    broken = moments_of(torch.full((4, 3), torch.nan), torch.ones(4, 2))
    with pytest.raises(NumericalFailure, match="singular or not finite"):
        solve_weights(broken, 1e-2)
    with pytest.raises(NumericalFailure, match="singular or not finite"):
        solve_scales(broken, torch.ones(2, 3), torch.zeros(2), 1, 1.0, 10.0)


def unit_outputs(features: Tensor, weight: Tensor, unit_width: int) -> Tensor:
    """What every unit adds to the output, (tokens * d, U)."""
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
    """What the authors' LSMR converges to, here by a dense solver on the units' outputs."""
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


@pytest.mark.parametrize("unit_width", [1, 2])
def test_planted_scales_are_found(unit_width: int) -> None:
    features, weight, bias = draw(200, 6), draw(4, 6, seed=1), draw(4, seed=2)
    planted = torch.tensor([0.5, 2.0, -1.0, 1.0, 3.0, 0.0][: 6 // unit_width]).double()
    scaled = features * planted.repeat_interleave(unit_width)
    moments = moments_of(features, scaled @ weight.T + bias)
    scales = solve_scales(moments, weight, bias, unit_width, damping=1e-3, limit=10.0)
    torch.testing.assert_close(scales, planted, rtol=1e-5, atol=1e-5)


def test_a_perfect_fit_is_left_at_one() -> None:
    features, weight, bias = draw(20, 6), draw(4, 6, seed=1), draw(4, seed=2)
    moments = moments_of(features, features @ weight.T + bias)
    scales = solve_scales(moments, weight, bias, 1, damping=1.0, limit=10.0)
    torch.testing.assert_close(scales, torch.ones(6, dtype=torch.float64))


def test_dead_units_are_left_at_one() -> None:
    features, weight = 0 * draw(20, 3), draw(4, 3)
    moments = moments_of(features, draw(20, 4, seed=1))
    scales = solve_scales(moments, weight, torch.zeros(4), 1, damping=1.0, limit=10.0)
    assert torch.equal(scales, torch.ones(3, dtype=torch.float64))


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
def test_what_is_accepted_never_raises_the_held_out_error(noise: float, distance: float) -> None:
    weight, bias, seen = data(40, 12, 5, 1, noise)
    held_out = data(30, 12, 5, 2, noise)[2]
    old = weight + distance * torch.randn_like(weight), bias
    new = fit_with_validation(seen, held_out, (1e-3, 1e-1, 10.0), *old)
    accepted = not torch.equal(new[0], old[0])
    assert held_out.error(*new) <= held_out.error(*old)
    if distance == 1.0 and noise < 1:
        assert accepted
        assert held_out.error(*new) < 0.1 * held_out.error(*old)
    if distance == 0.0 and noise == 30.0:
        assert not accepted, "the truth cannot be improved on, only fitted to noise"


def test_held_out_tokens_choose_the_ridge() -> None:
    weight, bias, seen = data(
        14, 12, 5, 1, 3.0
    )  # hardly more tokens than features: noise is fitted
    held_out = data(200, 12, 5, 2, 1.0)[2]
    old = 0.0 * weight, bias
    both = seen + held_out
    new = fit_with_validation(seen, held_out, (1e-8, 1.0), *old)
    torch.testing.assert_close(new, solve_weights(both, 1.0, prior=old[0]))
    first = fit_with_validation(seen, Moments.zeros(12, 5), (1e-8, 1.0), *old)
    torch.testing.assert_close(first, solve_weights(seen, 1e-8, prior=old[0]))
    assert not torch.allclose(first[0], new[0], atol=0.1)


def test_without_an_intercept_the_fit_goes_through_zero() -> None:
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


def test_evidence_knows_that_there_is_no_bias() -> None:
    features = draw(400, 4) + 1.0
    planted = draw(3, 4, seed=1)
    targets = features @ planted.T
    seen, held_out = (
        moments_of(features[:300], targets[:300]),
        moments_of(features[300:], targets[300:]),
    )
    weight, bias = fit_with_validation(seen, held_out, (1e-6,), torch.zeros(3, 4), None)
    assert bias is None
    torch.testing.assert_close(weight, planted, rtol=1e-4, atol=1e-4)
    kept, _ = fit_with_validation(seen, held_out, (1e3,), planted, None)
    assert torch.equal(kept, planted)
    emptied = Moments.zeros(0, 3)
    emptied.add(torch.zeros(10, 0), targets[:10].float())
    nothing, bias = solve_weights(emptied, 1e-2, intercept=False)
    assert nothing.shape == (3, 0)
    assert bias is None


def test_scales_without_a_bias_are_those_with_a_bias_of_zero() -> None:
    features, weight = draw(50, 6), draw(4, 6, seed=1)
    moments = moments_of(features, 1.3 * features @ weight.T)
    with_zero = solve_scales(moments, weight, torch.zeros(4), 2, 1.0, 10.0)
    assert torch.equal(solve_scales(moments, weight, None, 2, 1.0, 10.0), with_zero)
    assert (with_zero - 1).abs().max() > 0.1
