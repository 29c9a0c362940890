"""Turn results/ablation_*.jsonl into results/ablation.md and the small table in README.md.

python scripts/ablation_table.py            # write both
python scripts/ablation_table.py --check    # write nothing; exit code 1 where one is stale

The small table goes between the lines `<!-- ablation:begin -->` and `<!-- ablation:end -->`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import one another

from rfprune.settings import ALLOCATIONS, CRITERIA, METHODS
from scripts.summarise import (
    Cell,
    caption,
    cells_of,
    entry,
    keep_current,
    read,
    read_measurements,
    with_tables,
)

BEGIN, END = "<!-- ablation:begin -->", "<!-- ablation:end -->"
SELECT = "-select"
"""Ends the name of a variant that fits nothing after it has pruned."""

Place = tuple[Any, ...]
Pair = dict[bool, Cell]
"""One variant at one constraint: refitted (True) and not (False)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process); 0 done, 1 stale, 2 user error."""
    return keep_current(argv, "ablation_table", __doc__, _wanted)


def _wanted(results: Path, readme: Path) -> dict[Path, str]:
    cells = cells_of(
        read_measurements(results, "ablation", "ablate", lambda line: full_table(cells_of([line])))
    )
    return {
        results / "ablation.md": full_table(cells),
        readme: with_tables(read(readme), small_table(cells), readme, BEGIN, END),
    }


def full_table(cells: Sequence[Cell]) -> str:
    """Markdown: for every model and task a table of score and divergence."""
    return "\n".join(_table(part) for part in _by_place(cells).values())


def small_table(cells: Sequence[Cell]) -> str:
    """Markdown: one table of the scores at every constraint, pruned alone, then refitted."""
    columns = [
        (place, constraint)
        for place, part in _by_place(cells).items()
        for constraint in sorted({cell.constraint for cell in part}, reverse=True)
    ]
    heads = [_head(_by_place(cells)[place], constraint) for place, constraint in columns]
    text = [
        f"| importance | allocation | rounds | {' | '.join(heads)} |",
        f"|---|---|---|{'---|' * len(heads)}",
    ]
    for names, pairs in _rows(cells).items():
        shown = [_arrow(pairs.get(column, {})) for column in columns]
        text.append(f"| {' | '.join(names)} | {' | '.join(shown)} |")
    return "\n".join(text) + "\n"


def _table(cells: Sequence[Cell]) -> str:
    """One model and task."""
    constraints = sorted({cell.constraint for cell in cells}, reverse=True)
    line, place = cells[0].lines[0], _place(cells[0])
    heads = [f"{c:g} pruned | {c:g} refitted" for c in constraints]
    text = [
        f"**{line['model']}, {line['task']}** ({line['metric_name']} of the original: "
        f"{line['original_score']:.1f}, {line['evaluated_examples']} examples). {caption(cells)}",
        "",
        f"| importance | allocation | rounds | {' | '.join(heads)} |",
        f"|---|---|---|{'---|' * 2 * len(heads)}",
    ]
    for names, pairs in _rows(cells).items():
        shown = [
            entry(pairs.get((place, constraint), {}).get(refitted))
            for constraint in constraints
            for refitted in (False, True)
        ]
        text.append(f"| {' | '.join(names)} | {' | '.join(shown)} |")
    return "\n".join(text) + "\n"


def _by_place(cells: Sequence[Cell]) -> dict[Place, list[Cell]]:
    found: dict[Place, list[Cell]] = {}
    for cell in cells:
        found.setdefault(_place(cell), []).append(cell)
    return found


def _place(cell: Cell) -> Place:
    """Everything but variant, constraint and seed: cells that agree in it compare."""
    return cell.row[:-1]


def _rows(cells: Sequence[Cell]) -> dict[tuple[str, str, str], dict[tuple[Place, float], Pair]]:
    """By the first three columns, what was measured at each place and constraint."""
    rows: dict[tuple[str, str, str], dict[tuple[Place, float], Pair]] = {}
    for cell in sorted(cells, key=lambda cell: _order(cell.lines[0]["settings"])):
        settings = cell.lines[0]["settings"]
        pairs = rows.setdefault(_names(settings), {})
        pairs.setdefault((_place(cell), cell.constraint), {})[settings["tune"]] = cell
    return rows


def _names(settings: Mapping[str, Any]) -> tuple[str, str, str]:
    rounds = str(settings["rounds"])
    if settings["method"] == "importance":
        return settings["importance"], settings["allocation"], rounds
    return f"`--method {settings['method']}`", "", rounds


def _order(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """The classical criteria first, whatever was measured first."""
    return (
        -METHODS.index(settings["method"]),
        CRITERIA.index(settings["importance"]),
        ALLOCATIONS.index(settings["allocation"]),
        settings["rounds"],
    )


def _head(cells: Sequence[Cell], constraint: float) -> str:
    line = cells[0].lines[0]
    return f"{line['task']} [{line['original_score']:.1f}] at {constraint:g}"


def _arrow(pair: Pair) -> str:
    """The scores without and with the fit; nothing where neither was measured."""
    shown = [f"{pair[key].mean('score'):.1f}" if key in pair else "–" for key in (False, True)]
    return " → ".join(shown) if pair else ""


if __name__ == "__main__":
    sys.exit(main())
