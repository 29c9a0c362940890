"""How much faster are pruning, ONNX and int8, apart and together?

Original and pruned model, each by PyTorch, as ONNX and as ONNX with int8 weights: score and KL
divergence from the original through one evaluation, bytes of the weights, and milliseconds of a
forward pass, all of them in turn on the same batch.

python scripts/benchmark_onnx.py --model ... --task sst2 --constraint 0.5 --output results/...
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import one another

from rfprune.cli.exit_codes import NOTHING_WRITTEN, script
from rfprune.cli.validation import check_exports
from rfprune.errors import UserError
from rfprune.settings import METHODS
from rfprune.tasks.registry import TASKS, Task, get_task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rfprune.checkpoints.loading import LoadedCheckpoint

Batch = Mapping[str, "Tensor"]

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

LONG = 128
"""Tokens of the last shape that is timed."""


@script(NOTHING_WRITTEN)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130 stopped."""
    options = _parser().parse_args(argv)
    task = get_task(options.task)
    check_exports(["onnx"])
    _check_output(options.output)
    result = _measure(options, task)
    text = json.dumps(result, indent=1, allow_nan=False)
    options.output.write_text(text + "\n", encoding="utf-8")
    _print_table(result)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a hub id")
    parser.add_argument("--task", required=True, help=", ".join(TASKS))
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="local data; else the hub")
    parser.add_argument("--constraint", type=float, default=0.5, metavar="RATIO")
    parser.add_argument("--method", choices=METHODS, default=METHODS[0])
    parser.add_argument("--samples", type=int, default=2048, metavar="N")
    parser.add_argument("--eval-limit", type=int, metavar="N", help="score on so many; default all")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="a shape (default: 20)")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: what the process computed, for a machine that others use too; one thread only",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="a new file")
    return parser


def _check_output(path: Path) -> None:
    if path.exists():
        raise UserError(f"--output {path} exists already: choose another file, or remove it.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.absolute().parent}, make it.")


def _measure(options: argparse.Namespace, task: Task) -> dict[str, Any]:
    """Prune, export, score and time: the contents of the output file."""
    import torch
    from rich.console import Console

    from rfprune.checkpoints.loading import (
        load,
        quiet_transformers,
        resolve_data_dir,
        resolve_max_length,
    )
    from rfprune.cli.console import collected_warnings
    from rfprune.cost.constraint import Constraint
    from rfprune.pruning import prune
    from rfprune.report.report_json import versions
    from rfprune.settings import Settings
    from rfprune.tasks.calibration import calibration_batches
    from rfprune.tasks.evaluation import prepare_evaluation

    if options.clock == "cpu" and torch.get_num_threads() > 1:
        raise UserError(
            "--clock cpu adds up the time of all threads: set OMP_NUM_THREADS=1, or use wall."
        )
    if options.rounds < 1:
        raise UserError(f"--rounds {options.rounds} times nothing: give 1 or more.")
    constraint = Constraint("mac", options.constraint)
    data_dir = resolve_data_dir(options.model, options.data_dir)
    with collected_warnings(Console(stderr=True, highlight=False), verbose=False) as heard:
        loaded = load(options.model, task, device=torch.device("cpu"), dtype=torch.float32)
        length = resolve_max_length(loaded, task, None)
        batches = calibration_batches(
            task,
            loaded.tokenizer,
            data_dir,
            num_samples=options.samples,
            batch_size=32,
            max_length=length,
            seed=options.seed,
            with_labels=False,
        )
        evaluation_set = prepare_evaluation(
            task, loaded.tokenizer, data_dir, max_length=length, limit=options.eval_limit
        )
        settings = Settings(method=options.method, round_to=None, seed=options.seed)
        result = prune(loaded.model, batches, constraint, settings)
        with tempfile.TemporaryDirectory() as folder, quiet_transformers():
            models, sizes = _export(loaded, result.model, batches, Path(folder))
            rows = _score(models, evaluation_set)
            shapes = [
                _time(models, batch, options.rounds, options.clock)
                for batch in _shapes(loaded, batches)
            ]
    for name, row in rows.items():
        row["bytes"] = sizes[name]
    return {
        "schema": 1,
        "model": Path(loaded.source).name,
        "task": task.name,
        "method": options.method,
        "constraint": options.constraint,
        "achieved": result.achieved,
        "samples": sum(len(batch["input_ids"]) for batch in batches),
        "evaluated_examples": evaluation_set.num_examples,
        "seed": options.seed,
        "clock": options.clock,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "models": rows,
        "speed": shapes,
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "warnings": [*heard, *result.warnings],
        "versions": versions() | _onnx_versions(),
    }


