"""The size that `--max-drop` finds, and the seconds of its search beside those of a single run.

python -m scripts.bench.max_drop --model CHECKPOINT --task sst2 --data-dir data --points 0.5 1 2

Nothing is taken from a cache. A single run is: scoring the original, collecting, one size and its
score. Both times are of the same process.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.settings import POINTS
from scripts.bench import harness
from scripts.bench.harness import Conditions, NotMeasured


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 1 a run was refused, 2 user
    error, 130 interrupted."""
    names = "model task data-dir metric seed samples batch-size eval-limit"
    parser = harness.parser_of(__doc__, names)
    parser.add_argument(
        "--points",
        nargs="+",
        type=harness.number("--points", POINTS),
        default=[0.5, 1.0, 2.0],
        help="points of the score that may be lost (default: 0.5 1 2)",
    )
    options = parser.parse_args(argv)
    shared = harness.conditions_of(options, ("model", "task", "metric", "seed", "eval_limit"))
    shared["requested_samples"] = options.samples
    output = options.output or harness.default_output(
        "max_drop",
        shared["model"],
        options.task,
        options.metric,
        f"{options.samples}samples",
        options.eval_limit and f"{options.eval_limit}evaluated",
    )

    def measure(group: Sequence[Conditions]) -> Iterator[dict[str, Any]]:
        for conditions in group:
            yield conditions | line_of(_search(options, conditions["points"]))

    wanted = [shared | one for one in harness.each_combination(points=options.points)]
    return harness.complete(__file__, output, wanted, measure, group_by=("points",))


def _search(options: argparse.Namespace, points: float) -> dict[str, Any]:
    """The report of a run with this limit.

    Raises:
        NotMeasured: the run was refused; it has printed why.
    """
    from rfprune.main import main as rfprune
    from rfprune.report.report_json import read_report

    names = ("model", "task", "data_dir", "metric", "seed", "samples", "batch_size", "eval_limit")
    flags = {name: getattr(options, name) for name in names}
    with tempfile.TemporaryDirectory(prefix="max-drop-") as folder:
        flags |= {"max_drop": points, "output_dir": Path(folder) / "out"}
        given = [
            text
            for name, value in flags.items()
            if value is not None
            for text in (f"--{name.replace('_', '-')}", str(value))
        ]
        code = rfprune([*given, "--no-cache"])
        if code == 130:
            raise KeyboardInterrupt
        if code:
            raise NotMeasured(f"--points {points:g}: the run ended with {code}")
        return read_report(flags["output_dir"])


def line_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a report that a line keeps."""
    found, seconds = report["max_drop"], report["seconds"]
    names = ("drop", "standard_error", "sure", "path", "least_possible", "seconds")
    same = ("metric_name", "divergence", "achieved", "evaluated_examples", "device", "warnings")
    return {
        "ratio": report["constraint"],
        **{name: found[name] for name in names},
        "probes": len(found["path"]),
        "single_seconds": seconds["prune_total"] + seconds["evaluate"],
        "original_score": report["original"]["score"],
        "score": report["pruned"]["score"],
        "settings": report.get("settings"),
        **{name: report[name] for name in same},
    }


if __name__ == "__main__":
    sys.exit(main())
