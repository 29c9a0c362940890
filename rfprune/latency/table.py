"""Latency tables: measured milliseconds of a model by the sizes of its sublayers.

`rfprune.latency.profile` measures a table, `LatencyTable.save` and `.load` keep it in a JSON file,
`check_table` compares it with a model and a machine, and `latency_costs` makes it the costs of a
constraint. Kwon et al. 2022 (section 4.1) fit a constant and a line to such a table; here the
measured values are used directly, and the fixed cost of the rest of the model is included.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import typing
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from transformers import PreTrainedModel

from rfprune.cost.constraint import CostModel
from rfprune.errors import RfpruneWarning, UserError, as_path
from rfprune.latency.conditions import Conditions
from rfprune.model.layout import Block, Layout

PROFILE_AGAIN = "measure a new one with scripts/profile_latency.py"
FORMAT = "rfprune latency table"
FORMAT_VERSION = 1

_NEAR = 1e-6  # relative rounding error of a sum


@dataclass(frozen=True)
class BlockShape:
    """The shape of one block of the model that was measured."""

    layer: int
    kind: str
    num_units: int
    unit_width: int


@dataclass(frozen=True)
class ModelShape:
    """All of a model that its latency table depends on; models of equal shape share a table."""

    model_type: str
    hidden_size: int
    blocks: tuple[BlockShape, ...]


@dataclass(frozen=True)
class LatencyCurve:
    """Milliseconds of a sublayer by its size, without its norm and residual, which always stay.

    Attributes:
        kind: of the units, "head" or "neuron".
        hidden_size: features of a hidden state.
        unit_width: features of a unit, 1 for a neuron.
        round_to: allowed sizes are 0, all units, and multiples of this.
        sizes: numbers of units that were measured, increasing from 0.
        ms: milliseconds at each size, 0 at size 0.
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
        """Milliseconds of keeping 0 to `num_units` units, (num_units + 1,).

        Sizes that are not allowed cost infinity. If every size was measured, the values are as
        measured. If not, the measured values are made monotone (isotonic regression), since a dip
        would be noise that a search prefers, and sizes between them are interpolated.
        """
        sizes, ms = np.array(self.sizes), np.array(self.ms)
        if len(sizes) <= self.num_units:
            monotone = isotonic_regression(np.clip(ms, 0, ms[-1])).x
            ms = np.append(np.minimum(monotone[:-1], ms[-1]), ms[-1])  # no rounding at the end
        units = np.arange(num_units + 1)
        table: NDArray[np.float64] = np.interp(units, sizes, ms)
        table[(units % self.round_to != 0) & (units != num_units)] = np.inf
        return table


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of a model's forward pass: `rest_ms` plus the time of every sublayer.

    Attributes:
        model: shape of the model that was measured.
        conditions: device, versions and batch shape under which the times hold.
        total_ms: milliseconds of the unpruned model, end to end.
        total_spread: half the interquartile range of `total_ms`, as a fraction of it.
        rest_ms: milliseconds of the model with all sublayers emptied: embeddings, norms, head,
            kernel-launch overhead.
        curves: one per shape of sublayer. The times of all full sublayers and `rest_ms` add up to
            `total_ms`.
        scale: factor that the measured times of the sublayers were multiplied by to add up to
            `total_ms`; near 1 if sublayers take the same time alone as in the model.
        rounds: how many times each part was timed.
        layer_ms: the part of `rest_ms` that each layer takes: its norms, residual sums and
            kernel-launch overhead. Removing a whole layer saves it. 0 in tables of earlier
            versions.

    Example:
        >>> from rfprune import Constraint, LatencyTable, prune
        >>> table = LatencyTable.load("table.json")
        >>> result = prune(model, batches, Constraint("latency", 0.5), latency_table=table)
    """

    model: ModelShape
    conditions: Conditions
    total_ms: float
    total_spread: float
    rest_ms: float
    curves: tuple[LatencyCurve, ...]
    scale: float
    rounds: int
    layer_ms: float = 0.0

    def curve_of(self, block: Block, hidden_size: int) -> LatencyCurve:
        """The curve for a block of a model with this hidden size.

        Raises:
            UserError: no curve has the block's shape and at least its number of units.
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
            f"{block.unit_width}, hidden size {hidden_size}), so it belongs to another model; "
            f"{PROFILE_AGAIN}"
        )

    def save(self, path: str | Path) -> None:
        """Write the table as JSON. An existing file is replaced completely or not at all.

        Raises:
            UserError: the file cannot be written.
        """
        path = as_path(path, "path")
        entries = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        text = json.dumps(entries, indent=1, allow_nan=False) + "\n"
        temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.partial")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise UserError(
                f"the latency table '{path}' cannot be written ({error.strerror}): choose a path "
                "in a folder that exists and is writable"
            ) from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | Path) -> LatencyTable:
        """Read a table that `save` wrote.

        Raises:
            UserError: the file cannot be read, is not a latency table, has another format version,
                or is damaged.
        """
        path = as_path(path, "path")
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"the latency table '{path}' cannot be read ({error.strerror}): give a file "
                "written by scripts/profile_latency.py"
            ) from error
        except (ValueError, RecursionError) as error:
            raise _damaged(path, "it is not JSON") from error
        if not isinstance(entries, dict) or entries.pop("format", None) != FORMAT:
            raise UserError(
                f"'{path}' is not a latency table: give a file written by "
                "scripts/profile_latency.py"
            )
        version = entries.pop("format_version", None)
        if type(version) is not int or version != FORMAT_VERSION:
            raise UserError(
                f"the latency table '{path}' has format version {version!r:.20}, but only "
                f"{FORMAT_VERSION} is supported; {PROFILE_AGAIN}"
            )
        try:
            table: LatencyTable = _parse(LatencyTable, entries, "the table")
            _check_consistency(table)
        except ValueError as error:
            raise _damaged(path, str(error)) from error
        return table


