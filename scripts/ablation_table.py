"""Turn results/ablation_*.jsonl into results/ablation.md and the small table in README.md.

python scripts/ablation_table.py            # write both
python scripts/ablation_table.py --check    # write nothing; exit code 1 where one is stale

The small table goes between the lines `<!-- ablation:begin -->` and `<!-- ablation:end -->`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import one another

from rfprune.command_line import ALLOCATIONS, CRITERIA, METHODS
from rfprune.errors import UserError
from scripts.summarise import ROOT, Cell, caption, cells_of, entry, holds, read, with_tables, write

BEGIN, END = "<!-- ablation:begin -->", "<!-- ablation:end -->"
SELECT = "-select"
"""Ends the name of a variant that fits nothing after it has pruned."""

Place = tuple[Any, ...]
Pair = dict[bool, Cell]
"""One variant at one constraint: refitted (True) and not (False)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process); 0 done, 1 stale, 2 user error."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--check", action="store_true", help="only say whether they are stale")
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    options = parser.parse_args(argv)
    try:
        cells = cells_of(read_results(options.results))
        readme = with_tables(read(options.readme), small_table(cells), options.readme, BEGIN, END)
        wanted = {options.results / "ablation.md": full_table(cells), options.readme: readme}
        stale = [path for path, text in wanted.items() if not holds(path, text)]
        for path in stale:
            if options.check:
                sys.stderr.write(f"ablation_table: {path} is stale: run ablation_table.py\n")
            else:
                write(path, wanted[path])
                sys.stderr.write(f"ablation_table: wrote {path}\n")
    except UserError as error:
        sys.stderr.write(f"ablation_table: error: {error}\n")
        return 2
    return 1 if options.check and stale else 0


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All lines of the folder's ablation_*.jsonl, files in the order of their names.

    Raises:
        UserError: there are none, or a line is not what scripts/ablate.py writes.
    """
    lines = []
    for path in sorted(folder.glob("ablation_*.jsonl")):
        for number, text in enumerate(read(path).splitlines(), start=1):
            try:
                line = json.loads(text)
                full_table(cells_of([line]))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}, line {number} is not a measurement of scripts/ablate.py "
                    f"({type(error).__name__}: {error}): take the line out and measure again."
                ) from error
            lines.append(line)
    if not lines:
        raise UserError(f"{folder} holds no ablation_*.jsonl: run scripts/ablate.py first.")
    return lines


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
