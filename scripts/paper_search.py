"""The latency search of Kwon et al. 2022 (arXiv 2204.09656, section 4.1), to compare with ours.

A kind of sublayer is thought to take nothing without units, a constant up to a threshold, and a
line beyond it, fitted to its table by least squares. Up to the threshold units are free once the
constant is paid: every sublayer that stays keeps so many of its best units. What is left of the
budget goes to the other heads and neurons by importance, as in the search under MACs, and whole
sublayers are dropped, the least important first.

Written from the paper, with what the authors' code gets wrong put right: the importance of the
units up to the threshold counts, flat tables and tight budgets are searched like any other, and
nothing is subtracted twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rfprune.cost.constraint import CostModel

Table = NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """What a sublayer is thought to cost by its number of units, beyond what it costs empty.

    Attributes:
        constant: of 1 to `threshold` units. slope: of every unit more.
    """

    threshold: int
    constant: float
    slope: float

    def cost(self, units: NDArray[np.int64]) -> Table:
        """(n,) numbers of units -> (n,) costs."""
        beyond = self.constant + self.slope * np.maximum(units - self.threshold, 0)
        return np.where(units > 0, beyond, 0.0)


def fit_line(table: Table) -> Line:
    """The threshold, constant and slope of least squared error; neither is negative.

    Args:
        table: (U + 1,) costs; sizes that are not allowed (infinite) are left out.
    """
    units = np.flatnonzero(np.isfinite(table))
    units = units[units > 0]
    costs = table[units] - table[0]
    best, best_error = Line(int(units[-1]), 0.0, 0.0), np.inf
    for threshold in units:
        line = _fit(units, costs, int(threshold))
        error = float(np.square(line.cost(units) - costs).sum())
        if error < best_error * (1 - 1e-9):
            best, best_error = line, error
    return best


def _fit(units: NDArray[np.int64], costs: Table, threshold: int) -> Line:
    """Least squares of constant + slope x (units beyond the threshold)."""
    x = np.maximum(units - threshold, 0).astype(np.float64)
    centred = x - x.mean()
    spread = float(centred @ centred)
    slope = max(0.0, float(centred @ costs) / spread) if spread > 0 else 0.0
    return Line(threshold, max(0.0, float(costs.mean() - slope * x.mean())), slope)


def paper_search(
    kinds: Sequence[str], errors: Sequence[Table], costs: CostModel, budget: float
) -> tuple[int, ...] | None:
    """Units to keep in every block; None where the lines leave no unit within the budget.

    The cost is that of the lines: by the table it may be more, or less, than the budget.

    Args:
        kinds: "head" or "neuron" of every block.
        errors: per block, `errors[b][n]` of keeping n units; what the nth unit is worth is the
            error that it takes away.
    """
    names = list(dict.fromkeys(kinds))
    blocks = {kind: [b for b, own in enumerate(kinds) if own == kind] for kind in names}
    lines = {kind: fit_line(_mean([costs.tables[b] for b in blocks[kind]])) for kind in names}
    spare = budget - sum(float(table[0]) for table in costs.tables)
    stages = {kind: _stages(errors, blocks[kind], lines[kind]) for kind in names}
    best, best_worth = None, 0.0
    first, second = names[0], names[-1]
    for some in stages[first]:
        for others in stages[second] if second != first else [_NOTHING]:
            left = spare - some.cost - others.cost
            if left < 0:
                continue
            found = _fill(some, others, lines[first].slope, lines[second].slope, left)
            worth = some.worth[found[0]] + others.worth[found[1]]
            if worth > best_worth:
                best, best_worth = (some, others, found), worth
    if best is None:
        return None
    kept = [0] * len(errors)
    some, others, counts = best
    for stage, count in zip((some, others), counts, strict=True):
        for b, units in zip(stage.blocks, stage.kept(count), strict=True):
            kept[b] = units
    return tuple(_allowed(costs.tables[b], n) for b, n in enumerate(kept))


@dataclass(frozen=True)
class _Stage:
    """Some sublayers of a kind stay, with their units up to the threshold.

    Attributes:
        cost: of that. base: how many units that is, by block.
        order: of the other units, the most valuable first, the place of their block in `blocks`.
        worth: (n + 1,) of the base and the first n others.
    """

    blocks: tuple[int, ...]
    base: tuple[int, ...]
    cost: float
    order: NDArray[np.int64]
    worth: Table

    def kept(self, count: int) -> list[int]:
        """Units by block, with the first `count` of the others."""
        others = np.bincount(self.order[:count], minlength=len(self.blocks))
        return [base + int(n) for base, n in zip(self.base, others, strict=True)]


_NOTHING = _Stage((), (), 0.0, np.zeros(0, dtype=np.int64), np.zeros(1))


def _stages(errors: Sequence[Table], blocks: Sequence[int], line: Line) -> list[_Stage]:
    """From no sublayer of the kind to all of them; those whose base is worth most stay."""
    base = {b: min(line.threshold, len(errors[b]) - 1) for b in blocks}
    worth = {b: float(errors[b][0] - errors[b][base[b]]) for b in blocks}
    ranked = sorted(blocks, key=lambda b: worth[b], reverse=True)
    stages = [_NOTHING]
    for number in range(1, len(ranked) + 1):
        stay = tuple(sorted(ranked[:number]))
        gains = [-np.diff(errors[b])[base[b] :] for b in stay]
        owners = np.repeat(np.arange(number), [len(gain) for gain in gains])
        values = np.concatenate(gains)
        descending = np.argsort(-values, kind="stable")
        total = sum(worth[b] for b in stay) + np.cumsum(values[descending])
        start = np.array([sum(worth[b] for b in stay)])
        stages.append(
            _Stage(
                stay,
                tuple(base[b] for b in stay),
                number * line.constant,
                owners[descending],
                np.concatenate([start, total]),
            )
        )
    return stages


def _fill(
    some: _Stage, others: _Stage, slope: float, other_slope: float, budget: float
) -> tuple[int, int]:
    """How many units beyond the base of two kinds of sublayers are worth most within a budget."""
    counts = np.arange(_most(slope, len(some.order), budget) + 1)
    left = budget - counts * slope
    rest = np.array([_most(other_slope, len(others.order), float(part)) for part in left])
    best = int(np.argmax(some.worth[counts] + others.worth[rest]))
    return int(counts[best]), int(rest[best])


def _most(slope: float, units: int, budget: float) -> int:
    budget = max(0.0, budget)
    return units if slope * units <= budget else int(budget * (1 + 1e-12) / slope)


def _mean(tables: Sequence[Table]) -> Table:
    """One table for a kind; where layers differ in size, of the sizes that all have."""
    shortest = min(len(table) for table in tables)
    mean: Table = np.mean([table[:shortest] for table in tables], axis=0)
    return mean


def _allowed(table: Table, units: int) -> int:
    """The next smaller number of units that is allowed."""
    return int(np.flatnonzero(np.isfinite(table[: units + 1]))[-1])
