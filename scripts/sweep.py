"""Measure pruned models: variants of the method x constraints x seeds, for one model and one task.

python scripts/sweep.py --model CHECKPOINT --task mrpc --data-dir data \\
    --constraint 0.7 0.5 0.3 --seed 0 1 2 --variant kwon-scheduled curvature

Every measurement is one line of JSON in the output file, written as soon as it is there. A sweep
that was stopped goes on where it was: what the file holds is not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rfprune.errors import UserError
from rfprune.tasks.registry import TASKS, get_task

if TYPE_CHECKING:
    from rfprune.loading import Loaded
    from rfprune.result import PruneResult, Settings
    from rfprune.tasks.evaluation import Evaluation, EvaluationSet

VARIANTS: Mapping[str, Mapping[str, Any]] = {
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
}
"""What each variant asks of `rfprune.Settings`; the first ones are the stages of the paper."""

METRICS = ("mac", "params")
CONDITIONS = (
    *("model", "task", "variant", "metric", "constraint", "seed", "requested_samples"),
    *("eval_limit", "batch_size", "max_length", "dtype"),
)
"""Two lines that agree in all of these are the same measurement."""


@dataclass(frozen=True)
class Measurement:
    """One thing to measure; `conditions` by the names of `CONDITIONS`."""

    variant: str
    constraint: float
    seed: int
    conditions: Mapping[str, Any]

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells measurements apart."""
        return key_of(self.conditions)


@dataclass(frozen=True)
class Bench:
    """What all measurements share: the model, its data and its own score; `warnings` from both."""

    loaded: Loaded
    max_length: int
    evaluation_set: EvaluationSet
    original: Evaluation
    warnings: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process).

    Returns 0 for done, 1 where a variant could not be measured, 2 for a user error, 130 stopped.
    """
    options = _parser().parse_args(argv)
    try:
        get_task(options.task)
        output = options.output or default_output(options)
        measured = {key_of(line) for line in read_lines(output)}
        wanted = list(measurements(options))
        missing = [measurement for measurement in wanted if measurement.key not in measured]
        _say(f"{output}: {len(missing)} of {len(wanted)} measurements to make")
        return _sweep(options, missing, output) if missing else 0
    except UserError as error:
        sys.stderr.write(f"sweep: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("sweep: interrupted; the same command goes on from here.\n")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    whole, ratio = _number(int, 1, math.inf), _number(float, 0, 1)
    parser.add_argument("--model", required=True, help="a folder, hub id, alias, or demo")
    parser.add_argument("--task", required=True, help=", ".join(TASKS))
    parser.add_argument("--data-dir", type=Path, help="local data, DIR/TASK/...; else the hub")
    parser.add_argument("--constraint", required=True, nargs="+", type=ratio, metavar="RATIO")
    parser.add_argument("--metric", choices=METRICS, default="mac")
    parser.add_argument("--seed", nargs="+", type=_number(int, 0, math.inf), default=[0])
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--samples", type=whole, default=2048, help="to calibrate on")
    parser.add_argument("--batch-size", type=whole, default=32)
    parser.add_argument("--max-length", type=whole, help="tokens an example (default: the task's)")
    parser.add_argument("--eval-limit", type=whole, help="score so many validation examples")
    parser.add_argument("--device", type=_device, help="cpu, cuda, cuda:N or mps (default: best)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.jsonl",
        help="default: results/quality_MODEL_TASK_METRIC_Nsamples.jsonl",
    )
    return parser


def _number(kind: type, smallest: float, largest: float) -> Callable[[str], Any]:
    """Whole numbers from `smallest`; fractions strictly between the two."""

    def read(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not (smallest <= number <= largest) or (kind is float and number in (0, 1)):
            sort = f"a number between {smallest} and {largest}" if kind is float else ""
            sort = sort or f"a whole number of at least {smallest}"
            raise argparse.ArgumentTypeError(f"{text} is not {sort}")
        return number

    return read


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"unknown device {text!r}: cpu, cuda, cuda:N or mps")
    return text


def measurements(options: argparse.Namespace) -> Iterator[Measurement]:
    """All that the flags ask for: by seed, then variant, then constraint."""
    shared = {
        "model": model_name(options.model),
        "task": options.task,
        "metric": options.metric,
        "requested_samples": options.samples,
        "eval_limit": options.eval_limit,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "dtype": options.dtype,
    }
    for seed in dict.fromkeys(options.seed):
        for variant in dict.fromkeys(options.variant):
            for constraint in dict.fromkeys(options.constraint):
                own = {"variant": variant, "constraint": constraint, "seed": seed}
                yield Measurement(variant, constraint, seed, shared | own)


def model_name(model: str) -> str:
    """A folder's own name, without the path of this machine; a hub id or alias as it is."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def default_output(options: argparse.Namespace) -> Path:
    """A file beside this script's folder whose name says the conditions."""
    model = re.sub(r"[^\w.-]+", "--", model_name(options.model))
    limit = "" if options.eval_limit is None else f"_{options.eval_limit}evaluated"
    name = f"quality_{model}_{options.task}_{options.metric}_{options.samples}samples{limit}.jsonl"
    return Path(__file__).resolve().parents[1] / "results" / name