def _onnx_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("onnx", "onnxruntime", "onnxscript")}


def _export(
    loaded: LoadedCheckpoint, pruned: Any, batches: Sequence[Batch], folder: Path
) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """Six models by name ("original", "original-onnx", "original-onnx-int8", ...), their bytes."""
    from rfprune.export.onnx import OnnxModel, export_onnx, quantize_onnx
    from rfprune.latency.timed_batch import typical_batch

    models: dict[str, nn.Module] = {}
    sizes = {}
    for name, model in (("original", loaded.model), ("pruned", pruned)):
        path, small = folder / f"{name}.onnx", folder / f"{name}-int8.onnx"
        export_onnx(model, typical_batch(batches), path)
        quantize_onnx(path, small)
        models[name] = model
        sizes[name] = sum(value.nbytes for value in model.state_dict().values())
        for suffix, file in (("onnx", path), ("onnx-int8", small)):
            models[f"{name}-{suffix}"] = OnnxModel(file, model.config)
            sizes[f"{name}-{suffix}"] = file.stat().st_size
    return models, sizes


def _score(models: Mapping[str, nn.Module], evaluation_set: Any) -> dict[str, dict[str, Any]]:
    """Score and divergence from the original, by model."""
    from rfprune.tasks.evaluation import divergence, evaluate_model

    found = {name: evaluate_model(model, evaluation_set) for name, model in models.items()}
    return {
        name: {
            "score": evaluation.score,
            "metric_name": evaluation.metric_name,
            "divergence": divergence(found["original"], evaluation),
        }
        for name, evaluation in found.items()
    }


def _shapes(loaded: LoadedCheckpoint, batches: Sequence[Batch]) -> list[Batch]:
    """A single typical example, a typical batch, and a long one, whose tokens change no time."""
    import torch

    from rfprune.latency.timed_batch import typical_batch

    typical = typical_batch(batches)
    positions = loaded.model.config.max_position_embeddings - 2  # RoBERTa's start at 2
    shape = (len(typical["input_ids"]), min(LONG, positions))
    ids = torch.randint(loaded.model.config.vocab_size, shape)
    long = {name: torch.ones_like(ids) for name in typical if name != "token_type_ids"}
    if "token_type_ids" in typical:
        long["token_type_ids"] = torch.zeros_like(ids)
    return [{n: v[:1] for n, v in typical.items()}, typical, long | {"input_ids": ids}]


def _time(models: Mapping[str, nn.Module], batch: Batch, rounds: int, clock: str) -> dict[str, Any]:
    from rfprune.export.contract import time_on_cpu
    from rfprune.latency.timing import TimingBudget

    budget = TimingBudget(1e9, max_rounds=rounds, tolerance=0)
    milliseconds, conditions = time_on_cpu(models, batch, budget=budget, timer=CLOCKS[clock])
    return conditions | {"ms": milliseconds}


def _print_table(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{result['model']}, {result['task']}, {result['constraint']:g} of the MACs "
    title += f"({result['method']}), {result['threads']} threads, {result['clock']} time; "
    title += "speedup over the original"
    table = Table("", "score", "KL", "MB", title=title)
    for speed in result["speed"]:
        table.add_column(f"{speed['batch_size']} x {speed['sequence_length']}", justify="right")
    for name, row in result["models"].items():
        times = [(speed["ms"][name], speed["ms"]["original"]) for speed in result["speed"]]
        table.add_row(
            name,
            f"{row['score']:.2f}",
            f"{row['divergence']:.4f}",
            f"{row['bytes'] / 1e6:.1f}",
            *(f"{own:.1f} ms ({original / own:.2f}x)" for own, original in times),
        )
    Console(highlight=False, width=120).print(table)


if __name__ == "__main__":
    sys.exit(main())
