"""What a run leaves beside the pruned model for people: page, plots and model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rfprune.report.card import write_card
from rfprune.report.html import write_run_page, write_runs_page

Report = Mapping[str, Any]


def write_for_people(report: Report, folder: Path, repository: str | None = None) -> None:
    """Write report.html, plots/*.png and README.md, all of them from the report alone.

    Args:
        repository: of the hub, that the folder will be pushed to.
    """
    write_run_page(report, folder)
    write_card(report, folder, repository)


def write_family(reports: Sequence[Report]) -> Path | None:
    """Write a page of runs that share all but the constraint to the folder that holds them.

    Gives its path; None where there is no family to show.
    """
    if len(reports) < 2:
        return None
    first = reports[0]
    folders = [Path(report["output_dir"]) for report in reports]
    # outputs/MODEL/TASK/METRIC-RATIO/seed-N, or DIR/METRIC-RATIO where a folder was given
    depth = 1 if folders[0].name.startswith("seed-") else 0
    parent = folders[0].parents[depth]
    name = f"family-{first['metric']}-seed-{first['seed']}.html"
    heading = f"{first['model']} on {first['task']}: {len(reports)} sizes"
    runs = [(f"{100 * report['constraint']:.6g}%", report) for report in reports]
    write_runs_page(runs, parent / name, heading, folders=folders)
    return parent / name
