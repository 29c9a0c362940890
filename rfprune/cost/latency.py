"""Measured milliseconds of a model by the sizes of its sublayers.

A table is measured by `rfprune.cost.profile`, kept in a file (`LatencyTable.save` and `.load`),
checked against a model and a machine (`check_table`), and made into the costs of a constraint
(`latency_costs`). Kwon et al. 2022 fit a constant and a line to such a table; here it is used as
it was measured, and the constant rest of the model is part of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from transformers import PreTrainedModel

from rfprune.cost.conditions import Conditions
from rfprune.cost.constraint import CostModel
from rfprune.errors import RfpruneWarning, UserError
from rfprune.model.layout import Block, Layout

PROFILE_AGAIN = "measure one that fits with scripts/profile_latency.py"


@dataclass(frozen=True)
class BlockShape:
    """The shape of one block of the model that was measured."""

    layer: int
    kind: str
    num_units: int
    unit_width: int


@dataclass(frozen=True)
class ModelShape:
    """Models that agree in this take the same time."""

    model_type: str
    hidden_size: int
    blocks: tuple[BlockShape, ...]


@dataclass(frozen=True)
class Curve:
    """What a sublayer takes by its size, without the norm and the residual, which always stay.

    Attributes:
        kind, hidden_size, unit_width: of the sublayers that it is for.
        round_to: sizes that are multiples of it are allowed, and none and all.
        sizes: numbers of units that were measured, from 0 up.
        ms: milliseconds, at none 0.
        spreads: half the interquartile range of each measurement, as a fraction of its median.
    """

    kind: str
    hidden_size: int
    unit_width: int
    round_to: int
    sizes: tuple[int, ...]
    ms: tuple[float, ...]
    spreads: tuple[float, ...]

    @property
    def num_units(self) -> int:
        """The largest size."""
        return self.sizes[-1]

    def costs(self, num_units: int) -> NDArray[np.float64]:
        """Milliseconds of keeping 0 to `num_units` units; infinite off the allowed sizes.

        What lies between two measured sizes is interpolated. There the measured ones are made
        monotone first: a dip is noise that a search would run into. Where every size was measured,
        they are as measured.
        """
        sizes, ms = np.array(self.sizes), np.array(self.ms)
        if len(sizes) <= self.num_units:
            monotone = isotonic_regression(np.clip(ms, 0, ms[-1])).x
            ms = np.append(np.minimum(monotone[:-1], ms[-1]), ms[-1])  # exact, without rounding
        units = np.arange(num_units + 1)
        table: NDArray[np.float64] = np.interp(units, sizes, ms)
        table[(units % self.round_to != 0) & (units != num_units)] = np.inf
        return table


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of a forward pass: `rest_ms` + what every sublayer takes.

    Attributes:
        total_ms: of the model as it is, end to end. total_spread: as `Curve.spreads`.
        rest_ms: of the model with all sublayers emptied: embeddings, norms, head, Python.
        curves: one for each shape of sublayer; those of all full sublayers and the rest add up to
            `total_ms`.
        scale: what the sublayers' own times were multiplied by to make that so; near 1 where the
            parts of the model add up.
        rounds: how often everything was timed.
    """

    model: ModelShape
    conditions: Conditions
    total_ms: float
    total_spread: float
    rest_ms: float
    curves: tuple[Curve, ...]
    scale: float
    rounds: int

    def curve_of(self, block: Block, hidden_size: int) -> Curve:
        """The curve for a block.

        Raises:
            UserError: the table has none, or none that is long enough.
        """
        for curve in self.curves:
            same = (curve.kind, curve.hidden_size, curve.unit_width) == (
                block.kind,
                hidden_size,
                block.unit_width,
            )
            if same and curve.num_units >= block.num_units:
                return curve
        raise UserError(
            f"the latency table has no times for {block.name} ({block.num_units} of width "
            f"{block.unit_width}, hidden size {hidden_size}): it is that of another model; "
            f"{PROFILE_AGAIN}"
        )

    def save(self, path: Path) -> None:
        """Write it as JSON; see `rfprune.cost.latency_file.save_table`."""
        from rfprune.cost.latency_file import save_table

        save_table(self, path)

    @staticmethod
    def load(path: Path) -> LatencyTable:
        """Read what `save` wrote; see `rfprune.cost.latency_file.load_table`."""
        from rfprune.cost.latency_file import load_table

        return load_table(path)


