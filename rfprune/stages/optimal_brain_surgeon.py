"""Greedy Optimal Brain Surgeon: the order in which a block's units are removed, and the errors.

With inputs x of the output projection and loss gradients g at its outputs, the Fisher information
of its weight W (d, p) is approximated by the Kronecker product of A = E[x·xᵀ] and G = E[g·gᵀ].
Removing a group b of columns and adjusting the others optimally then costs

    tr(W_b · ([A⁻¹]_bb)⁻¹ · W_bᵀ · G)

with closed-form updates of W and A⁻¹ (Hassibi & Stork 1993; for Transformers ZipLM, Kurtic et al.
2023, and LLM Surgeon, van der Ouderaa et al. 2024).

The adjusted weights serve to predict errors only. The weights of the pruned model come from the
least squares of `rfprune.stages.tune`, on the student's own inputs.

Departures from these papers:

- Units are removed in small groups rather than one at a time, as matrix products are far faster
  than a loop over thousands of neurons. Units that are expensive to remove together stay for a
  later group (`TOLERANCE`). Fewer than 1 / `CHUNK` units are removed one at a time.
- A⁻¹ is computed once and not updated. Its updates are a Cholesky factorisation with the removed
  columns as pivots, and only the pivots' rows are computed: p³/6 multiply-adds in place of p³/3.
- Matrices are in float32, at half the time and memory of float64. Damping bounds the condition
  number of A: costs have six digits, and orders differ only where costs are nearly equal. A matrix
  that is too ill-conditioned for float32 is inverted in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rfprune.stages.float64 import to_float64
from rfprune.stages.least_squares import NumericalFailure

CHUNK = 1 / 32
"""Size of a group, as a fraction of the units that are left."""

TOLERANCE = 1.5
"""A unit is removed with its group if its cost, after the units before it in the group, is at most
this many times the largest single cost in the group."""

SHRINK = 0.8
"""Matrices are copied without removed rows once less than this fraction of the rows is left."""

MAX_ROUNDING = 0.03
"""Largest accepted deviation of A·A⁻¹·1 from 1 in float32. Costs are far more precise than that: at
a deviation of 0.01 they are correct to six digits. If the caller allows TF32, the deviation is 0.2
and more."""


@dataclass(frozen=True)
class ErrorCurve:
    """The error of a block as a function of the number of units it keeps.

    Attributes:
        order: (U,) indices of the units, from the first to be removed to the last.
        errors: (U + 1,) float64; `errors[n]` is the error of keeping the last n units of `order`.
    """

    order: Tensor
    errors: Tensor

    def mask(self, kept: int) -> Tensor:
        """A mask (U,) of zeros and ones that keeps the last `kept` units of `order`."""
        mask = torch.ones(len(self.order))
        mask[self.order[: len(self.order) - kept]] = 0.0
        return mask


def removal_curve(inputs: Tensor, weight: Tensor, gradients: Tensor, unit_width: int) -> ErrorCurve:
    """Remove the units of a block greedily, cheapest first, with optimal adjustment of the rest.

    Args:
        inputs: A (p, p), second moment of the inputs; positive definite. It should be damped: an
            ill-conditioned one takes more than twice the time.
        weight: W (d, p) of the output projection.
        gradients: G (d, d), second moment of the loss gradients at its outputs.
        unit_width: number of columns of a unit, p / U; 1 for neurons.

    Returns:
        The removal order and the accumulated error, in the unit of tr(W·A·Wᵀ·G).

    Raises:
        NumericalFailure: A is not positive definite.

    Example:
        Two neurons; the second one has a larger output:

        >>> import torch
        >>> curve = removal_curve(torch.diag(torch.tensor([1.0, 4.0])), torch.ones(1, 2),
        ...                       torch.ones(1, 1), unit_width=1)
        >>> curve.order.tolist(), curve.errors.round(decimals=6).tolist()
        ([0, 1], [5.0, 1.0, 0.0])
        >>> curve.mask(kept=1)
        tensor([0., 1.])
    """
    gradients = to_float64(gradients)
    moments = inputs.to(gradients.device), weight.to(gradients.device), gradients
    for dtype in (torch.float32, torch.float64):
        try:
            order, costs = _remove_all(*moments, unit_width, dtype)
            break
        except NumericalFailure:
            if dtype == torch.float64:
                raise
    removed = torch.cat([costs.new_zeros(1), costs.clamp_min(0)]).cumsum(0)
    return ErrorCurve(order.cpu(), removed.flip(0).cpu())


def _remove_all(
    inputs: Tensor, weight: Tensor, gradients: Tensor, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Removal order (U,) and the cost (U,) of each removal in float64, computed in `dtype`."""
    inverse = _inverse(inputs.to(dtype))
    # W·R with R·Rᵀ = G: the sum of squares of its rows is weighted by G.
    weighted = weight.T.to(dtype) @ _root(gradients).to(dtype)
    left = _Columns(inverse, weighted, width)
    order, costs = [], []
    while left.num_units:
        units, unit_costs = left.remove_group()
        order.append(units)
        costs.append(unit_costs)
    return torch.cat(order), to_float64(torch.cat(costs))


