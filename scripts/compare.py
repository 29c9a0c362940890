"""Compare several runs on one HTML page: scores, costs and kept units, from their report.json.

python scripts/compare.py outputs/bert/mrpc/mac-0.*/seed-0 --output compare.html
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rfprune.cli.exit_codes import script
from rfprune.errors import UserError
from rfprune.report.output_folder import REPORT_FILE
from rfprune.report.page import write_runs_page
from rfprune.report.report_json import read_report

DEFAULT = Path("compare.html")


@script("no page was written.")
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    options = _parser().parse_args(argv)
    folders = list(dict.fromkeys(options.folders))
    reports = [_read(folder) for folder in folders]
    _check_output(options.output, overwrite=options.overwrite)
    runs = list(zip(short_names(folders), reports, strict=True))
    try:
        write_runs_page(runs, options.output, f"{len(runs)} runs compared", folders=folders)
    except OSError as error:
        raise UserError(f"{options.output} cannot be written: {error.strerror}.") from error
    print(f"Wrote {options.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="FOLDER", help="output folders of runs"
    )
    parser.add_argument(
        "--output", type=Path, default=DEFAULT, metavar="FILE.html", help=f"default: {DEFAULT}"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier page")
    return parser


def _read(folder: Path) -> dict[str, Any]:
    """The report of a run.

    Raises:
        UserError: the folder has none, or it is damaged or of another version.
    """
    try:
        report = read_report(folder)
        _ = report["pruned"]["score"], report["seconds"]["prune_total"], report["command"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"'{folder}' has no {REPORT_FILE}: give output folders of runs.") from error
    except OSError as error:
        raise UserError(f"'{folder / REPORT_FILE}' cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"'{folder / REPORT_FILE}' is damaged or not of this version of rfprune "
            f"({type(error).__name__}: {error}): make the run again."
        ) from error
    return report


def short_names(folders: Sequence[Path]) -> list[str]:
    """Short names of the folders: their paths without the parts that all have in common."""
    parts = [folder.resolve().parts for folder in folders]
    if len(parts) == 1:
        return [folders[0].resolve().name]
    start, end = _shared(parts), _shared([path[::-1] for path in parts])
    return ["/".join(path[start : len(path) - end]) or path[-1] for path in parts]


def _shared(paths: Sequence[Sequence[str]]) -> int:
    """How many parts all paths begin with."""
    return next(
        (index for index, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1),
        min(len(path) for path in paths) - 1,
    )


def _check_output(path: Path, *, overwrite: bool) -> None:
    if path.is_dir():
        raise UserError(f"--output {path} is a folder: give the name of a file.")
    if path.exists() and not overwrite:
        raise UserError(
            f"{path} already exists: give another with --output, or replace it with --overwrite."
        )
    if not path.absolute().parent.is_dir():
        raise UserError(
            f"--output {path}: the folder {path.absolute().parent} does not exist; create it."
        )


if __name__ == "__main__":
    sys.exit(main())
