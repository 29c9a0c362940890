"""Two searches on the same tables: how much importance they keep, and whether they keep the budget.

Exact allocation (`rfprune.stages.allocate`) against the latency search of Kwon et al. 2022, which
fits a constant and a line to each kind of table (`paper_search.py`), on the same errors: additive
importance (the Fisher information of single units), and error curves with correlations. Where the
paper's choice costs more by the table than it may, it is also shown with its budget lowered until
it fits. Nothing is timed: tables are read from files (scripts/profile_latency.py), or made up.

python scripts/compare_searches.py --model ... --task sst2 --latency-table TABLE.json \\
    --output results/searches_....json
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import one another

from rfprune.cli.exit_codes import NOTHING_WRITTEN, script
from rfprune.errors import UserError
from rfprune.tasks.registry import TASKS, get_task

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rfprune.cost.constraint import CostModel
    from rfprune.model.layout import Layout

    Errors = Sequence[NDArray[np.float64]]

SYNTHETIC = ("line", "overhead", "plateau", "steps")
RATIOS = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25)
_NEVER_LOWER = 100  # times that a budget is lowered


@script(NOTHING_WRITTEN)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process); 0 done, 2 user error."""
    options = _parser().parse_args(argv)
    if options.output.exists():
        raise UserError(f"--output {options.output} exists already: give a new file")
    result = compare(options)
    text = json.dumps(result, indent=1, allow_nan=False)
    # What a search keeps is on one line.
    text = re.sub(r"\[[\d,\s]+\]", lambda found: " ".join(found[0].split()), text)
    try:
        options.output.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{options.output} cannot be written: {error.strerror}") from error
    show(result)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="a folder, hub id, alias, or demo")
    add("--task", required=True, help=", ".join(TASKS))
    add("--data-dir", type=Path, help="local data, DIR/TASK/...; else the hub")
    add("--samples", type=int, default=256, help="to calibrate on (default: 256)")
    add("--seed", type=int, default=0)
    add(
        "--latency-table",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="measured tables of this model's shape; made-up ones are compared on as well",
    )
    add("--constraint", type=float, nargs="+", default=list(RATIOS), help="of the latency")
    add("--output", type=Path, required=True, metavar="FILE.json", help="a new file")
    return parser


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """The contents of the output file."""
    from rfprune.latency.table import LatencyTable, latency_costs
    from rfprune.report.report_json import versions

    task = get_task(options.task)
    tables = [(path, LatencyTable.load(path)) for path in options.latency_table]
    layout, errors, source, samples = _learn(options, task)
    measured = {
        path.stem: (latency_costs(table, layout), asdict(table.conditions))
        for path, table in tables
    }
    made_up = {name: (synthetic_costs(name, layout), None) for name in SYNTHETIC}
    return {
        "schema": 1,
        "model": source,
        "task": options.task,
        "samples": samples,
        "seed": options.seed,
        "versions": versions(),
        "tables": [
            {
                "table": name,
                "conditions": conditions,
                "lines": fitted(layout, costs),
                "rows": list(rows(layout, errors, costs, options.constraint)),
            }
            for name, (costs, conditions) in {**measured, **made_up}.items()
        ],
    }


def _learn(options: argparse.Namespace, task: Any) -> tuple[Layout, dict[str, Errors], str, int]:
    """The errors of keeping n units, of both kinds: additive importance, and curves."""
    import torch

    from rfprune.checkpoints.loading import load, resolve_data_dir, resolve_max_length
    from rfprune.methods.problem import prepare_problem
    from rfprune.methods.statistics import collect_statistics
    from rfprune.settings import Settings
    from rfprune.stages.search import additive_errors
    from rfprune.tasks.calibration import calibration_batches

    loaded = load(options.model, task, device=torch.device("cpu"), dtype=torch.float32)
    batches = calibration_batches(
        task,
        loaded.tokenizer,
        resolve_data_dir(options.model, options.data_dir),
        num_samples=options.samples,
        batch_size=32,
        max_length=resolve_max_length(loaded, task, None),
        seed=options.seed,
        with_labels=False,
    )
    problem = prepare_problem(loaded.model, batches, Settings(round_to=None, seed=options.seed))
    layout = problem.layout
    criterion = replace(problem, settings=Settings(method="importance", seed=options.seed))
    fisher, curvature = collect_statistics(criterion), collect_statistics(problem)
    assert fisher.importance is not None
    assert curvature.curves is not None
    errors: dict[str, Errors] = {
        "importance": additive_errors(fisher.importance),
        "curves": [curve.errors.numpy() for curve in curvature.curves],
    }
    samples = sum(len(batch["input_ids"]) for batch in batches)
    return layout, errors, Path(loaded.source).name, samples


