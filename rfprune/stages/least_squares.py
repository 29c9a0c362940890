"""Least squares from accumulated moments: one scale per unit, or a whole output projection.

Features X (tokens, p) are the inputs of an output projection and targets Y (tokens, d) its wanted
outputs. Xᵀ·X and Xᵀ·Y are summed batch by batch in float64, so memory is O(p² + p·d) for any
number of tokens. A (p, p) matrix may have a GB, so systems are factorised and solved in place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rfprune.stages.float64 import to_float64
from rfprune.stages.tensor_store import TensorStore

ROWS = 1024
"""Rows of Xᵀ·X that are computed, or moved to and from a store, at a time."""

_FLOAT32_EPS = torch.finfo(torch.float32).eps  # products of features are computed in float32
_TINY = torch.finfo(torch.float64).tiny

System = tuple[Tensor, Tensor, float]
"""A matrix (p, p), a right side (p, d), and the error that float32 products may have left in an
eigenvalue of the matrix."""


class NumericalFailure(Exception):
    """A solve has no usable solution. The block keeps its weights, and the user gets a warning."""


@dataclass
class Moments:
    """Sums over tokens of features x and targets y, in float64.

    Attributes:
        gram: (p, p), sum of x·xᵀ.
        cross: (p, d), sum of x·yᵀ.
        feature_sum: (p,), sum of x.
        target_sum: (d,), sum of y.
        target_energy: sum of |y|².
        count: number of tokens.
    """

    gram: Tensor
    cross: Tensor
    feature_sum: Tensor
    target_sum: Tensor
    target_energy: float = 0.0
    count: int = 0

    @staticmethod
    def zeros(num_features: int, num_outputs: int, device: torch.device | str = "cpu") -> Moments:
        """Moments of no tokens."""

        def make(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        p, d = num_features, num_outputs
        return Moments(make(p, p), make(p, d), make(p), make(d))

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Add tokens with features (tokens, p) and targets (tokens, d), in place."""
        features, targets = _at_least_float32(features), _at_least_float32(targets)
        device = self.gram.device  # the CPU where the device of the features has no float64
        for rows in _row_blocks(features.shape[1]):
            self.gram[rows] += (features[:, rows].T @ features).to(device)
            self.cross[rows] += (features[:, rows].T @ targets).to(device)
        self.feature_sum += features.sum(0).to(device)
        self.target_sum += targets.sum(0).to(device)
        self.target_energy += float(targets.square().sum())
        self.count += len(features)

    def __iadd__(self, other: Moments) -> Moments:
        """Add the moments of other tokens, in place."""
        other = other.loaded()
        for own, added in (
            (self.gram, other.gram),
            (self.cross, other.cross),
            (self.feature_sum, other.feature_sum),
            (self.target_sum, other.target_sum),
        ):
            own += added
        self.target_energy += other.target_energy
        self.count += other.count
        return self

    def __add__(self, other: Moments) -> Moments:
        """Moments of the tokens of both."""
        total = self.working_copy()
        total += other
        return total

    def loaded(self) -> Moments:
        """The same moments with their matrices in memory; do not change them in place."""
        return self

    def working_copy(self) -> Moments:
        """The same moments in memory, which may be changed in place."""
        return copy.deepcopy(self)

    def centred(self, *, overwrite: bool = False) -> tuple[Tensor, Tensor]:
        """Gram matrix (p, p) and cross moments (p, d) about the means.

        Args:
            overwrite: put the first one in the place of `gram`.
        """
        gram = self.gram if overwrite else torch.empty_like(self.gram)
        for rows in _row_blocks(len(gram)):
            means = torch.outer(self.feature_sum[rows], self.feature_sum).div_(self.count)
            torch.sub(self.gram[rows], means, out=gram[rows])
        cross = torch.outer(self.feature_sum, self.target_sum).div_(self.count)
        return gram, torch.sub(self.cross, cross, out=cross)

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """Sum over tokens of |y - W·x - b|² for a weight (d, p) and a bias (d,) or None."""
        where = self.gram.device
        weight = to_float64(weight, where)
        bias = weight.new_zeros(len(weight)) if bias is None else to_float64(bias, where)
        fitted = (weight @ self.gram).mul_(weight).sum() + 2 * bias @ (weight @ self.feature_sum)
        fitted = fitted + self.count * bias @ bias
        crossed = (weight.T * self.cross).sum() + bias @ self.target_sum
        return float(self.target_energy - 2 * crossed + fitted)


