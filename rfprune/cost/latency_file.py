"""A latency table as a JSON file: written in one step, and checked when it is read."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import typing
from contextlib import suppress
from pathlib import Path
from typing import Any

from rfprune.cost.latency import PROFILE_AGAIN, Curve, LatencyTable
from rfprune.errors import UserError

FORMAT = "rfprune latency table"
FORMAT_VERSION = 1

_NEAR = 1e-6  # what rounding may do to a sum


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


def _check_curve(curve: Curve) -> None:
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
