"""What a run leaves beside the pruned model for people: page, plots and model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rfprune.errors import UserError
from rfprune.report.card import write_card
from rfprune.report.html import write_run_page, write_runs_page
from rfprune.report.report_json import read_report

Report = Mapping[str, Any]


def write_for_people(report: Report, folder: Path, repository: str | None = None) -> None:
    """Write report.html, plots/*.png and README.md, all of them from the report alone.

    Args:
        repository: of the hub, that the folder will be pushed to.
    """
    write_run_page(report, folder)
    write_card(report, folder, repository)


def write_family(folders: Sequence[Path]) -> Path | None:
    """Write a page of runs that share all but the constraint to the folder that holds them.

    Gives its path; None where there is no family to show.

    Raises:
        UserError: it cannot be written.
    """
    if len(folders) < 2:
        return None
    reports = [read_report(folder) for folder in folders]
    first = reports[0]
    # outputs/MODEL/TASK/METRIC-RATIO/seed-N, or DIR/METRIC-RATIO where a folder was given
    depth = 1 if folders[0].name.startswith("seed-") else 0
    path = folders[0].parents[depth] / f"family-{first['metric']}-seed-{first['seed']}.html"
    heading = f"{first['model']} on {first['task']}: {len(reports)} sizes"
    runs = [(f"{100 * report['constraint']:.6g}%", report) for report in reports]
    try:
        write_runs_page(runs, path, heading, folders=folders)
    except OSError as error:
        raise UserError(
            f"The pruned models are complete, but the page '{path}' cannot be written "
            f"({error.strerror}): make room, then make one with scripts/compare.py."
        ) from error
    return path
