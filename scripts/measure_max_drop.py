"""What `--max-drop` finds, and what the search costs beside a single run.

python scripts/measure_max_drop.py --model CHECKPOINT --task sst2 --data-dir data --points 0.5 1 2

A line of JSON for each limit goes to `results/max_drop_MODEL_TASK_METRIC_Nsamples.jsonl`, as soon
as it is there; the same command goes on where it was stopped. At the end all lines are a table.
Nothing is taken from a cache. The seconds of a single run (scoring the original, collecting, one
size and its score) and those of the search are from the same run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import one another

from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.cli.parser import add_flags
from rfprune.settings import DataSettings, Settings, TargetSettings
from scripts.bench import say
from scripts.sweep import append_line, default_output, model_name, read_lines

CONDITIONS = ("model", "task", "metric", "points", "seed", "requested_samples", "eval_limit")
"""Two lines that agree in all of these are the same measurement."""


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 1 a run was refused, as for
    a limit that no size keeps, 2 user error, 130 stopped."""
    options = _parser().parse_args(argv)
    output = options.output or default_output(options, "max_drop")
    known = {_key(line) for line in read_lines(output)}
    wanted = [_conditions(options, points) for points in dict.fromkeys(options.points)]
    missing = [conditions for conditions in wanted if _key(conditions) not in known]
    say(f"{output}: {len(missing)} of {len(wanted)} measurements to make")
    append_line(output, None)
    failed = False
    for conditions in missing:
        report = search(options, conditions["points"])
        failed = failed or report is None
        if report is not None:
            append_line(output, conditions | line_of(report))
    sys.stdout.write(table(read_lines(output)))
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="a folder, hub id, alias, or demo")
    add("--task", required=True)
    add("--data-dir", type=Path, help="local data, DIR/TASK/...; else the hub")
    add("--points", nargs="+", type=float, default=[0.5, 1.0, 2.0], metavar="POINTS")
    add_flags(parser, TargetSettings, ["metric"])
    add_flags(parser, DataSettings, ["samples", "batch_size", "eval_limit"])
    add_flags(parser, Settings, ["seed"])
    parser.set_defaults(samples=2048, batch_size=32)
    add("--output", type=Path, help="default: in results, as said above")
    return parser


def _conditions(options: argparse.Namespace, points: float) -> dict[str, Any]:
    names = ("task", "metric", "seed", "eval_limit")
    return {
        "model": model_name(options.model),
        **{name: getattr(options, name) for name in names},
        "requested_samples": options.samples,
        "points": points,
    }


def _key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(line.get(name) for name in CONDITIONS)


def search(options: argparse.Namespace, points: float) -> dict[str, Any] | None:
    """The report of a run with this limit; None where it was refused, which it has said why."""
    from rfprune.main import main as rfprune
    from rfprune.report.report_json import read_report

    with tempfile.TemporaryDirectory(prefix="max-drop-") as folder:
        output = Path(folder) / "out"
        flags = {
            "--model": options.model,
            "--task": options.task,
            "--data-dir": options.data_dir,
            "--max-drop": points,
            "--metric": options.metric,
            "--seed": options.seed,
            "--samples": options.samples,
            "--batch-size": options.batch_size,
            "--eval-limit": options.eval_limit,
            "--output-dir": output,
        }
        given = [str(part) for flag in flags.items() if flag[1] is not None for part in flag]
        code = rfprune([*given, "--no-cache"])
        if code == 130:
            raise KeyboardInterrupt
        return read_report(output) if code == 0 else None


def line_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a report."""
    found, seconds = report["max_drop"], report["seconds"]
    names = ("drop", "standard_error", "sure", "path", "least_possible")
    return {
        "ratio": report["constraint"],
        **{name: found[name] for name in names},
        "probes": len(found["path"]),
        "seconds": found["seconds"],
        "single_seconds": seconds["prune_total"] + seconds["evaluate"],
        "original_score": report["original"]["score"],
        "score": report["pruned"]["score"],
        "metric_name": report["metric_name"],
        "divergence": report["divergence"],
        "achieved": report["achieved"],
        "evaluated_examples": report["evaluated_examples"],
        "device": report["device"],
        "versions": report["versions"],
        "warnings": report["warnings"],
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for each line."""
    rows = [
        "| checkpoint | cost | points allowed | kept | drop | standard error | sure | probes | "
        "seconds | of a single run |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {line['model']} ({line['task']}) | {line['metric']} | {line['points']:g} | "
        f"{line['ratio']:g} | {line['drop']:.2f} | {line['standard_error']:.2f} | "
        f"{line['sure']:.0%} | {line['probes']} | {line['seconds']:.0f} | "
        f"{line['seconds'] / line['single_seconds']:.1f}x |"
        for line in sorted(lines, key=lambda line: (line["metric"], line["seed"], line["points"]))
    ]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