def synthetic_costs(name: str, layout: Layout, seed: int = 0) -> CostModel:
    """A made-up latency table in milliseconds, of which a full sublayer takes 1 and the rest 1.

    "line": no overhead at all. "overhead": a quarter is paid for the first unit, and 2% noise.
    "plateau": nothing is saved above the first half, as on a device that is not full. "steps":
    tiles of an eighth of all units.
    """
    import numpy as np

    from rfprune.cost.constraint import CostModel

    generator = np.random.default_rng(seed)
    tables = []
    for block in layout.blocks:
        part = np.arange(block.num_units + 1) / block.num_units
        noise = 1 + 0.02 * generator.standard_normal(len(part))
        table = {
            "line": part,
            "overhead": (0.25 + 0.75 * part) * noise,
            "plateau": np.maximum(0.5, part),
            "steps": 0.1 + 0.9 * np.ceil(8 * part - 1e-9) / 8,
        }[name]
        table[0] = 0.0
        tables.append(table)
    return CostModel("latency", tuple(tables), constant=1.0)


def fitted(layout: Layout, costs: CostModel) -> dict[str, dict[str, float]]:
    """The paper's constant and line by kind, from the first block of each, with their misfit.

    `misfit` is the largest error of the line, as a fraction of what the full sublayer takes.
    """
    import numpy as np

    from scripts.paper_search import fit_line

    lines = {}
    for block, table in zip(layout.blocks, costs.tables, strict=True):
        if f"{block.kind}s" not in lines:
            line = fit_line(table)
            units = np.flatnonzero(np.isfinite(table))
            miss = np.abs(line.cost(units) + table[0] - table[units]).max() / table[-1]
            lines[f"{block.kind}s"] = asdict(line) | {"misfit": float(miss)}
    return lines


def rows(
    layout: Layout, errors: Mapping[str, Errors], costs: CostModel, ratios: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """By objective and constraint, what each search keeps, and what that costs by the table."""
    from rfprune.cost.constraint import Constraint
    from rfprune.stages.allocate import allocate
    from scripts.paper_search import paper_search

    kinds = [block.kind for block in layout.blocks]
    for objective, curves in errors.items():
        for ratio in ratios:
            row: dict[str, Any] = {"objective": objective, "constraint": ratio}
            try:
                budget = costs.budget(Constraint("latency", ratio))
                exact = allocate(curves, costs, budget)
            except UserError as error:
                yield row | {"refused": str(error)}
                continue
            paper = paper_search(kinds, curves, costs, budget)
            yield row | {
                "exact": outcome(curves, costs, ratio, exact),
                "paper": outcome(curves, costs, ratio, paper),
                "paper_lowered": outcome(
                    curves, costs, ratio, within_budget(kinds, curves, costs, budget)
                ),
            }


def within_budget(
    kinds: Sequence[str], errors: Errors, costs: CostModel, budget: float
) -> tuple[int, ...] | None:
    """The paper's choice, its budget lowered by what the choice costs too much until it fits."""
    from scripts.paper_search import paper_search

    lowered = budget
    for _ in range(_NEVER_LOWER):
        kept = paper_search(kinds, errors, costs, lowered)
        if kept is None:
            return None
        excess = costs.total(kept) - costs.constant - budget
        if excess <= 1e-9 * abs(budget):
            return kept
        lowered -= max(excess, 1e-3 * abs(budget))
    return None


def outcome(
    errors: Errors, costs: CostModel, ratio: float, kept: Sequence[int] | None
) -> dict[str, Any] | None:
    """What a choice is: fractions of all importance and of the budget; None where there is none.

    `importance_kept` is 1 - error / error of keeping nothing; `budget_used` counts the constant.
    """
    if kept is None:
        return None
    error = sum(float(own[n]) for own, n in zip(errors, kept, strict=True))
    nothing = sum(float(own[0]) for own in errors)
    return {
        "kept": list(kept),
        "error": error,
        "importance_kept": 1 - error / nothing,
        "budget_used": costs.total(kept) / (ratio * costs.original),
    }


def show(result: Mapping[str, Any]) -> None:
    """The rows as a table on screen."""
    from rich.console import Console
    from rich.table import Table

    title = f"{result['model']} on {result['task']}: importance kept (budget used)"
    columns = ("latency table", "objective", "constraint", "exact", "paper", "paper, lowered")
    table = Table(*columns, title=title)
    for entry in result["tables"]:
        for row in entry["rows"]:
            searches = ("exact", "paper", "paper_lowered")
            cells = [_cell(row.get(search)) for search in searches]
            if "refused" in row:
                cells = ["refused", "", ""]
            table.add_row(entry["table"], row["objective"], f"{row['constraint']:g}", *cells)
    Console(highlight=False, width=None if sys.stdout.isatty() else 100).print(table)


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "nothing fits"
    return f"{found['importance_kept']:.2%} ({found['budget_used']:.1%})"


if __name__ == "__main__":
    sys.exit(main())
