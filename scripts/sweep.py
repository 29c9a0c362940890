"""Measure pruned models: variants of the method x constraints x seeds, for one model and one task.

python scripts/sweep.py --model CHECKPOINT --task mrpc --data-dir data \\
    --constraint 0.7 0.5 0.3 --seed 0 1 2 --variant kwon-scheduled curvature

Every measurement is one line of JSON in the output file, written as soon as it is there. A sweep
that was stopped goes on where it was: what the file holds is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import one another

from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.cli.validation import check_task
from rfprune.errors import UserError
from rfprune.settings import DTYPES, METRICS
from rfprune.tasks.registry import TASK_NAMES
from scripts.bench import Bench, Conditions, NotMeasured, Variants, calibrate, measure, prepare, say

VARIANTS: Variants = {
    "kwon-search": {"method": "kwon", "rearrange": False, "tune": False},
    "kwon-rearrange": {"method": "kwon", "tune": False},
    "kwon-scheduled": {"method": "kwon", "teacher": "scheduled"},
    "kwon-dense": {"method": "kwon", "teacher": "dense"},
    "kwon-authors": {
        "method": "kwon",
        "use_labels": True,
        "gradients": "per-batch",
        "teacher": "scheduled",
    },
    "curvature-select": {"method": "curvature", "tune": False},
    "curvature": {"method": "curvature"},
    "curvature-rounds-2": {"method": "curvature", "rounds": 2},
    "curvature-rounds-3": {"method": "curvature", "rounds": 3},
}
"""What each variant asks of `rfprune.Settings`; the first ones are the stages of the paper."""

CONDITIONS = (
    *("model", "task", "variant", "metric", "constraint", "seed", "requested_samples"),
    *("eval_limit", "batch_size", "max_length", "dtype"),
)
"""Two lines that agree in all of these are the same measurement."""


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 1 something was not to be
    measured, 2 user error, 130 stopped."""
    options = _parser().parse_args(argv)
    output = options.output or default_output(options)
    return complete(options, list(measurements(options)), VARIANTS, output)


def complete(
    options: argparse.Namespace,
    wanted: Sequence[Conditions],
    variants: Variants,
    output: Path,
    cache: Path | None = None,
) -> int:
    """Measure what `output` does not hold yet: 0 done, 1 something was not to be measured.

    Args:
        cache: a folder for what is collected, which variants then share; the seconds of collecting
            are those of the first.
    """
    check_task(options.task)
    measured = {key_of(line) for line in read_lines(output)}
    missing = [conditions for conditions in wanted if key_of(conditions) not in measured]
    say(f"{output}: {len(missing)} of {len(wanted)} measurements to make")
    if not missing:
        return 0
    return _sweep(options, missing, prepare(options, variants, cache), output)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, VARIANTS)
    add = parser.add_argument
    add("--output", type=Path, help="default: results/quality_MODEL_TASK_METRIC_Nsamples.jsonl")
    return parser


