"""Turn results/quality_*.jsonl into results/summary.csv and the table in README.md.

python scripts/summarise.py            # write both
python scripts/summarise.py --check    # write nothing; exit code 1 where one is stale

The table goes between the lines `<!-- results:begin -->` and `<!-- results:end -->`.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rfprune.errors import UserError
from rfprune.tasks.registry import TASKS

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
TABLE = ("metric", "requested_samples", "batch_size", "max_length", "dtype")
"""One table in README.md for each combination of these."""
ROW = (*TABLE, "model", "task", "eval_limit", "variant")
"""One row of a table for each combination of these."""
COSTS = {"mac": "MACs", "params": "parameters", "memory": "memory", "latency": "latency"}

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """The measurements that differ in nothing but the seed."""

    row: tuple[Any, ...]
    constraint: float
    lines: tuple[Line, ...]

    def mean(self, *path: str) -> float:
        """The mean over the seeds of a number in the lines."""
        return fmean(self._values(path))

    def least(self, *path: str) -> float:
        """The lowest over the seeds."""
        return min(self._values(path))

    def most(self, *path: str) -> float:
        """The highest over the seeds."""
        return max(self._values(path))

    def _values(self, path: Sequence[str]) -> list[float]:
        values: list[Any] = list(self.lines)
        for name in path:
            values = [value[name] for value in values]
        return [float(value) for value in values]


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process); 0 done, 1 stale, 2 user error."""
    return keep_current(argv, "summarise", __doc__, _wanted)


def _wanted(results: Path, readme: Path) -> dict[Path, str]:
    cells = cells_of(read_results(results))
    return {
        results / "summary.csv": summary(cells),
        readme: with_tables(read(readme), tables(cells), readme),
    }


def keep_current(
    argv: Sequence[str] | None,
    script: str,
    description: str | None,
    wanted: Callable[[Path, Path], Mapping[Path, str]],
) -> int:
    """The main function of a script that writes tables: 0 done, 1 stale, 2 user error.

    Args:
        wanted: from the folder of the results and README.md, what each file should hold.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--check", action="store_true", help="only say what is stale")
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    options = parser.parse_args(argv)
    try:
        texts = wanted(options.results, options.readme)
        stale = [path for path, text in texts.items() if not holds(path, text)]
        for path in stale:
            if options.check:
                sys.stderr.write(f"{script}: {path} is stale: run scripts/{script}.py\n")
            else:
                write(path, texts[path])
                sys.stderr.write(f"{script}: wrote {path}\n")
    except UserError as error:
        sys.stderr.write(f"{script}: error: {error}\n")
        return 2
    return 1 if options.check and stale else 0


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All lines of the folder's quality_*.jsonl; see `read_measurements`."""
    return read_measurements(folder, "quality", "sweep", lambda line: summary(cells_of([line])))


def read_measurements(
    folder: Path, kind: str, script: str, use: Callable[[dict[str, Any]], object]
) -> list[dict[str, Any]]:
    """All lines of the folder's KIND_*.jsonl, files in the order of their names.

    Args:
        use: what a line must be good for; ValueError, KeyError or TypeError say that it is not.

    Raises:
        UserError: there are none, or a line is not what scripts/SCRIPT.py writes.
    """
    lines = []
    for path in sorted(folder.glob(f"{kind}_*.jsonl")):
        for number, text in enumerate(read(path).splitlines(), start=1):
            try:
                line = json.loads(text)
                use(line)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}, line {number} is not a measurement of scripts/{script}.py "
                    f"({type(error).__name__}: {error}): take the line out and measure again."
                ) from error
            lines.append(line)
    if not lines:
        raise UserError(f"{folder} holds no {kind}_*.jsonl: run scripts/{script}.py first.")
    return lines


def cells_of(lines: Iterable[Line]) -> list[Cell]:
    """Measurements put together over the seeds.

    Tasks come in the registry's order, variants as they were first measured, constraints falling.

    Raises:
        UserError: a measurement is there twice.
    """
    found: dict[tuple[tuple[Any, ...], float], dict[int, Line]] = {}
    for line in lines:
        place = tuple(line[name] for name in ROW), float(line["constraint"])
        seeds = found.setdefault(place, {})
        if line["seed"] in seeds:
            raise UserError(
                f"{line['model']} {line['variant']} {line['constraint']} seed {line['seed']} is "
                f"there twice: take one of the two lines out of results."
            )
        seeds[line["seed"]] = line
    cells = [
        Cell(row, constraint, tuple(seeds.values())) for (row, constraint), seeds in found.items()
    ]
    variants = list(dict.fromkeys(cell.row[-1] for cell in cells))
    return sorted(cells, key=lambda cell: _order(cell, variants))


def _order(cell: Cell, variants: Sequence[str]) -> tuple[Any, ...]:
    line = cell.lines[0]
    tasks = [*TASKS, line["task"]]
    table = [("" if value is None else value) for value in cell.row[: len(TABLE)]]
    return (
        *(str(value).rjust(12) for value in table),
        tasks.index(line["task"]),
        line["task"],
        line["model"],
        line["eval_limit"] or 0,
        variants.index(line["variant"]),
        -cell.constraint,
    )


