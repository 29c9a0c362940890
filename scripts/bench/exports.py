"""Pruning, ONNX and int8, apart and together: score, divergence, bytes and milliseconds.

OMP_NUM_THREADS=1 python -m scripts.bench.exports --model CHECKPOINT --task sst2 --clock cpu

Original and pruned model, each by PyTorch, as ONNX and as ONNX with int8 weights, are scored by one
evaluation and timed in turn on the same batches.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.cli.validation import check_exports
from rfprune.errors import UserError
from scripts.bench import harness
from scripts.bench.harness import Conditions, machine
from scripts.bench.models import Batch, load_checkpoint, num_examples, settings_of

if TYPE_CHECKING:
    from torch import nn

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
FOREVER = 1e9
"""Seconds: the number of rounds decides when timing ends."""

LONG = 128
"""Tokens of the last shape that is timed."""


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    options = _parser().parse_args(argv)
    check_exports(["onnx"])
    here = machine("cpu")
    if options.clock == "cpu" and here["threads"] > 1:
        raise UserError(
            "--clock cpu adds up the time of all threads: set OMP_NUM_THREADS=1, or use wall."
        )
    names = ("model", "task", "method", "seed", "eval_limit", "batch_size", "clock")
    shared = harness.conditions_of(options, names) | {"requested_samples": options.samples}
    wanted = [shared | one for one in harness.each_combination(constraint=options.constraint)]
    output = options.output or harness.default_output(
        "exports", shared["model"], options.method, f"{here['threads']}thread"
    )
    same = {name: here[name] for name in ("device_name", "threads")}
    measure = partial(_measure, options)
    return harness.complete(__file__, output, wanted, measure, group_by=("constraint",), same=same)


def _parser() -> argparse.ArgumentParser:
    names = "model task data-dir constraint method samples seed eval-limit batch-size rounds"
    parser = harness.parser_of(__doc__, names, constraint=[0.5], rounds=20)
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: the time of the process, for a machine that others use; one thread only",
    )
    return parser


def _measure(options: argparse.Namespace, group: Sequence[Conditions]) -> Iterator[dict[str, Any]]:
    """Prune, export, score and time."""
    from rfprune.checkpoints.loading import quiet_transformers
    from rfprune.cost.constraint import Constraint
    from rfprune.export.contract import time_on_cpu
    from rfprune.latency.timing import TimingBudget
    from rfprune.pruning import prune

    budget = TimingBudget(FOREVER, max_rounds=options.rounds, tolerance=0)
    for conditions in group:
        with harness.warnings_on_stderr() as warnings:
            checkpoint = load_checkpoint(options)
            batches = checkpoint.batches(options.samples, options.seed)
            data = checkpoint.evaluation_set(options.eval_limit)
            settings = settings_of(method=options.method, seed=options.seed)
            constraint = Constraint("mac", conditions["constraint"])
            result = prune(checkpoint.model, batches, constraint, settings)
            with tempfile.TemporaryDirectory() as folder, quiet_transformers():
                pair = {"original": checkpoint.model, "pruned": result.model}
                models, sizes = _export(pair, batches, Path(folder))
                rows = _score(models, data)
                speed = []
                for batch in _shapes(checkpoint.model, batches):
                    milliseconds, shape = time_on_cpu(
                        models, batch, budget=budget, timer=CLOCKS[options.clock]
                    )
                    speed.append(shape | {"ms": milliseconds})
        yield {
            **conditions,
            "settings": dataclasses.asdict(settings),
            "achieved": result.achieved,
            "samples": num_examples(batches),
            "evaluated_examples": data.num_examples,
            "models": {name: row | {"bytes": sizes[name]} for name, row in rows.items()},
            "speed": speed,
            "warnings": list(dict.fromkeys([*warnings, *result.warnings])),
        }


def _export(
    pair: Mapping[str, Any], batches: Sequence[Batch], folder: Path
) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """Six models by name ("original", "original-onnx", "original-onnx-int8", ...), their bytes."""
    from rfprune.export.onnx import OnnxModel, export_onnx, quantize_onnx
    from rfprune.latency.timed_batch import typical_batch

    models: dict[str, nn.Module] = {}
    sizes = {}
    for name, model in pair.items():
        path, small = folder / f"{name}.onnx", folder / f"{name}-int8.onnx"
        export_onnx(model, typical_batch(batches), path)
        quantize_onnx(path, small)
        models[name] = model
        sizes[name] = sum(value.nbytes for value in model.state_dict().values())
        for suffix, file in (("onnx", path), ("onnx-int8", small)):
            models[f"{name}-{suffix}"] = OnnxModel(file, model.config)
            sizes[f"{name}-{suffix}"] = file.stat().st_size
    return models, sizes


def _score(models: Mapping[str, nn.Module], data: Any) -> dict[str, dict[str, Any]]:
    """Score and divergence from the original, by model."""
    from rfprune.tasks.evaluation import divergence, evaluate_model

    found = {name: evaluate_model(model, data) for name, model in models.items()}
    return {
        name: {
            "score": evaluation.score,
            "metric_name": evaluation.metric_name,
            "divergence": divergence(found["original"], evaluation),
        }
        for name, evaluation in found.items()
    }


def _shapes(model: Any, batches: Sequence[Batch]) -> list[Batch]:
    """A single typical example, a typical batch, and a long one, whose tokens change no time."""
    import torch

    from rfprune.latency.timed_batch import typical_batch

    typical = typical_batch(batches)
    positions = model.config.max_position_embeddings - 2  # RoBERTa's offset
    ids = torch.randint(model.config.vocab_size, (len(typical["input_ids"]), min(LONG, positions)))
    long = {name: torch.ones_like(ids) for name in typical} | {"input_ids": ids}
    if "token_type_ids" in typical:
        long["token_type_ids"] = torch.zeros_like(ids)
    return [{name: values[:1] for name, values in typical.items()}, typical, long]


if __name__ == "__main__":
    sys.exit(main())