def parser_of(description: str | None, variants: Variants) -> argparse.ArgumentParser:
    """The flags that say what to measure, and under which conditions."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="a folder, hub id, alias, or demo")
    add("--task", required=True, help=", ".join(TASK_NAMES))
    add("--data-dir", type=Path, help="local data, DIR/TASK/...; else the hub")
    add("--constraint", required=True, nargs="+", type=_ratio, help="fractions of cost to keep")
    add("--metric", choices=METRICS, default="mac", help="the cost that counts (default: mac)")
    add("--seed", nargs="+", type=_whole(0), default=[0], help="draw the samples (default: 0)")
    add("--variant", nargs="+", choices=variants, default=list(variants), help="default: all")
    add("--samples", type=_whole(1), default=2048, help="to calibrate on (default: 2048)")
    add("--batch-size", type=_whole(1), default=32, help="examples a batch (default: 32)")
    add("--max-length", type=_whole(8), help="tokens an example (default: the task's)")
    add("--eval-limit", type=_whole(1), help="score so many validation examples, not all")
    add("--device", choices=("cpu", "cuda", "mps"), help="default: the best there is")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    return parser


def _whole(smallest: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {smallest}")
        return int(text)

    return read


def _ratio(text: str) -> float:
    if not re.fullmatch(r"0?\.\d*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text} is not a fraction such as 0.5, between 0 and 1")
    return float(text)


def measurements(options: argparse.Namespace) -> Iterator[Conditions]:
    """All that the flags ask for: by seed, then variant, then constraint; nothing twice."""
    names = ("task", "metric", "eval_limit", "batch_size", "max_length", "dtype")
    shared = {name: getattr(options, name) for name in names}
    shared |= {"model": model_name(options.model), "requested_samples": options.samples}
    wanted = product(options.seed, options.variant, options.constraint)
    for seed, variant, constraint in dict.fromkeys(wanted):
        yield shared | {"seed": seed, "variant": variant, "constraint": constraint}


def model_name(model: str) -> str:
    """A folder's own name, without the path of this machine; a hub id or alias as it is."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def default_output(options: argparse.Namespace, kind: str = "quality") -> Path:
    """A file beside this script's folder whose name says the conditions."""
    model = re.sub(r"[^\w.-]+", "--", model_name(options.model))
    limit = "" if options.eval_limit is None else f"_{options.eval_limit}evaluated"
    name = f"{kind}_{model}_{options.task}_{options.metric}_{options.samples}samples{limit}.jsonl"
    return Path(__file__).resolve().parents[1] / "results" / name


def key_of(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """The conditions of a line, or of what is to become one."""
    return tuple(line.get(name) for name in CONDITIONS)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file, none if there is no file.

    A last line that was cut short by a kill is taken off the file.

    Raises:
        UserError: the file cannot be read, or is not one of this script's.
    """
    if path.suffix != ".jsonl":  # a cut line must not be taken off a file of something else
        raise UserError(f"--output {path} must end in .jsonl: it gets a line of JSON each time.")
    try:
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        lines = [dict(json.loads(text)) for text in whole.splitlines()]
        if whole != content:
            os.truncate(path, len(whole))
    except OSError as error:
        raise UserError(f"--output {path} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError) as error:
        raise UserError(
            f"--output {path} holds something else than measurements ({error}): name another file."
        ) from error
    return lines


def append_line(path: Path, line: Mapping[str, Any] | None) -> None:
    """Add a line and see that it is on the disk; None: only see that the file can be written.

    Raises:
        UserError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            if line is not None:
                file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror}.") from error


def _sweep(
    options: argparse.Namespace, missing: Sequence[Conditions], bench: Bench, output: Path
) -> int:
    """Measure what is missing, seed by seed: a seed's variants share its calibration batches."""
    failed = False
    append_line(output, None)
    for seed, group in _grouped(missing, "seed"):
        batches, heard = calibrate(options, bench, group)
        for variant, family in _grouped(group, "variant"):
            try:
                for line in measure(bench, family, batches, heard):
                    append_line(output, line)
                    say(_in_words(line))
            except NotMeasured as error:
                failed = True
                say(f"seed {seed} {variant}: not measured: {error}")
    return 1 if failed else 0


def _grouped(all_conditions: Sequence[Conditions], name: str) -> list[tuple[Any, list[Conditions]]]:
    """What is to be measured by the values of one condition, in the order they come in."""
    groups: dict[Any, list[Conditions]] = {}
    for conditions in all_conditions:
        groups.setdefault(conditions[name], []).append(conditions)
    return list(groups.items())


def _in_words(line: Mapping[str, Any]) -> str:
    return (
        f"seed {line['seed']} {line['variant']} {line['constraint']}: {line['metric_name']} "
        f"{line['score']:.2f}, divergence {line['divergence']:.4f}, {line['metric']} "
        f"{line['achieved'][line['metric']]:.3f}, {line['seconds']['prune_total']:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
