"""Put the published numbers of peers (scripts/peers.csv) beside ours in README.md.

python scripts/peers_table.py            # write the table
python scripts/peers_table.py --check    # write nothing; exit code 1 where it is stale

It goes between the lines `<!-- peers:begin -->` and `<!-- peers:end -->`. Ours are the means in
results/quality_*.jsonl. Checkpoints differ, which the table says.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import one another

from rfprune.tasks.registry import TASKS
from scripts.summarise import Cell, cells_of, keep_current, read, read_results, with_tables

BEGIN, END = "<!-- peers:begin -->", "<!-- peers:end -->"
PEERS = Path(__file__).with_name("peers.csv")
CONSTRAINTS = ("0.7", "0.6", "0.5", "0.4", "0.3", "0.2")
OURS = {"curvature": "rfprune, curvature", "kwon-scheduled": "rfprune, kwon as published"}

Row = Mapping[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process); 0 done, 1 stale, 2 user error."""
    return keep_current(argv, "peers_table", __doc__, _wanted)


def _wanted(results: Path, readme: Path) -> dict[Path, str]:
    rows = [*csv.DictReader(read(PEERS).splitlines()), *ours(read_results(results))]
    return {readme: with_tables(read(readme), table(rows), readme, BEGIN, END)}


def ours(lines: Sequence[Mapping[str, object]]) -> Iterator[Row]:
    """A row for each of our checkpoints and methods, MACs alone, means over the seeds.

    Of tasks that the peers have published numbers of.
    """
    chosen = [
        line
        for line in lines
        if line["metric"] == "mac" and line["variant"] in OURS and line["task"] in TASKS
    ]
    rows: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells_of(chosen):
        rows.setdefault(cell.row, []).append(cell)
    for cells in rows.values():
        line = cells[0].lines[0]
        scores = {f"{cell.constraint:g}": f"{cell.mean('score'):.1f}" for cell in cells}
        yield {
            "task": str(line["task"]),
            "method": OURS[str(line["variant"])],
            "model": str(line["model"]),
            "source": "measured here",
            "dense": f"{cells[0].mean('original_score'):.1f}",
            **scores,
        }


def table(rows: Sequence[Row]) -> str:
    """Markdown: the tasks in the registry's order, peers first."""
    text = [
        f"| task | method | model | original | {' | '.join(CONSTRAINTS)} | numbers |",
        f"|---|---|---|---|{'---|' * len(CONSTRAINTS)}---|",
    ]
    for row in sorted(rows, key=lambda row: list(TASKS).index(row["task"])):
        scores = " | ".join(row.get(constraint, "") for constraint in CONSTRAINTS)
        names = f"{row['task']} | {row['method']} | {row['model']} | {row['dense']}"
        text.append(f"| {names} | {scores} | {row['source']} |")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    sys.exit(main())
