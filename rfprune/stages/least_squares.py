"""Least squares from accumulated moments: scales of units, or whole out-projections.

Features X (tokens, p) enter an out-projection and should give targets Y (tokens, d). Xᵀ·X and Xᵀ·Y
are summed batch by batch in float64, so that memory is O(p² + p·d) whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rfprune.stages.float64 import to_float64

_PRECISION = torch.finfo(torch.float32).eps  # that in which products of features are computed
_TINY = torch.finfo(torch.float64).tiny


class NumericalFailure(Exception):
    """A solve gave nothing usable; the block stays as it was and the user is told."""


@dataclass
class Moments:
    """Sums over tokens, float64.

    Attributes:
        gram: (p, p), of x·xᵀ.
        cross: (p, d), of x·yᵀ.
        feature_sum: (p,). target_sum: (d,). target_energy: of |y|². count: tokens.
    """

    gram: Tensor
    cross: Tensor
    feature_sum: Tensor
    target_sum: Tensor
    target_energy: float = 0.0
    count: int = 0

    @staticmethod
    def zeros(num_features: int, num_outputs: int, device: torch.device | str = "cpu") -> Moments:
        """Nothing seen yet."""

        def make(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        p, d = num_features, num_outputs
        return Moments(make(p, p), make(p, d), make(p), make(d))

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Take in features (tokens, p) and targets (tokens, d)."""
        features, targets = _at_least_float32(features), _at_least_float32(targets)
        device = self.gram.device  # the CPU where the features' own device has no float64
        self.gram += (features.T @ features).to(device)
        self.cross += (features.T @ targets).to(device)
        self.feature_sum += features.sum(0).to(device)
        self.target_sum += targets.sum(0).to(device)
        self.target_energy += float(targets.square().sum())
        self.count += len(features)

    def plus(self, other: Moments) -> Moments:
        """What both have seen."""
        return Moments(
            self.gram + other.gram,
            self.cross + other.cross,
            self.feature_sum + other.feature_sum,
            self.target_sum + other.target_sum,
            self.target_energy + other.target_energy,
            self.count + other.count,
        )

    def centred(self) -> tuple[Tensor, Tensor]:
        """Gram (p, p) and cross moments (p, d) about the means."""
        gram = self.gram - torch.outer(self.feature_sum, self.feature_sum) / self.count
        cross = self.cross - torch.outer(self.feature_sum, self.target_sum) / self.count
        return gram, cross

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """Sum over tokens of |y - W·x - b|² for a weight (d, p) and a bias (d,), or none."""
        where = self.gram.device
        weight = to_float64(weight, where)
        bias = weight.new_zeros(len(weight)) if bias is None else to_float64(bias, where)
        fitted = (weight @ self.gram * weight).sum() + 2 * bias @ (weight @ self.feature_sum)
        fitted = fitted + self.count * bias @ bias
        crossed = (weight.T * self.cross).sum() + bias @ self.target_sum
        return float(self.target_energy - 2 * crossed + fitted)


def solve_scales(
    moments: Moments,
    weight: Tensor,
    bias: Tensor | None,
    unit_width: int,
    damping: float,
    limit: float,
) -> Tensor:
    """One scale per unit, so that the scaled units' outputs fit the targets.

    Kwon et al. 2022, section 4.3. With z_u = W_u·x_u the output of unit u, G = sum of z_u·z_v and
    r = sum of z_u·(y - b - sum of z): the authors' LSMR on the normal equations, damped around
    scale 1, has the closed form 1 + (GᵀG + damping²·I)⁻¹·Gᵀr.

    Args:
        weight: (d, p) of the out-projection. bias: (d,), kept as it is; None without one.
        limit: scales beyond ±limit are a failure.

    Raises:
        NumericalFailure: the solve failed or a scale is out of bounds.
    """
    weight, cross = to_float64(weight, moments.gram.device), moments.cross
    if bias is not None:
        cross = cross - torch.outer(moments.feature_sum, to_float64(bias, moments.gram.device))
    products = (weight.T @ weight) * moments.gram  # (p, p)
    correlations = (weight.T * cross).sum(1)  # (p,)
    units = len(products) // unit_width
    gram = products.view(units, unit_width, units, unit_width).sum((1, 3))  # (U, U)
    residual = correlations.view(units, unit_width).sum(1) - gram.sum(1)  # (U,)
    normal = gram.T @ gram + damping**2 * torch.eye(units, dtype=torch.float64, device=gram.device)
    scales = 1 + _solve(normal, gram.T @ residual)
    if scales.abs().max() > limit:
        raise NumericalFailure(f"a scale of {float(scales.abs().max()):.3g} is beyond ±{limit:g}")
    return scales


def solve_weights(
    moments: Moments, ridge: float, prior: Tensor | None = None, *, intercept: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Weight (d, p) and bias (d,) that fit the targets best: ridge regression, free intercept.

    Args:
        ridge: as a fraction of the mean diagonal of the centred Gram matrix.
        prior: weight (d, p) that the ridge draws the solution to; zero if None.
        intercept: False for a map without a bias, for which moments are about zero and None is
            the bias that is given.

    Raises:
        NumericalFailure: the solve failed.
    """
    if moments.count == 0:
        raise NumericalFailure("no token was seen")
    target_mean = moments.target_sum / moments.count
    if not len(moments.gram):
        return moments.cross.T, target_mean if intercept else None
    gram, cross = moments.centred() if intercept else (moments.gram.clone(), moments.cross)
    noise = _PRECISION * float(moments.gram.diagonal().mean())  # what centring cannot see below
    strength = ridge * float(gram.diagonal().mean()) + noise + _TINY
    gram.diagonal().add_(strength)
    if prior is not None:
        cross = cross + strength * to_float64(prior, gram.device).T
    weight = _solve(gram, cross).T
    if not intercept:
        return weight, None
    return weight, target_mean - weight @ (moments.feature_sum / moments.count)


def fit_with_validation(
    seen: Moments, held_out: Moments, ridges: Sequence[float], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A new weight (d, p) and bias (d,), or the old ones where those fit held-out tokens better.

    The ridge that does best on the held-out tokens is used, drawing to the old weight, and the
    fit is then made on all tokens.

    Args:
        held_out: of tokens that `seen` has not seen; where there are none, the first ridge is used.
        weight: as it was, (d, p). bias: as it was, (d,), or None where there is none.

    Raises:
        NumericalFailure: a solve failed.
    """
    solve = partial(solve_weights, prior=weight, intercept=bias is not None)
    if not held_out.count:
        return solve(seen, ridges[0])
    errors = [held_out.error(*solve(seen, ridge)) for ridge in ridges]
    best = min(range(len(ridges)), key=errors.__getitem__)
    fitted = solve(seen.plus(held_out), ridges[best])
    if max(errors[best], held_out.error(*fitted)) < held_out.error(weight, bias):
        return fitted
    return weight, bias


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve a symmetric positive definite system, if need be with 1e-10 of its diagonal added."""
    for jitter in (0.0, 1e-10):
        shifted = matrix.clone()
        shifted.diagonal().add_(jitter * matrix.diagonal().mean())
        factor, info = torch.linalg.cholesky_ex(shifted)
        if int(info) == 0:
            solution = torch.cholesky_solve(right.view(len(matrix), -1), factor).view(right.shape)
            if torch.isfinite(solution).all():
                return solution
    raise NumericalFailure("the normal equations are singular or not finite")


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