class StoredMoments(Moments):
    """Moments whose matrices are in a store, and are loaded whenever they are used.

    Args:
        moments: they lose their matrices, which are freed.
        store: one that keeps nothing in memory. The matrices are never released from it.
    """

    def __init__(self, moments: Moments, store: TensorStore) -> None:
        self._store = store
        self._shapes = moments.gram.shape, moments.cross.shape
        self._kept = [
            (store.keep(moments.gram[rows]), store.keep(moments.cross[rows]))
            for rows in _row_blocks(len(moments.gram))
        ]
        moments.gram = moments.cross = moments.gram.new_empty(0, 0)
        super().__init__(**vars(moments))

    def loaded(self) -> Moments:
        """A copy in memory."""
        gram, cross = (self.feature_sum.new_empty(shape) for shape in self._shapes)
        for rows, kept in zip(_row_blocks(len(gram)), self._kept, strict=True):
            gram[rows], cross[rows] = (self._store.load(one) for one in kept)
        sums = self.feature_sum.clone(), self.target_sum.clone()
        return Moments(gram, cross, *sums, self.target_energy, self.count)

    working_copy = loaded

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """See `Moments.error`."""
        return self.loaded().error(weight, bias)

    def __iadd__(self, other: Moments) -> StoredMoments:
        """Add other stored moments, in the store."""
        assert isinstance(other, StoredMoments)
        for own_blocks, added_blocks in zip(self._kept, other._kept, strict=True):
            for own, added in zip(own_blocks, added_blocks, strict=True):
                self._store.replace(own, self._store.load(own).add_(other._store.load(added)))
        self.feature_sum += other.feature_sum
        self.target_sum += other.target_sum
        self.target_energy += other.target_energy
        self.count += other.count
        return self


def _row_blocks(size: int) -> list[slice]:
    return [slice(start, start + ROWS) for start in range(0, size, ROWS)]


DampedSolver = Callable[[Tensor, Tensor, float], Tensor]
"""From G (U, U), r (U,) and a damping to the δ (U,) of the least |G·δ - r|² + damping²·|δ|²."""


def solve_scales(
    moments: Moments,
    weight: Tensor,
    bias: Tensor | None,
    unit_width: int,
    damping: float,
    limit: float,
    solver: DampedSolver | None = None,
) -> Tensor:
    """One scale per unit by damped least squares: the mask tuning of Kwon et al. 2022, section 4.3.

    With the output z_u = W_u·x_u of unit u, G_uv = Σ z_u·z_v and r_u = Σ z_u·(y - b - Σ_v z_v) over
    tokens, the authors solve the normal equations G·δ = r for the change δ of the scales by LSMR
    with a damping term. Its exact solution is

        scales = 1 + (GᵀG + damping²·I)⁻¹·Gᵀr

    Departure from the authors' code: this closed form, in float64, replaces the iterative solver.

    Args:
        moments: of the inputs of the output projection and of its targets.
        weight: W (d, p) of the output projection.
        bias: b (d,), which is kept; None for a projection without bias.
        unit_width: features of one unit.
        damping: of LSMR.
        limit: the largest absolute scale that is accepted.
        solver: in place of the closed form.

    Returns:
        Scales (U,) in float64.

    Raises:
        NumericalFailure: the solve failed or a scale is beyond the limit.
    """
    weight, cross = to_float64(weight, moments.gram.device), moments.cross
    if bias is not None:
        cross = cross - torch.outer(moments.feature_sum, to_float64(bias, moments.gram.device))
    products = (weight.T @ weight) * moments.gram  # (p, p)
    correlations = (weight.T * cross).sum(1)  # (p,)
    units = len(products) // unit_width
    gram = products.view(units, unit_width, units, unit_width).sum((1, 3))  # (U, U)
    residual = correlations.view(units, unit_width).sum(1) - gram.sum(1)  # (U,)
    scales = 1 + (solver or _solve_damped)(gram, residual, damping)
    if not (scales.abs() <= limit).all():  # not a number, too
        raise NumericalFailure(f"a scale of {float(scales.abs().max()):.3g} is beyond ±{limit:g}")
    return scales


def _solve_damped(gram: Tensor, residual: Tensor, damping: float) -> Tensor:
    """The closed form of `DampedSolver`."""
    normal = gram.T @ gram
    normal.diagonal().add_(damping**2)
    jitter = 1e-10 * float(normal.diagonal().mean())
    return _solve(lambda: (normal.clone(), (gram.T @ residual)[:, None], jitter))[:, 0]


