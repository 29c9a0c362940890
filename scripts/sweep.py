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
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rfprune.command_line import DTYPES, METRICS
from rfprune.errors import UserError
from rfprune.tasks.registry import TASKS, get_task

if TYPE_CHECKING:
    from rfprune.loading import Loaded
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
    "curvature-rounds-2": {"method": "curvature", "rounds": 2},
    "curvature-rounds-3": {"method": "curvature", "rounds": 3},
    "curvature-polish": {"method": "curvature", "polish": True},
}
"""What each variant asks of `rfprune.Settings`; the first ones are the stages of the paper."""

CONDITIONS = (
    *("model", "task", "variant", "metric", "constraint", "seed", "requested_samples"),
    *("eval_limit", "batch_size", "max_length", "dtype"),
)
"""Two lines that agree in all of these are the same measurement."""

Conditions = dict[str, Any]
"""A measurement to make: a value for each of `CONDITIONS`."""


@dataclass(frozen=True)
class Bench:
    """What all measurements share: the model, its data and its own score; `warnings` from both."""

    loaded: Loaded
    max_length: int
    evaluation_set: EvaluationSet
    original: Evaluation
    warnings: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 1 something was not to be
    measured, 2 user error, 130 stopped."""
    options = _parser().parse_args(argv)
    try:
        get_task(options.task)
        output: Path = options.output or default_output(options)
        measured = {key_of(line) for line in read_lines(output)}
        wanted = list(measurements(options))
        missing = [conditions for conditions in wanted if key_of(conditions) not in measured]
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
    add = parser.add_argument
    add("--model", required=True, help="a folder, hub id, alias, or demo")
    add("--task", required=True, help=", ".join(TASKS))
    add("--data-dir", type=Path, help="local data, DIR/TASK/...; else the hub")
    add("--constraint", required=True, nargs="+", type=_ratio, help="fractions of cost to keep")
    add("--metric", choices=METRICS, default="mac", help="the cost that counts (default: mac)")
    add("--seed", nargs="+", type=_whole(0), default=[0], help="draw the samples (default: 0)")
    add("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    add("--samples", type=_whole(1), default=2048, help="to calibrate on (default: 2048)")
    add("--batch-size", type=_whole(1), default=32, help="examples a batch (default: 32)")
    add("--max-length", type=_whole(8), help="tokens an example (default: the task's)")
    add("--eval-limit", type=_whole(1), help="score so many validation examples, not all")
    add("--device", choices=("cpu", "cuda", "mps"), help="default: the best there is")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    add("--output", type=Path, help="default: results/quality_MODEL_TASK_METRIC_Nsamples.jsonl")
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


def _sweep(options: argparse.Namespace, missing: Sequence[Conditions], output: Path) -> int:
    """Measure what is missing, seed by seed: a seed's variants share its calibration batches."""
    bench = _prepare(options)
    failed = False
    append_line(output, None)
    for seed, group in _grouped(missing, "seed"):
        batches, heard = _calibrate(options, bench, group)
        for variant, family in _grouped(group, "variant"):
            try:
                for line in _measure(bench, family, batches, heard):
                    append_line(output, line)
                    _say(_in_words(line))
            except _NotMeasured as error:
                failed = True
                _say(f"seed {seed} {variant}: not measured: {error}")
    return 1 if failed else 0


def _grouped(all_conditions: Sequence[Conditions], name: str) -> list[tuple[Any, list[Conditions]]]:
    """What is to be measured by the values of one condition, in the order they come in."""
    groups: dict[Any, list[Conditions]] = {}
    for conditions in all_conditions:
        groups.setdefault(conditions[name], []).append(conditions)
    return list(groups.items())


class _NotMeasured(Exception):
    """A variant does not work here; the others go on."""


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
    options: argparse.Namespace, bench: Bench, group: Sequence[Conditions]
) -> tuple[list[dict[str, Any]], list[str]]:
    """A seed's batches and the warnings so far; with labels only where a variant needs them,
    since they change nothing for the others."""
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
            seed=group[0]["seed"],
            with_labels=any(VARIANTS[one["variant"]].get("use_labels", False) for one in group),
        )
    return batches, [*bench.warnings, *heard]


def _measure(
    bench: Bench,
    family: Sequence[Conditions],
    batches: Sequence[Mapping[str, Any]],
    warnings: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """Prune to the constraints of one variant and seed, and score each model: lines of the file.

    Scores are in points of 100; the seconds of collecting are those of the whole family.
    """
    from rfprune.cost.constraint import Constraint
    from rfprune.pipeline import prune_family
    from rfprune.report.report_json import versions
    from rfprune.result import Settings
    from rfprune.tasks.evaluation import divergence, evaluate_model

    settings = Settings(**VARIANTS[family[0]["variant"]], seed=family[0]["seed"])
    constraints = [Constraint(one["metric"], one["constraint"]) for one in family]
    original = bench.original
    with _collected_warnings() as heard:
        results = prune_family(bench.loaded.model, batches, constraints, settings)
        for conditions in family:
            try:
                result = next(results)
                pruned = evaluate_model(result.model, bench.evaluation_set)
            except UserError as error:
                raise _NotMeasured(str(error)) from error
            yield {
                **conditions,
                "samples": sum(len(batch["input_ids"]) for batch in batches),
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
                "warnings": list(dict.fromkeys([*warnings, *heard, *result.warnings])),
                "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "versions": versions(),
            }


def _collected_warnings() -> AbstractContextManager[list[str]]:
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


if __name__ == "__main__":
    sys.exit(main())