def summary(cells: Sequence[Cell]) -> str:
    """summary.csv: a line a cell, scores in points of 100, seconds of pruning."""
    file = io.StringIO()
    rows = [_summary_row(cell) for cell in cells]
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _summary_row(cell: Cell) -> dict[str, Any]:
    line = cell.lines[0]
    names = (*ROW, "constraint", "metric_name")
    numbers = {
        "original_score": cell.mean("original_score"),
        "score_mean": cell.mean("score"),
        "score_min": cell.least("score"),
        "score_max": cell.most("score"),
        "divergence_mean": cell.mean("divergence"),
        "divergence_min": cell.least("divergence"),
        "divergence_max": cell.most("divergence"),
        "mac_kept": cell.mean("achieved", "mac"),
        "params_kept": cell.mean("achieved", "params"),
        "prune_seconds": cell.mean("seconds", "prune_total"),
    }
    return {
        **{name: line[name] for name in names},
        "evaluated_examples": line["evaluated_examples"],
        "seeds": len(cell.lines),
        **{name: f"{number:.4f}" for name, number in numbers.items()},
    }


def tables(cells: Sequence[Cell]) -> str:
    """The Markdown between the markers: tables, one for each combination of conditions."""
    by_table: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        by_table.setdefault(cell.row[: len(TABLE)], []).append(cell)
    return "\n".join(_table(part) for part in by_table.values())


def _table(cells: Sequence[Cell]) -> str:
    constraints = sorted({cell.constraint for cell in cells}, reverse=True)
    cost = COSTS.get(cells[0].lines[0]["metric"], cells[0].lines[0]["metric"])
    heads = [f"{constraint:.4g} of {cost}" for constraint in constraints]
    text = [
        caption(cells),
        "",
        f"| model | task [original] | variant | {' | '.join(heads)} |",
        f"|---|---|---|{'---|' * len(heads)}",
    ]
    rows: dict[tuple[Any, ...], dict[float, Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.row, {})[cell.constraint] = cell
    above = ("", "")
    for row, by_constraint in rows.items():
        names = _names(next(iter(by_constraint.values())), cells)
        shown = ("", "") if names == above else names
        above = names
        entries = [entry(by_constraint.get(constraint)) for constraint in constraints]
        text.append(f"| {shown[0]} | {shown[1]} | {row[-1]} | {' | '.join(entries)} |")
    return "\n".join(text) + "\n"


def _names(cell: Cell, cells: Sequence[Cell]) -> tuple[str, str]:
    """The first two columns; the original's score is that of all cells of model and task."""
    head = cell.row[:-1]
    original = fmean(other.mean("original_score") for other in cells if other.row[:-1] == head)
    line = cell.lines[0]
    scored = f"{line['metric_name']}, {line['evaluated_examples']} examples"
    return line["model"], f"{line['task']} [{original:.1f}] ({scored})"


def entry(cell: Cell | None) -> str:
    """Score and divergence at one constraint."""
    if cell is None:
        return ""
    spread = f" ({cell.least('score'):.1f}..{cell.most('score'):.1f})"
    return (
        f"{cell.mean('score'):.1f}{spread if len(cell.lines) > 1 else ''}"
        f" / {cell.mean('divergence'):.3f}"
    )


def caption(cells: Sequence[Cell]) -> str:
    """What the numbers of a table are, and under which conditions they hold."""
    line = cells[0].lines[0]
    counts = sorted({len(cell.lines) for cell in cells})
    seeds = f"{counts[0]} seed{'s' if counts[0] > 1 else ''}"
    if len(counts) > 1:
        seeds = f"{counts[0]} to {counts[-1]} seeds"
    length = "" if line["max_length"] is None else f", at most {line['max_length']} tokens"
    return (
        f"Score in points (lowest..highest where there are several seeds) / divergence from the "
        f"original's predictions (KL in nats; for a regression half the mean squared difference). "
        f"Means over {seeds}; {line['requested_samples']} calibration examples in batches of "
        f"{line['batch_size']}{length}, {line['dtype']}."
    )


def with_tables(
    readme: str, markdown: str, path: Path, begin_line: str = BEGIN, end_line: str = END
) -> str:
    """The README with what stands between the markers replaced.

    Raises:
        UserError: the markers are not there once each, in their order.
    """
    before, begin, rest = readme.partition(begin_line)
    _, end, after = rest.partition(end_line)
    if not (begin and end) or begin in rest or end in before + after:
        raise UserError(
            f"{path} needs the lines {begin_line} and {end_line}, once each, in this order."
        )
    return f"{before}{begin}\n\n{markdown}\n{end}{after}"


def read(path: Path) -> str:
    """The text of a file.

    Raises:
        UserError: it is not there or not readable as UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"{path} cannot be read: {reason}.") from error


def holds(path: Path, text: str) -> bool:
    """Whether a file is there and holds this text."""
    return path.exists() and read(path) == text


def write(path: Path, text: str) -> None:
    """Put text into a file.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error


if __name__ == "__main__":
    sys.exit(main())
