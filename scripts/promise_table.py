"""Turn results/promise_*.jsonl into results/promise.md and the short table in README.md.

python scripts/promise_table.py            # write both
python scripts/promise_table.py --check    # write nothing; exit code 1 where one is stale

The short table goes between the lines `<!-- promise:begin -->` and `<!-- promise:end -->`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import one another

from rfprune.latency.promise import TOLERANCE
from scripts.summarise import keep_current, read, read_measurements, with_tables

BEGIN, END = "<!-- promise:begin -->", "<!-- promise:end -->"
INTRODUCTION = f"""\
# Promised latencies

Fractions of the original's latency, end to end: what was asked for, what the table of this machine
predicted and what was measured at the first attempt, and what was measured afresh in the end
(median of paired rounds, ± its standard error; the spread is half the interquartile range of single
rounds). Kept: within {TOLERANCE:.0%} of what was asked for.
"""

Line = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process); 0 done, 1 stale, 2 user error."""
    return keep_current(argv, "promise_table", __doc__, _wanted)


def _wanted(results: Path, readme: Path) -> dict[Path, str]:
    lines = read_measurements(results, "promise", "benchmark_promise", lambda line: full([line]))
    return {
        results / "promise.md": f"{INTRODUCTION}\n{full(lines)}",
        readme: with_tables(read(readme), short(lines), readme, BEGIN, END),
    }


def full(lines: Sequence[Line]) -> str:
    """A row for every constraint."""
    rows = [
        "| model, shape | asked for | predicted | first measured | attempts | measured afresh | "
        "miss | spread | MACs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        first = line["attempts"][0]
        rows.append(
            f"| {_where(line)} | {line['constraint']:g} | {first['predicted']:.3f} | "
            f"{first['measured']:.3f} | {len(line['attempts'])} | "
            f"{line['measured']:.3f} ± {line['measured'] * line['error']:.3f} | "
            f"{_miss(line):+.1%} | {line['spread']:.1%} | {line['mac']:.3f} |"
        )
    return "\n".join(rows) + "\n"


def short(lines: Sequence[Line]) -> str:
    """A row for every model, shape and machine."""
    rows = [
        "| model, shape | latencies asked for | misses of the table alone | misses in the end | "
        "kept |",
        "|---|---|---|---|---|",
    ]
    for where in dict.fromkeys(map(_where, lines)):
        own = [line for line in lines if _where(line) == where]
        first = [abs(line["attempts"][0]["measured"] / line["constraint"] - 1) for line in own]
        last = [abs(_miss(line)) for line in own]
        kept = sum(miss <= TOLERANCE for miss in last)
        asked = ", ".join(f"{line['constraint']:g}" for line in own)
        rows.append(
            f"| {where} | {asked} | up to {max(first):.1%} | up to {max(last):.1%} | "
            f"{kept} of {len(own)} |"
        )
    return "\n".join(rows) + "\n"


def _miss(line: Line) -> float:
    return float(line["measured"] / line["constraint"] - 1)


def _where(line: Line) -> str:
    device = line["device_name"]
    if line["device"] == "cpu":
        device += f", {line['threads']} thread" + "s" * (line["threads"] > 1)
    return f"{line['model']}, {line['batch_size']} x {line['length']}, {line['dtype']}, {device}"


if __name__ == "__main__":
    sys.exit(main())
