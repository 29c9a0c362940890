"""Turn results/scale_*.jsonl into the table of sizes in README.md.

python scripts/scale_table.py            # write it
python scripts/scale_table.py --check    # write nothing; exit code 1 where it is stale

It goes between the lines `<!-- scale:begin -->` and `<!-- scale:end -->`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import one another

from scripts.summarise import keep_current, read, read_measurements, with_tables

BEGIN, END = "<!-- scale:begin -->", "<!-- scale:end -->"
STAGES = ("collect", "search", "compact", "tune")

Line = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process); 0 done, 1 stale, 2 user error."""
    return keep_current(argv, "scale_table", __doc__, _wanted)


def _wanted(results: Path, readme: Path) -> dict[Path, str]:
    lines = read_measurements(results, "scale", "benchmark_scale", lambda line: table([line]))
    return {readme: with_tables(read(readme), table(lines), readme, BEGIN, END)}


def table(lines: Sequence[Line]) -> str:
    """A row for every size and machine: of each stage the seconds and the most gigabytes in use."""
    rows = [
        f"| machine, tokens | parameters | weights | {' | '.join(STAGES)} | in all | peak |",
        "|" + "---|" * (5 + len(STAGES)),
    ]
    for line in lines:
        stages = " | ".join(
            f"{line['seconds'][stage]:,.0f} s, {line['peak_bytes'][stage] / 1e9:.1f} GB"
            for stage in STAGES
        )
        peak = max(line["peak_bytes"].values())
        rows.append(
            f"| {_where(line)} | {line['params'] / 1e6:,.0f} M | "
            f"{line['weight_bytes'] / 1e9:.2f} GB | {stages} | {line['seconds']['wall']:,.0f} s | "
            f"{peak / 1e9:.1f} GB, {peak / line['weight_bytes']:.1f} x weights |"
        )
    return "\n".join(rows) + "\n"


def _where(line: Line) -> str:
    """The machine, and how much the model was calibrated on."""
    threads = f", {line['threads']} thread" + "s" * (line["threads"] > 1)
    device = line["device_name"] + threads * (line["device"] == "cpu")
    return f"{device}, {line['dtype']}, {line['samples']} x {line['length']}"


if __name__ == "__main__":
    sys.exit(main())
