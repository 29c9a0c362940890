"""Turn results/speedup_*.jsonl into results/speedup.md and the short table in README.md.

python scripts/speedup_table.py            # write both
python scripts/speedup_table.py --check    # write nothing; exit code 1 where one is stale

What `benchmark_speedup.py --profile` wrote, results/speedup_profile_*.json, is put into speedup.md
too. The short table goes between the lines `<!-- speedup:begin -->` and `<!-- speedup:end -->`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import one another

from rfprune.errors import UserError
from scripts.summarise import keep_current, read, read_measurements, with_tables

BEGIN, END = "<!-- speedup:begin -->", "<!-- speedup:end -->"

DTYPES = ("float32", "bfloat16", "float16")
RUNTIMES = ("eager", "compile", "compile-graphs", "onnx")
"""In the order of the tables."""

SHOWN = (32, 128)
"""Batch size and length of the short table."""

INTRODUCTION = """\
# Realised speedup

Times of the original over those of the pruned model, both in turn in the same rounds, **of** the
ideal: the original's multiply-accumulates over the pruned model's, Transformer layers alone. In
parentheses the quotient of the two. `by 8` keeps neurons in multiples of 8. Weights are random,
which changes no time. [README.md](README.md) says how to make these numbers again, and what they
mean.
"""

Line = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process); 0 done, 1 stale, 2 user error."""
    return keep_current(argv, "speedup_table", __doc__, _wanted)


def _wanted(results: Path, readme: Path) -> dict[Path, str]:
    found = read_measurements(results, "speedup", "benchmark_speedup", _use)
    lines = sorted(found, key=_order)  # processes that took turns left them in any order
    profiles = [_read_profile(path) for path in sorted(results.glob("speedup_profile_*.json"))]
    return {
        results / "speedup.md": "\n".join([INTRODUCTION, full(lines), *profiles]),
        readme: with_tables(read(readme), short(lines), readme, BEGIN, END),
    }


def _use(line: Line) -> object:
    return full([line]), _order(line)


def full(lines: Sequence[Line]) -> str:
    """A table for each model, machine and dtype: all runtimes and shapes."""
    tables = []
    for group in _grouped(lines, _where):
        columns = _columns(group)
        heads = " | ".join(_head(column) for column in columns)
        worst = max(line["spread"] for line in group)
        text = [
            f"## {group[0]['model']}, {_where(group[0])[1]}, {group[0]['dtype']}",
            "",
            f"{_versions(group[0])}; spread of the rounds' ratios (half the interquartile range) "
            f"at most {worst:.1%}.",
            "",
            f"| runtime | batch x length | original | {heads} |",
            f"|---|---|---|{'---|' * len(columns)}",
        ]
        for row in _grouped(group, lambda line: (line["runtime"], *_shape(line))):
            first = row[0]
            names = f"{first['runtime']} | {first['batch_size']} x {first['length']}"
            text.append(f"| {names} | {_ms(first['dense_ms'])} | {_entries(row, columns)} |")
        tables.append("\n".join(text) + "\n")
    return "\n".join(tables)


def short(lines: Sequence[Line]) -> str:
    """One table of all machines and runtimes at the shape `SHOWN`.

    Raises:
        UserError: that shape was not measured.
    """
    chosen = [line for line in lines if _shape(line) == SHOWN]
    if not chosen:
        raise UserError(f"no cell of {SHOWN[0]} x {SHOWN[1]} was measured: it is the one to show.")
    columns = _columns(chosen)
    heads = " | ".join(_head(column) for column in columns)
    text = [
        f"Speedup of ideal (quotient) at batch {SHOWN[0]}, length {SHOWN[1]}.",
        "",
        f"| model, machine | dtype | runtime | {heads} |",
        f"|---|---|---|{'---|' * len(columns)}",
    ]
    for row in _grouped(chosen, lambda line: (*_where(line), line["runtime"])):
        first = row[0]
        names = f"{first['model']}, {_where(first)[1]} | {first['dtype']} | {first['runtime']}"
        text.append(f"| {names} | {_entries(row, columns)} |")
    return "\n".join(text) + "\n"


def _where(line: Line) -> tuple[str, str, str]:
    """Model, machine and dtype."""
    machine = line["machine"]
    threads = "" if line["device"] == "cuda" else f" ({machine['threads']} threads)"
    if machine["threads"] == 1:
        threads = threads.replace("threads", "thread")
    return line["model"], f"{machine['device_name']}{threads}", line["dtype"]


def _order(line: Line) -> tuple[Any, ...]:
    model, machine, dtype = _where(line)
    return model, machine, DTYPES.index(dtype), RUNTIMES.index(line["runtime"]), *_shape(line)


def _versions(line: Line) -> str:
    versions = line["machine"]["versions"]
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _shape(line: Line) -> tuple[int, int]:
    return line["batch_size"], line["length"]


def _columns(lines: Iterable[Line]) -> list[tuple[float, int]]:
    found = {(float(line["constraint"]), int(line["round_to"])) for line in lines}
    return sorted(found, key=lambda column: (-column[0], column[1]))


def _head(column: tuple[float, int]) -> str:
    constraint, round_to = column
    return f"{constraint:g} of MACs" + (f", by {round_to}" if round_to > 1 else "")


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.3g} s"


def _entries(row: Sequence[Line], columns: Sequence[tuple[float, int]]) -> str:
    by_column = {_columns([line])[0]: line for line in row}
    return " | ".join(
        f"{line['speedup']:.2f} of {line['ideal']:.2f} ({line['quotient']:.2f})" if line else ""
        for line in (by_column.get(column) for column in columns)
    )


def _grouped(lines: Sequence[Line], key: Any) -> list[list[Line]]:
    groups: dict[Any, list[Line]] = {}
    for line in lines:
        groups.setdefault(key(line), []).append(line)
    return list(groups.values())


def _read_profile(path: Path) -> str:
    try:
        return profile_table(json.loads(read(path)))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a profile of scripts/benchmark_speedup.py "
            f"({type(error).__name__}: {error}): take it away."
        ) from error


def profile_table(profile: Line) -> str:
    """Where the time goes: what each kind of operator takes beyond its share of the ideal time."""
    model, machine, dtype = _where(profile)
    rows = profile["pruned"]
    heads = " | ".join(_head((row["constraint"], row["round_to"])) for row in rows)
    ideals = [row["ms"]["all"] - row["lost_ms"]["all"] for row in rows]
    speedups = [f"{row['speedup']:.2f} of {row['ideal']:.2f}" for row in rows]
    text = [
        f"## Where the rest goes: {model}, {machine}, {dtype}, {profile['runtime']}, "
        f"{profile['batch_size']} x {profile['length']}",
        "",
        "Milliseconds of a forward pass of the original; of each pruned model, what a kind of "
        "operator takes beyond the original's over the ideal speedup, as a part of the ideal time.",
        "",
        f"| | original | {heads} |",
        f"|---|---|{'---|' * len(rows)}",
        f"| speedup in these passes | | {' | '.join(speedups)} |",
    ]
    for kind, own in profile["dense"]["ms"].items():
        lost = zip(rows, ideals, strict=True)
        entries = " | ".join(f"{row['lost_ms'][kind] / ideal:+.1%}" for row, ideal in lost)
        text.append(f"| {kind} | {own:.3g} | {entries} |")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    sys.exit(main())