def key_of(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """The conditions of a line, or of what is to become one."""
    return tuple(line.get(name) for name in CONDITIONS)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file, none if there is no file.

    A last line that was cut short by a kill is taken off the file.

    Raises:
        UserError: the file cannot be read, or another line is no JSON object.
    """
    try:
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(path, len(whole))
    except OSError as error:
        raise UserError(f"--output {path} cannot be read: {error.strerror}.") from error
    lines = []
    for number, text in enumerate(whole.splitlines(), start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            raise UserError(f"--output {path}: line {number} is no JSON object, take it out.")
        lines.append(line)
    return lines


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line and see that it is on the disk.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror}.") from error


def _sweep(options: argparse.Namespace, missing: Sequence[Measurement], output: Path) -> int:
    """Measure what is missing, seed by seed: a seed's variants share its calibration batches."""
    bench = _prepare(options)
    failed = 0
    for seed in dict.fromkeys(measurement.seed for measurement in missing):
        group = [measurement for measurement in missing if measurement.seed == seed]
        batches, heard = _calibrate(options, bench, group)
        for variant in dict.fromkeys(measurement.variant for measurement in group):
            family = [measurement for measurement in group if measurement.variant == variant]
            try:
                for line in _measure(bench, family, batches):
                    line["warnings"] = list(
                        dict.fromkeys([*bench.warnings, *heard, *line["warnings"]])
                    )
                    append_line(output, line)
                    _say(_in_words(line))
            except _NotMeasured as error:
                failed += 1
                _say(f"seed {seed} {variant}: not measured: {error}")
    return 1 if failed else 0


class _NotMeasured(Exception):
    """A variant that does not work here; the others go on."""


def _prepare(options: argparse.Namespace) -> Bench:
    import torch

    from rfprune.device import pick_device
    from rfprune.loading import data_folder, length_limit, load
    from rfprune.tasks.evaluation import evaluate_model, prepare_evaluation

    task = get_task(options.task)
    with _collected_warnings() as heard:
        device = pick_device(options.device)
        loaded = load(options.model, task, device=device, dtype=getattr(torch, options.dtype))
        max_length = length_limit(loaded, task, options.max_length)
        evaluation_set = prepare_evaluation(
            task,
            loaded.tokenizer,
            data_folder(options.model, options.data_dir),
            batch_size=options.batch_size,
            max_length=max_length,
            limit=options.eval_limit,
        )
        original = evaluate_model(loaded.model, evaluation_set)
    _say(f"original: {original.score:.2f} on {original.num_examples} examples")
    return Bench(loaded, max_length, evaluation_set, original, tuple(heard))


def _calibrate(
    options: argparse.Namespace, bench: Bench, group: Sequence[Measurement]
) -> tuple[list[dict[str, Any]], list[str]]:
    """A seed's batches and the warnings on the way; with labels only where one of a group needs
    them, since they change nothing for the others."""
    from rfprune.calibration import calibration_batches
    from rfprune.loading import data_folder

    with _collected_warnings() as heard:
        batches = calibration_batches(
            bench.evaluation_set.task,
            bench.loaded.tokenizer,
            data_folder(options.model, options.data_dir),
            num_samples=options.samples,
            batch_size=options.batch_size,
            max_length=bench.max_length,
            seed=group[0].seed,
            with_labels=any(VARIANTS[one.variant].get("use_labels", False) for one in group),
        )
    return batches, heard


def _measure(
    bench: Bench, family: Sequence[Measurement], batches: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Prune to the constraints of a family (one variant, one seed) and score each model."""
    from rfprune.cost.constraint import Constraint
    from rfprune.pipeline import prune_family
    from rfprune.result import Settings
    from rfprune.tasks.evaluation import evaluate_model

    settings = Settings(**VARIANTS[family[0].variant], seed=family[0].seed)
    constraints = [Constraint(one.conditions["metric"], one.constraint) for one in family]
    with _collected_warnings() as heard:
        results = prune_family(bench.loaded.model, batches, constraints, settings)
        for measurement in family:
            try:
                result = next(results)
                pruned = evaluate_model(result.model, bench.evaluation_set)
            except UserError as error:
                raise _NotMeasured(str(error)) from error
            line = _line(bench, measurement, settings, result, pruned)
            line["samples"] = sum(len(batch["input_ids"]) for batch in batches)
            line["warnings"] = [*heard, *result.warnings]
            yield line
            del result, pruned


def _line(
    bench: Bench,
    measurement: Measurement,
    settings: Settings,
    result: PruneResult,
    pruned: Evaluation,
) -> dict[str, Any]:
    """A line of the results file: conditions, then what came out. Scores in points of 100."""
    from rfprune.report.report_json import versions
    from rfprune.tasks.evaluation import divergence

    original = bench.original
    return {
        **measurement.conditions,
        "settings": dataclasses.asdict(settings),
        "device": bench.loaded.model.device.type,
        "metric_name": original.metric_name,
        "original_score": original.score,
        "score": pruned.score,
        "scores": {"original": dict(original.scores), "pruned": dict(pruned.scores)},
        "divergence": divergence(original, pruned),
        "evaluated_examples": original.num_examples,
        "achieved": result.achieved,
        "mean_tokens": result.mean_tokens,
        "seconds": {**result.seconds, "evaluate": pruned.seconds},
        "layers": list(result.layers),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
    }


def _collected_warnings() -> Any:
    from rich.console import Console

    from rfprune.run import collected_warnings

    return collected_warnings(Console(stderr=True, highlight=False), verbose=False)


def _in_words(line: Mapping[str, Any]) -> str:
    return (
        f"seed {line['seed']} {line['variant']} {line['constraint']}: {line['score']:.2f} points, "
        f"divergence {line['divergence']:.4f}, {line['metric']} "
        f"{line['achieved'][line['metric']]:.3f}, {line['seconds']['prune_total']:.0f} s"
    )


def _say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
