"""Turn results/max_drop_*.jsonl into the table of sizes that `--max-drop` finds in README.md.

python scripts/max_drop_table.py            # write it
python scripts/max_drop_table.py --check    # write nothing; exit code 1 where it is stale

It goes between the lines `<!-- max-drop:begin -->` and `<!-- max-drop:end -->`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import one another

from scripts.summarise import keep_current, read, read_measurements, with_tables

BEGIN, END = "<!-- max-drop:begin -->", "<!-- max-drop:end -->"

Line = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process); 0 done, 1 stale, 2 user error."""
    return keep_current(argv, "max_drop_table", __doc__, _wanted)


def _wanted(results: Path, readme: Path) -> dict[Path, str]:
    lines = read_measurements(results, "max_drop", "measure_max_drop", lambda line: table([line]))
    return {readme: with_tables(read(readme), table(lines), readme, BEGIN, END)}


def table(lines: Sequence[Line]) -> str:
    """A row for every model and limit."""
    rows = [
        "| model, calibration examples | original | may lose | MACs kept | loses (standard error) "
        "| sizes tried | time of single runs |",
        "|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {_where(line)} | {line['original_score']:.1f} | {line['points']:g} | "
        f"{line['achieved']['mac']:.0%} | {line['drop']:.2f} ({line['standard_error']:.2f}) | "
        f"{line['probes']} | {line['seconds'] / line['single_seconds']:.1f} |"
        for line in sorted(lines, key=lambda line: (_where(line), line["points"]))
    ]
    return "\n".join(rows) + "\n"


def _where(line: Line) -> str:
    return f"{line['model']}, {line['requested_samples']:,}"


if __name__ == "__main__":
    sys.exit(main())