class _Columns:
    """The columns of a block, while its units are removed group by group.

    Once k columns are removed, what is left of A⁻¹ is A⁻¹ - V·Vᵀ, with V (n, k) the rows of a
    Cholesky factor that has the removed columns as pivots.

    Attributes:
        width: number of columns of a unit.
        num_units: number of units that are left.
        removed: number k of removed columns.
        inverse: (p, p), A⁻¹ before any removal.
        units: (n / width,) the units in memory.
        is_left: (n / width,) False for units in memory that are removed.
        factor: (n, p); its first `removed` columns are V.
        diagonal: (n / width, width, width), blocks on the diagonal of A⁻¹ - V·Vᵀ.
        weighted: (n, r), adjusted W times the root of G.
    """

    def __init__(self, inverse: Tensor, weighted: Tensor, width: int) -> None:
        self.inverse, self.weighted, self.width = inverse, weighted, width
        self.num_units = len(inverse) // width
        self.removed = 0
        self.units = torch.arange(self.num_units, device=inverse.device)
        self.is_left = torch.ones_like(self.units, dtype=torch.bool)
        self.factor = inverse.new_empty(inverse.shape)
        blocks = inverse.view(self.num_units, width, self.num_units, width)
        self.diagonal = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()

    def remove_group(self) -> tuple[Tensor, Tensor]:
        """Remove the next group: its units, from the cheapest one, and the cost of each."""
        chosen, columns, cholesky, solved = self._choose_group()
        units, costs = self.units[chosen], self._sums_of_squares(solved)
        self._eliminate(columns, cholesky, solved)
        self.is_left[chosen] = False
        self.diagonal[chosen] = torch.eye(self.width).to(self.diagonal)  # stays definite
        self.num_units -= len(chosen)
        if self.num_units < SHRINK * len(self.units):
            self._shrink()
        return units, costs

    def _choose_group(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The next units to remove.

        Units that are cheap one by one can be expensive together (two copies of one neuron). The
        cost of each unit after those before it follows from the Cholesky factor. Expensive ones are
        left for a later group.

        Returns:
            Their positions in `units`, their columns, the Cholesky factor of the inverse at these
            columns, and the weighted columns divided by it: their squares add up to the costs.
        """
        cost = self._costs()
        size = max(1, int(self.num_units * CHUNK))
        chosen = torch.topk(cost, size, largest=False, sorted=True).indices
        limit = TOLERANCE * cost[chosen[-1]]
        while True:
            columns = self._columns(chosen)
            known = self._known(columns)
            own = self._columns(self.units[chosen])
            block = self.inverse[own[:, None], own].addmm_(known, known.T, alpha=-1)
            cholesky = _cholesky(block)
            weighted = self.weighted.index_select(0, columns)
            solved = torch.linalg.solve_triangular(cholesky, weighted, upper=False)
            fits = self._sums_of_squares(solved) <= limit
            fits[0] = True
            if bool(fits.all()):
                return chosen, columns, cholesky, solved
            chosen = chosen[fits]

    def _costs(self) -> Tensor:
        """The cost of removing each unit next; infinite for units that are removed already."""
        costs: Tensor
        if self.width == 1:
            lengths = torch.linalg.vector_norm(self.weighted, dim=1)
            costs = lengths.square_() / self.diagonal[:, 0, 0]
        else:
            weighted = self.weighted.unflatten(0, (-1, self.width))
            cholesky = _cholesky(self.diagonal)
            solved = torch.linalg.solve_triangular(cholesky, weighted, upper=False)
            costs = self._sums_of_squares(solved.flatten(0, 1))
        return costs.masked_fill_(~self.is_left, torch.inf)

    def _eliminate(self, columns: Tensor, cholesky: Tensor, solved: Tensor) -> None:
        """Make columns pivots: extend the factor, and adjust the other columns."""
        all_columns = self._columns(self.units)
        rows = self.inverse.index_select(0, all_columns[columns]).index_select(1, all_columns)
        rows.addmm_(self._known(columns), self.factor[:, : self.removed].T, alpha=-1)  # (b, n)
        pivots = torch.linalg.solve_triangular(cholesky, rows, upper=False).T  # (n, b)
        self.weighted.addmm_(pivots, solved, alpha=-1)
        if self.width == 1:
            self.diagonal[:, 0, 0] -= torch.linalg.vector_norm(pivots, dim=1).square_()
        else:
            blocks = pivots.unflatten(0, (-1, self.width))
            self.diagonal.baddbmm_(blocks, blocks.mT, alpha=-1)
        end = self.removed + len(columns)
        self.factor[:, self.removed : end] = pivots
        self.removed = end

    def _shrink(self) -> None:
        """Drop removed units from memory."""
        units = self.is_left.nonzero()[:, 0]
        columns = self._columns(units)
        factor = self.factor.new_empty(len(columns), self.factor.shape[1])
        factor[:, : self.removed] = self._known(columns)
        self.factor = factor
        self.weighted = self.weighted.index_select(0, columns)
        self.units, self.diagonal = self.units[units], self.diagonal[units]
        self.is_left = self.is_left[units]

    def _known(self, columns: Tensor) -> Tensor:
        """The rows of V at these columns."""
        return self.factor[:, : self.removed].index_select(0, columns)

    def _columns(self, units: Tensor) -> Tensor:
        """The columns of units that are given by their position."""
        within = torch.arange(self.width, device=units.device)
        return (units[:, None] * self.width + within).flatten()

    def _sums_of_squares(self, rows: Tensor) -> Tensor:
        """The sum of squares of the rows of each unit."""
        return rows.square().sum(1).view(-1, self.width).sum(1)


def _root(gradients: Tensor) -> Tensor:
    """R (d, r) with R·Rᵀ = G; without directions that have no gradient if G is singular."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(gradients)
    if not bool(info):
        return factor
    values, vectors = torch.linalg.eigh(gradients)
    used = values > 1e-7 * values[-1].clamp_min(0)
    root: Tensor = vectors[:, used] * values[used].sqrt()
    return root


def _inverse(matrix: Tensor) -> Tensor:
    """The inverse; NumericalFailure if float32 is too coarse for it."""
    factor = _cholesky(matrix)
    inverse: Tensor = torch.cholesky_inverse(factor, out=factor)
    if matrix.dtype == torch.float32:
        # A·A⁻¹·1 in several equal columns: as a product of matrices it also has the error of TF32.
        ones = matrix @ inverse.sum(1, keepdim=True).repeat(1, 32)
        if bool((ones - 1).abs().max() > MAX_ROUNDING):
            raise NumericalFailure("the second moments of its inputs are ill-conditioned")
    return inverse


def _cholesky(matrix: Tensor) -> Tensor:
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool((info != 0).any()):
        raise NumericalFailure("the second moments of its inputs are not positive definite")
    return factor
