"""A constraint, and the cost of keeping n units of every block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real

import numpy as np
from numpy.typing import NDArray

from rfprune.errors import UserError
from rfprune.settings import METRICS


@dataclass(frozen=True)
class Constraint:
    """The fraction of the original cost to keep.

    Attributes:
        metric: "mac" (multiply-accumulates of the Transformer layers), "params" (all parameters),
            "memory" (bytes of all weights) or "latency" (milliseconds of a forward pass, end to
            end, on the device that the model is on).
        ratio: in (0, 1); 0.5 keeps half. (Kwon et al. 2022 use the same meaning; some papers give
            the fraction that is removed.)

    Raises:
        UserError: an unknown metric, or a ratio outside (0, 1).
    """

    metric: str
    ratio: float

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UserError(
                f"metric '{self.metric}' is unknown; choose one of {', '.join(METRICS)}"
            )
        is_number = isinstance(self.ratio, Real)
        if not (is_number and math.isfinite(self.ratio) and 0 < self.ratio < 1):
            raise UserError(
                f"constraint {self.ratio} is not a fraction between 0 and 1 (both excluded); "
                "0.5, for example, keeps half of the original cost"
            )


@dataclass(frozen=True)
class CostModel:
    """What each block costs by the number of units that it keeps.

    Attributes:
        metric: see `Constraint`.
        tables: one float64 array per block of a layout; `tables[b][n]` is the cost of keeping n
            units of block b, infinite where that is not allowed. No unit and all units always are.
        constant: the cost of what is never pruned and still counted.
        added: the part of `constant` that the original lacks, and any pruned model has.
    """

    metric: str
    tables: tuple[NDArray[np.float64], ...]
    constant: float = 0.0
    added: float = 0.0

    def total(self, kept: Sequence[int]) -> float:
        """The cost of keeping `kept[b]` units of each block b."""
        return self.constant + sum(
            float(table[n]) for table, n in zip(self.tables, kept, strict=True)
        )

    @property
    def original(self) -> float:
        """The cost with nothing pruned."""
        return self.constant - self.added + sum(float(table[-1]) for table in self.tables)

    @property
    def least(self) -> float:
        """What the blocks cost at the least."""
        return sum(float(table.min()) for table in self.tables)

    def ratio_for(self, cost: float) -> float:
        """The ratio, rounded up to four decimals, that allows a cost (the constant included)."""
        return math.ceil(1e4 * cost / self.original) / 1e4

    def with_savings(self, factor: float) -> CostModel:
        """The same original cost, where whatever is pruned saves `factor` times as much."""
        tables = tuple(factor * table for table in self.tables)
        full = sum(float(table[-1]) for table in self.tables)
        return replace(self, tables=tables, constant=self.constant + (1 - factor) * full)

    def of_blocks(self, blocks: Sequence[int], num_units: Sequence[int]) -> CostModel:
        """Of some of the blocks alone, of which fewer units are left; the others cost nothing."""
        tables = tuple(
            self.tables[b][: units + 1] for b, units in zip(blocks, num_units, strict=True)
        )
        return replace(self, tables=tables)

    def budget(self, constraint: Constraint) -> float:
        """The cost that a constraint allows for the blocks, the constant left out.

        Raises:
            UserError: the constant alone is more than is allowed; the least possible ratio is
                named.
        """
        budget = constraint.ratio * self.original - self.constant
        least = self.constant + self.least
        if constraint.ratio * self.original < least:
            raise UserError(
                f"constraint {constraint.ratio} on {self.metric} cannot be met: what is never "
                "pruned already costs more; choose a constraint of at least "
                f"{self.ratio_for(least):g}"
            )
        return budget


def linear_costs(
    metric: str, unit_costs: Sequence[float], num_units: Sequence[int], constant: float = 0.0
) -> CostModel:
    """A cost model in which every unit of a block costs the same."""
    tables = tuple(
        float(unit_cost) * np.arange(units + 1, dtype=np.float64)
        for unit_cost, units in zip(unit_costs, num_units, strict=True)
    )
    return CostModel(metric, tables, constant)