def solve_weights(
    moments: Moments, ridge: float, prior: Tensor | None = None, *, intercept: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Ridge regression of the targets on the features, with an intercept that is not penalised.

    Args:
        moments: of features and targets.
        ridge: strength, as a fraction of the mean diagonal of the centred Gram matrix.
        prior: weight (d, p) that a strong ridge gives; zero if None.
        intercept: False for a projection without a bias; moments are then about zero.

    Returns:
        Weight (d, p) and bias (d,) in float64; None for the bias without an intercept.

    Raises:
        NumericalFailure: there are no tokens, or the solve failed.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> moments = Moments.zeros(num_features=1, num_outputs=1)
        >>> moments.add(x, 3 * x + 5)
        >>> weight, bias = solve_weights(moments, ridge=1e-9)
        >>> round(weight.item(), 3), round(bias.item(), 3)
        (3.0, 5.0)
    """
    if moments.count == 0:
        raise NumericalFailure("there are no tokens")
    target_mean = moments.target_sum / moments.count
    if not len(moments.feature_sum):
        return target_mean.new_empty(len(target_mean), 0), target_mean if intercept else None

    def system() -> System:
        own = moments.working_copy()
        largest = _FLOAT32_EPS * float(own.gram.trace())
        # Centring loses what is below the rounding error of the uncentred products.
        rounding = _FLOAT32_EPS * float(own.gram.diagonal().mean())
        gram, cross = own.centred(overwrite=True) if intercept else (own.gram, own.cross)
        strength = ridge * float(gram.diagonal().mean()) + rounding + _TINY
        gram.diagonal().add_(strength)
        if prior is None:
            return gram, cross.T.clone(memory_format=torch.contiguous_format).T, largest
        return gram, (strength * to_float64(prior, gram.device)).T.add_(cross), largest

    weight = _solve(system).T
    if not intercept:
        return weight, None
    return weight, target_mean - weight @ (moments.feature_sum / moments.count)


def fit_with_validation(
    train: Moments,
    held_out: Moments,
    ridges: Sequence[float],
    weight: Tensor,
    bias: Tensor | None,
    *,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Ridge regression whose strength and acceptance are decided on held-out tokens.

    The strength with the smallest held-out error is chosen, and the regression is then repeated on
    all tokens. Its prior is the present weight.

    Args:
        train: moments of the tokens that the strengths are compared on.
        held_out: moments of other tokens; without any, the first strength is used.
        ridges: candidate strengths; see `solve_weights`.
        weight: the present weight (d, p).
        bias: the present bias (d,), or None for a projection without one.
        overwrite: add the held-out moments to those of `train`, which saves a copy.

    Returns:
        The new weight and bias, or the present ones if these have a smaller held-out error.

    Raises:
        NumericalFailure: a solve failed.
    """
    solve = partial(solve_weights, prior=weight, intercept=bias is not None)
    if not held_out.count:
        return solve(train, ridges[0])
    errors = [held_out.error(*solve(train, ridge)) for ridge in ridges]
    best = min(range(len(ridges)), key=errors.__getitem__)
    if overwrite:
        train += held_out
    else:
        train = train + held_out
    fitted = solve(train, ridges[best])
    if max(errors[best], held_out.error(*fitted)) < held_out.error(weight, bias):
        return fitted
    return weight, bias


def _solve(system: Callable[[], System]) -> Tensor:
    """Solve a symmetric positive definite system by Cholesky factorisation.

    Where rounding has made it indefinite, further attempts add its `rounding` to the diagonal, 10
    and 100 times as much.

    Args:
        system: makes the system, whose tensors are overwritten. Without copies if its matrix is
            contiguous and its right side is the transpose of a contiguous one.

    Returns:
        The solution (p, d), in the memory of the right side.
    """
    for times in (0, 1, 10, 100):
        matrix, solution, rounding = system()
        if times > 0:
            matrix.diagonal().add_(times * rounding)
        factor = matrix.T  # the order of LAPACK
        info = torch.empty(0, dtype=torch.int32, device=matrix.device)
        torch.linalg.cholesky_ex(factor, out=(factor, info))
        if int(info) == 0:
            torch.linalg.solve_triangular(factor, solution, upper=False, out=solution)
            torch.linalg.solve_triangular(factor.mT, solution, upper=True, out=solution)
            if torch.isfinite(solution).all():
                return solution
        del matrix, factor, solution  # before they are made again
    raise NumericalFailure("the normal equations are singular or not finite")


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