def latency_costs(table: LatencyTable, layout: Layout) -> CostModel:
    """Milliseconds of a forward pass by how many units each block keeps.

    Args:
        layout: of the model that was measured, or of a model that was pruned from it.

    Returns:
        A cost model with the constant `table.rest_ms`; sizes that are not allowed cost infinity.

    Raises:
        UserError: the table has no times for a block of the layout.
    """
    tables = tuple(
        layout.num_runs(block) * table.curve_of(block, layout.hidden_size).costs(block.num_units)
        for block in layout.blocks
    )
    layer_costs = (table.layer_ms,) * len(layout.layers)
    return CostModel("latency", tables, table.rest_ms, layer_costs=layer_costs)


def shape_of(layout: Layout) -> ModelShape:
    """The shape of a model; a block that runs several times is listed once per run."""
    blocks = tuple(
        BlockShape(block.layer, block.kind, block.num_units, block.unit_width)
        for block in layout.blocks
        for _ in range(layout.num_runs(block))
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
    """Check that a table was measured for this model and these conditions.

    Warns where only machine, versions, number of threads or padding differ, and names them.

    Raises:
        UserError: model, type of device, dtype, batch size, sequence length or attention
            implementation differ; all that differ are named.
    """
    own = shape_of(layout)
    if table.model != own:
        raise UserError(
            f"the latency table is for another model: {_described(table.model)}, but this "
            f"{type(model).__name__} is {_described(own)}; {PROFILE_AGAIN}"
        )
    wrong = _differences(table.conditions, conditions, _REFUSED)
    if wrong:
        raise UserError(f"the latency table was measured for {wrong}; {PROFILE_AGAIN}")
    other = _differences(table.conditions, conditions, _WARNED)
    if other:
        warnings.warn(
            f"the latency table was measured for {other}, so times may differ here",
            RfpruneWarning,
            stacklevel=2,
        )


def _differences(measured: Conditions, here: Conditions, names: Mapping[str, str]) -> str:
    """Such as "sequence length 128, not 64, and dtype float16, not float32"; else empty."""
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


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"the latency table '{path}' is damaged: {what}; {PROFILE_AGAIN}")


def _parse(kind: Any, value: Any, name: str) -> Any:
    """Convert a JSON value to `kind`: a dataclass, a tuple of one type, or a plain type.

    Raises:
        ValueError: the value has another type; the message starts with `name`.
    """
    if dataclasses.is_dataclass(kind):
        return _parse_fields(kind, value, name)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{name} is not a list")
        item = typing.get_args(kind)[0]
        return tuple(_parse(item, one, f"{name}[{i}]") for i, one in enumerate(value))
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**53 else math.inf
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{name} is {value!r:.40}, not of type {kind.__name__}")
    return value


def _parse_fields(kind: Any, value: Any, name: str) -> Any:
    types = typing.get_type_hints(kind)
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not an object")
    optional = {one.name for one in dataclasses.fields(kind) if one.default is not MISSING}
    if not types.keys() - optional <= value.keys() <= types.keys():
        odd = sorted((value.keys() ^ types.keys()) - (optional - value.keys()))
        raise ValueError(f"{name} has missing or unknown entries: {', '.join(odd):.80}")
    return kind(**{field: _parse(types[field], one, field) for field, one in value.items()})


def _check_consistency(table: LatencyTable) -> None:
    """Raise ValueError where numbers of a table contradict each other."""
    if not 0 <= table.rest_ms <= table.total_ms or table.total_ms == 0:
        raise ValueError(f"rest_ms is {table.rest_ms}, not between 0 and total_ms {table.total_ms}")
    num_layers = len({block.layer for block in table.model.blocks})
    if not 0 <= table.layer_ms * num_layers <= table.rest_ms * (1 + _NEAR):
        raise ValueError(f"layer_ms is {table.layer_ms}, more than a share of {table.rest_ms}")
    if not table.curves or not table.model.blocks:
        raise ValueError("it has no sublayers")
    for curve in table.curves:
        _check_curve(curve)
    conditions = table.conditions
    if min(table.rounds, conditions.batch_size, conditions.sequence_length) < 1:
        raise ValueError("rounds, batch_size or sequence_length is below 1")
    full = {(curve.kind, curve.unit_width): curve for curve in table.curves}
    total = table.rest_ms
    for block in table.model.blocks:
        own = full.get((block.kind, block.unit_width))
        if own is None or not 0 <= block.num_units <= own.num_units:
            raise ValueError(f"it has no times for the {block.kind}s of layer {block.layer}")
        total += float(own.costs(block.num_units)[-1])
    if not math.isclose(total, table.total_ms, rel_tol=_NEAR):
        raise ValueError(f"its parts add up to {total:.6g} ms, not to {table.total_ms:.6g}")


def _check_curve(curve: LatencyCurve) -> None:
    name = f"the curve of {curve.kind}s"
    if not len(curve.sizes) == len(curve.ms) == len(curve.spreads) >= 2:
        raise ValueError(f"{name} has lists of unequal length, or fewer than two sizes")
    if curve.sizes[0] != 0 or any(
        after <= before for before, after in zip(curve.sizes, curve.sizes[1:], strict=False)
    ):
        raise ValueError(f"the sizes of {name} do not increase from 0")
    if curve.ms[0] != 0 or min(curve.ms) < 0 or min(curve.spreads) < 0:
        raise ValueError(f"{name} has negative times, or a time other than 0 at size 0")
    if min(curve.round_to, curve.unit_width, curve.hidden_size) < 1:
        raise ValueError(f"round_to, unit_width or hidden_size of {name} is below 1")
