"""A constraint, and the cost of keeping n units of each block.

The cost of a model is additive over its blocks (Kwon et al. 2022, section 4.1): a fixed cost plus
the sum of C_b(n_b), with n_b the number of units that block b keeps.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsFloat

import numpy as np
from numpy.typing import NDArray

from rfprune.errors import UserError
from rfprune.settings import METRICS


@dataclass(frozen=True)
class Constraint:
    """The fraction of the original cost to keep.

    Kwon et al. 2022 state constraints the same way; some papers state the fraction to remove.

    Attributes:
        metric: "mac" (multiply-accumulates of the Transformer layers on a sequence of mean length),
            "params" (number of parameters of the whole model), "memory" (bytes of all weights) or
            "latency" (milliseconds of a forward pass, end to end, on the model's device).
        ratio: fraction of the original's cost, in (0, 1); 0.5 keeps half.

    Raises:
        UserError: the metric is unknown, or the ratio is not in (0, 1).

    Example:
        >>> from rfprune import Constraint
        >>> Constraint("mac", 0.5)
        Constraint(metric='mac', ratio=0.5)
    """

    metric: str
    ratio: float

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UserError(
                f"metric '{self.metric}' is unknown; choose one of {', '.join(METRICS)}"
            )
        number = _number(self.ratio)
        if not 0 < number < 1:
            raise UserError(
                f"constraint {_shown(self.ratio)} is not a fraction between 0 and 1 (both "
                "excluded); 0.5, for example, keeps half of the original cost"
            )
        object.__setattr__(self, "ratio", number)

    @classmethod
    def of(cls, value: Any) -> Constraint:
        """Return a constraint unchanged, and a bare ratio as a constraint on MACs.

        Raises:
            UserError: the value is neither.
        """
        if isinstance(value, Constraint):
            return value
        if isinstance(value, list | tuple | set | dict):
            raise UserError(
                f"constraint {_shown(value)} is a {type(value).__name__}; give one constraint, "
                "such as Constraint('mac', 0.5), or several to prune_family()"
            )
        return cls(METRICS[0], value)


def _number(value: Any) -> float:
    """A number, also of numpy or torch, as a float; NaN for anything else."""
    try:
        return float(value) if isinstance(value, SupportsFloat) else math.nan
    except (TypeError, ValueError, RuntimeError, OverflowError):  # such as a vector
        return math.nan


def _shown(value: Any) -> str:
    """A value in a message, on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:60] + "..."


@dataclass(frozen=True)
class CostModel:
    """The cost of a model by how many units each block keeps.

    Attributes:
        metric: see `Constraint`; the unit of all costs (MACs, parameters, bytes, milliseconds).
        tables: one float64 array (U + 1,) per block of a layout; `tables[b][n]` is the cost of
            keeping n units of block b, infinite where n is not allowed. Keeping all is always
            allowed, and so is keeping none unless `rfprune.cost.limits` forbids it.
        constant: fixed cost of a pruned model.
        added_by_pruning: the part of `constant` that the original does not have; negative where
            the original had more, such as tokens that were trimmed.
        layer_costs: the part of `constant` that each layer takes (norms, biases), which goes with
            the whole layer; empty where there is none, or where no layer may be removed.
    """

    metric: str
    tables: tuple[NDArray[np.float64], ...]
    constant: float = 0.0
    added_by_pruning: float = 0.0
    layer_costs: tuple[float, ...] = ()

    def total(self, kept: Sequence[int], removed: Collection[int] = ()) -> float:
        """The cost of keeping `kept[b]` units of each block b, and all layers but `removed`."""
        return self.without_layers(removed).constant + sum(
            float(table[n]) for table, n in zip(self.tables, kept, strict=True)
        )

    @property
    def original(self) -> float:
        """The cost with nothing pruned."""
        full = sum(float(table[-1]) for table in self.tables)
        return self.constant - self.added_by_pruning + full

    @property
    def min_block_cost(self) -> float:
        """The smallest possible cost of all blocks together, without `constant`."""
        return sum(float(table.min()) for table in self.tables)

    @property
    def min_constant(self) -> float:
        """The smallest possible fixed cost: one layer must stay."""
        return self.constant - sum(self.layer_costs) + min(self.layer_costs, default=0.0)

    def ratio_for(self, cost: float) -> float:
        """The ratio, rounded up to four decimals, at which `cost` (with `constant`) is allowed."""
        return math.ceil(1e4 * cost / self.original) / 1e4

    def with_savings(self, factor: float) -> CostModel:
        """A model of the same original cost in which pruning saves `factor` times as much."""
        tables = tuple(factor * table for table in self.tables)
        full = sum(float(table[-1]) for table in self.tables)
        return replace(
            self,
            tables=tables,
            constant=self.constant + (1 - factor) * full,
            layer_costs=tuple(factor * cost for cost in self.layer_costs),
        )

    def without_layers(self, removed: Collection[int]) -> CostModel:
        """The costs of the same original once these layers are removed; their blocks keep nothing.

        Args:
            removed: indices of layers.
        """
        saved = sum(self.layer_costs[layer] for layer in removed) if self.layer_costs else 0.0
        return replace(
            self,
            constant=self.constant - saved,
            added_by_pruning=self.added_by_pruning - saved,
            layer_costs=(),
        )

    def select_blocks(self, blocks: Sequence[int], num_units: Sequence[int]) -> CostModel:
        """The costs of some blocks, each with `num_units` of its units left.

        `constant` stays; the blocks that are left out cost nothing.
        """
        tables = tuple(
            self.tables[b][: units + 1] for b, units in zip(blocks, num_units, strict=True)
        )
        return replace(self, tables=tables)

    def budget(self, constraint: Constraint) -> float:
        """The cost that a constraint allows for all blocks together, without `constant`.

        Raises:
            UserError: the fixed cost alone exceeds the constraint; the smallest possible ratio is
                named.
        """
        budget = constraint.ratio * self.original - self.constant
        smallest = self.min_constant + self.min_block_cost
        if constraint.ratio * self.original < smallest:
            raise UserError(
                f"constraint {constraint.ratio} on {self.metric} cannot be met: the parts that are "
                "never pruned cost more; choose a constraint of at least "
                f"{self.ratio_for(smallest):g}"
            )
        return budget


def linear_costs(
    metric: str, unit_costs: Sequence[float], num_units: Sequence[int], constant: float = 0.0
) -> CostModel:
    """A cost model in which all units of a block cost the same: C_b(n) = n · unit_costs[b]."""
    tables = tuple(
        float(unit_cost) * np.arange(units + 1, dtype=np.float64)
        for unit_cost, units in zip(unit_costs, num_units, strict=True)
    )
    return CostModel(metric, tables, constant)
