"""Turn results/study_*.jsonl (what scripts/sweep.py --output wrote) into results/studies.md.

python scripts/studies_table.py            # write it
python scripts/studies_table.py --check    # write nothing; exit code 1 where it is stale

A study varies the number of calibration examples, or the variant; a table for each file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import one another

from rfprune.errors import UserError
from scripts.summarise import Cell, cells_of, entry, keep_current, read


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process); 0 done, 1 stale, 2 user error."""
    return keep_current(argv, "studies_table", __doc__, _wanted)


def _wanted(results: Path, _: Path) -> dict[Path, str]:
    paths = sorted(results.glob("study_*.jsonl"))
    if not paths:
        raise UserError(f"{results} holds no study_*.jsonl: run scripts/sweep.py.")
    return {results / "studies.md": "\n".join(table(path) for path in paths)}


def table(path: Path) -> str:
    """Markdown: a row for each number of examples and variant, a column for each constraint.

    Raises:
        UserError: a line is not a measurement.
    """
    try:
        lines: list[Mapping[str, Any]] = [json.loads(text) for text in read(path).splitlines()]
        cells = cells_of(lines)
        first = lines[0]
        rows: dict[tuple[int, str], dict[float, Cell]] = {}
        for cell in cells:
            line = cell.lines[0]
            row = rows.setdefault((line["requested_samples"], line["variant"]), {})
            row[cell.constraint] = cell
        title = f"**{first['model']}, {first['task']}** (original: {first['original_score']:.1f})"
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{path} holds something else than measurements of scripts/sweep.py "
            f"({type(error).__name__}: {error}): take it away."
        ) from error
    constraints = sorted({cell.constraint for cell in cells}, reverse=True)
    text = [
        f"{title}: score / divergence, as in the README.",
        "",
        f"| examples | variant | {' | '.join(f'{c:g}' for c in constraints)} | seconds |",
        f"|---|---|{'---|' * len(constraints)}---|",
    ]
    for (samples, variant), by_constraint in sorted(rows.items()):
        shown = " | ".join(entry(by_constraint.get(constraint)) for constraint in constraints)
        seconds = max(cell.mean("seconds", "prune_total") for cell in by_constraint.values())
        text.append(f"| {samples} | {variant} | {shown} | {seconds:.0f} |")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    sys.exit(main())
