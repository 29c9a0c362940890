"""Measured milliseconds of a model by the sizes of its sublayers.

A table is measured by `rfprune.latency.profile`, kept in a file (`LatencyTable.save` and `.load`),
checked against a model and a machine (`check_table`), and made into the costs of a constraint
(`latency_costs`). Kwon et al. 2022 fit a constant and a line to such a table; here it is used as
it was measured, and the constant rest of the model is part of it.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from transformers import PreTrainedModel

from rfprune.cost.constraint import CostModel
from rfprune.errors import RfpruneWarning, UserError
from rfprune.latency.conditions import Conditions
from rfprune.model.layout import Block, Layout

PROFILE_AGAIN = "measure one that fits with scripts/profile_latency.py"
FORMAT = "rfprune latency table"
FORMAT_VERSION = 1

_NEAR = 1e-6  # what rounding may do to a sum


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
class LatencyCurve:
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
        total_ms: of the model as it is, end to end. total_spread: as `LatencyCurve.spreads`.
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
    curves: tuple[LatencyCurve, ...]
    scale: float
    rounds: int

    def curve_of(self, block: Block, hidden_size: int) -> LatencyCurve:
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
        """Write the table as JSON; see `save_table`."""
        save_table(self, path)

    @staticmethod
    def load(path: Path) -> LatencyTable:
        """Read a table that `save` wrote; see `load_table`."""
        return load_table(path)


def scaled(curve: LatencyCurve, factor: float) -> LatencyCurve:
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
        layout.num_runs(block) * table.curve_of(block, layout.hidden_size).costs(block.num_units)
        for block in layout.blocks
    )
    return CostModel("latency", tables, table.rest_ms)


def shape_of(layout: Layout) -> ModelShape:
    """What a model must agree in with the one that was measured; a block that runs several times
    is there as often."""
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


def save_table(table: LatencyTable, path: Path) -> None:
    """Write a table; a file of that name is replaced in one step, or stays as it was.

    Raises:
        UserError: the disk does not take it.
    """
    entries = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(table)}
    text = json.dumps(entries, indent=1, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"the latency table '{path}' cannot be written ({error.strerror}): choose another file"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def load_table(path: Path) -> LatencyTable:
    """Read a table that `save_table` wrote.

    Raises:
        UserError: there is no such file, it is no latency table, of another version, or damaged;
            the sentence says what is wrong with it.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"the latency table '{path}' cannot be read ({error.strerror}): give a file that "
            "scripts/profile_latency.py has written"
        ) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "it is not JSON") from error
    if not isinstance(entries, dict) or entries.pop("format", None) != FORMAT:
        raise UserError(
            f"'{path}' is no latency table: give a file that scripts/profile_latency.py has written"
        )
    version = entries.pop("format_version", None)
    if type(version) is not int or version != FORMAT_VERSION:
        raise UserError(
            f"the latency table '{path}' has format version {version!r:.20}, and this rfprune "
            f"reads {FORMAT_VERSION}; {PROFILE_AGAIN}"
        )
    try:
        table: LatencyTable = _read(LatencyTable, entries, "it")
        _check(table)
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    return table


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"the latency table '{path}' is damaged: {what}; {PROFILE_AGAIN}")


def _read(kind: Any, value: Any, name: str) -> Any:
    """`value`, as json gives it, as the type `kind`: a dataclass, a tuple of one type, or plain.

    Raises:
        ValueError: it is something else; `name` says where.
    """
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, value, name)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{name} is no list")
        item = typing.get_args(kind)[0]
        return tuple(_read(item, one, f"{name}[{i}]") for i, one in enumerate(value))
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**53 else math.inf
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{name} is {value!r:.40}, not a {kind.__name__}")
    return value


def _read_fields(kind: Any, value: Any, name: str) -> Any:
    types = typing.get_type_hints(kind)
    if not isinstance(value, dict):
        raise ValueError(f"{name} is no object")
    if value.keys() != types.keys():
        odd = sorted(value.keys() ^ types.keys())
        raise ValueError(f"{name} lacks, or has no place for, {', '.join(odd):.80}")
    return kind(**{field: _read(types[field], value[field], field) for field in types})


def _check(table: LatencyTable) -> None:
    """Raises ValueError where numbers do not go together."""
    if not 0 <= table.rest_ms <= table.total_ms or table.total_ms == 0:
        raise ValueError(f"{table.rest_ms} of {table.total_ms} ms are for the rest of the model")
    if not table.curves or not table.model.blocks:
        raise ValueError("there are no sublayers in it")
    for curve in table.curves:
        _check_curve(curve)
    if min(table.rounds, table.conditions.batch_size, table.conditions.sequence_length) < 1:
        raise ValueError("it was measured on nothing")
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
        raise ValueError(f"{name} has too few numbers")
    if curve.sizes[0] != 0 or any(
        after <= before for before, after in zip(curve.sizes, curve.sizes[1:], strict=False)
    ):
        raise ValueError(f"the sizes in {name} do not go up from 0")
    if curve.ms[0] != 0 or min(curve.ms) < 0 or min(curve.spreads) < 0:
        raise ValueError(f"{name} has negative times, or none for no units")
    if min(curve.round_to, curve.unit_width, curve.hidden_size) < 1:
        raise ValueError(f"{name} has sizes below 1")