def scaled(curve: Curve, factor: float) -> Curve:
    """A curve of which every time is `factor` times as long."""
    return replace(curve, ms=tuple(factor * ms for ms in curve.ms))


def latency_costs(table: LatencyTable, layout: Layout) -> CostModel:
    """Milliseconds by how many units each block keeps; infinite where a number is not allowed.

    Args:
        layout: of the model that was measured, or of what has been pruned from it.

    Raises:
        UserError: the table has no times for a block of the layout.
    """
    tables = tuple(
        layout.runs_of(block) * table.curve_of(block, layout.hidden_size).costs(block.num_units)
        for block in layout.blocks
    )
    return CostModel("latency", tables, table.rest_ms)


def shape_of(layout: Layout) -> ModelShape:
    """What a model must agree in with the one that was measured; a block that runs several times
    is there as often."""
    blocks = tuple(
        BlockShape(block.layer, block.kind, block.num_units, block.unit_width)
        for block in layout.blocks
        for _ in range(layout.runs_of(block))
    )
    return ModelShape(layout.model_type, layout.hidden_size, blocks)


_REFUSED = {
    "device": "device",
    "dtype": "dtype",
    "batch_size": "batch size",
    "sequence_length": "sequence length",
    "attention": "attention implementation",
}
_WARNED = {
    "device_name": "machine",
    "platform": "platform",
    "torch": "torch version",
    "transformers": "transformers version",
    "threads": "number of threads",
    "padded": "padding",
}


def check_table(
    table: LatencyTable, model: PreTrainedModel, layout: Layout, conditions: Conditions
) -> None:
    """See that a table was measured for this model and these conditions.

    Warns where only machine, versions, number of threads or padding differ, by their names.

    Raises:
        UserError: it is of another model, type of device, dtype, batch size, sequence length or
            attention implementation; all that differ are named.
    """
    own = shape_of(layout)
    if table.model != own:
        raise UserError(
            f"the latency table is of another model: {_described(table.model)}, but this "
            f"{type(model).__name__} is {_described(own)}; {PROFILE_AGAIN}"
        )
    wrong = _differences(table.conditions, conditions, _REFUSED)
    if wrong:
        raise UserError(f"the latency table was measured for {wrong}; {PROFILE_AGAIN}")
    other = _differences(table.conditions, conditions, _WARNED)
    if other:
        warnings.warn(
            f"the latency table was measured for {other}, so the times may differ here",
            RfpruneWarning,
            stacklevel=2,
        )


def _differences(measured: Conditions, here: Conditions, names: Mapping[str, str]) -> str:
    """ "sequence length 128, not 64, and dtype float16, not float32", or nothing."""
    before, now = asdict(measured), asdict(here)
    return " and ".join(
        f"{name} {before[field]}, not {now[field]}"
        for field, name in names.items()
        if before[field] != now[field]
    )


def _described(shape: ModelShape) -> str:
    heads = _range(block.num_units for block in shape.blocks if block.kind == "head")
    neurons = _range(block.num_units for block in shape.blocks if block.kind == "neuron")
    layers = len({block.layer for block in shape.blocks})
    return (
        f"{shape.model_type}, hidden size {shape.hidden_size}, {layers} layers of {heads} heads "
        f"and {neurons} neurons"
    )


def _range(values: Iterable[int]) -> str:
    found = sorted(set(values)) or [0]
    return f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"
