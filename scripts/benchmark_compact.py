"""Is a compact model what was pruned, how much faster is it, and how much smaller?

For every constraint: the largest difference between the logits of the compact model and those of
the original under its masks, over many real sentences; milliseconds of a forward pass, all models
in turn on the same batch; bytes of the saved weights.

python scripts/benchmark_compact.py --model ... --task sst2 --constraint 0.5 --output results/...
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import one another

from rfprune.cli.exit_codes import NOTHING_WRITTEN, script
from rfprune.errors import UserError
from rfprune.settings import METHODS
from rfprune.tasks.registry import TASKS, Task, get_task

if TYPE_CHECKING:
    from torch import Tensor

    from rfprune.checkpoints.loading import LoadedCheckpoint
    from rfprune.result import PruneResult
    from rfprune.settings import Settings

Batch = Mapping[str, "Tensor"]

TOLERANCE = 1e-5
"""Logits of the compact model may differ by this much from those under masks: rounding."""

LONG = 128
"""Tokens of the second batch that is timed; the first is a typical one of the task."""

WARM_UP_ROUNDS = 3


@dataclass(frozen=True)
class Bench:
    """What all constraints share; `long` is a batch of `LONG` tokens, if the model has them."""

    loaded: LoadedCheckpoint
    calibration: Sequence[Batch]
    sentences: Sequence[Batch]
    long: Batch
    settings: Settings


@script(NOTHING_WRITTEN)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 1 a compact model differs from
    the masked one, 2 user error, 130 stopped."""
    options = _parser().parse_args(argv)
    task = get_task(options.task)
    _check_output(options.output)
    result = _measure(options, task)
    text = json.dumps(result, indent=1, allow_nan=False)
    options.output.write_text(text + "\n", encoding="utf-8")
    _print_table(result)
    return 0 if all(row["max_difference"] <= TOLERANCE for row in result["constraints"]) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, help="a folder, hub id, alias, or demo")
    add("--task", required=True, help=", ".join(TASKS))
    add("--data-dir", type=Path, help="local data, DIR/TASK/...; else the hub")
    add("--constraint", required=True, nargs="+", type=float, help="fractions of MACs to keep")
    add("--method", choices=METHODS, default=METHODS[0], help=f"default: {METHODS[0]}")
    add("--samples", type=int, default=2048, help="to calibrate on (default: 2048)")
    add("--seed", type=int, default=0, help="draws samples and sentences (default: 0)")
    add("--sentences", type=int, default=10_000, help="to compare on (default: 10000)")
    add("--batch-size", type=int, default=32, help="examples a batch (default: 32)")
    add("--rounds", type=int, default=50, help="forward passes to time (default: 50)")
    add("--device", choices=("cpu", "cuda", "mps"), default="cpu", help="default: cpu")
    add("--output", type=Path, required=True, metavar="FILE.json", help="a new file")
    return parser


def _check_output(path: Path) -> None:
    """See that the file can be written before minutes are spent."""
    if path.exists():
        raise UserError(f"--output {path} exists already: give the name of a new file.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.absolute().parent}, make it.")


def _measure(options: argparse.Namespace, task: Task) -> dict[str, Any]:
    """Prune to every constraint and measure: the contents of the output file."""
    import torch
    from rich.console import Console

    from rfprune.cli.console import collected_warnings
    from rfprune.cost.constraint import Constraint
    from rfprune.latency.timed_batch import typical_batch
    from rfprune.pruning import prune_family
    from rfprune.report.report_json import versions

    if options.rounds < 1:
        raise UserError(f"--rounds {options.rounds} times nothing: give 1 or more.")
    constraints = [Constraint("mac", ratio) for ratio in options.constraint]
    with collected_warnings(Console(stderr=True, highlight=False), verbose=False) as heard:
        bench = _prepare(options, task)
        model = bench.loaded.model
        results = list(prune_family(model, bench.calibration, constraints, bench.settings))
    batches = (typical_batch(bench.sentences), bench.long)
    return {
        "schema": 1,
        "model": Path(bench.loaded.source).name,
        "task": task.name,
        "split": task.train_split,
        "settings": dataclasses.asdict(bench.settings),
        "samples": _num_examples(bench.calibration),
        "sentences": _num_examples(bench.sentences),
        "tolerance": TOLERANCE,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "dtype": "float32",
        "original_bytes": _saved_bytes(model),
        "constraints": _compare(bench, results),
        "speed": [_speed(batch, options.rounds, model, results) for batch in batches],
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "warnings": heard,
        "versions": versions(),
    }


def _prepare(options: argparse.Namespace, task: Task) -> Bench:
    import torch

    from rfprune.checkpoints.device import pick_device
    from rfprune.checkpoints.loading import load, resolve_data_dir, resolve_max_length
    from rfprune.settings import Settings
    from rfprune.tasks.calibration import calibration_batches

    device = pick_device(options.device)
    loaded = load(options.model, task, device=device, dtype=torch.float32)
    max_length = resolve_max_length(loaded, task, None)

    def batches(num_samples: int) -> list[dict[str, Tensor]]:
        drawn = calibration_batches(
            task,
            loaded.tokenizer,
            resolve_data_dir(options.model, options.data_dir),
            num_samples=num_samples,
            batch_size=options.batch_size,
            max_length=max_length,
            seed=options.seed,
            with_labels=False,
        )
        return [{name: ids.to(device) for name, ids in batch.items()} for batch in drawn]

    # what the tokens are changes no time; RoBERTa's positions start at 2
    positions = loaded.model.config.max_position_embeddings - 2
    shape = (options.batch_size, min(LONG, positions))
    ids = torch.randint(loaded.model.config.vocab_size, shape, device=device)
    long = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    settings = Settings(method=options.method, round_to=None, seed=options.seed)
    return Bench(loaded, batches(options.samples), batches(options.sentences), long, settings)


def _num_examples(batches: Sequence[Batch]) -> int:
    return sum(len(batch["input_ids"]) for batch in batches)


def _compare(bench: Bench, results: Sequence[PruneResult]) -> list[dict[str, Any]]:
    """The compact models against the original under their masks, over all sentences.

    The masks of method kwon carry the tuned scales. Other methods refit weights, which no mask can
    express: there the model is compared as it was before the refit.
    """
    from rfprune.model.compact import compact
    from rfprune.model.masks import masked

    model, sentences = bench.loaded.model, bench.sentences
    tuned = bench.settings.method == "kwon"
    dense = _logits(model, sentences)
    rows = []
    for result in results:
        with masked(model, result.layout, result.masks):
            under_masks = _logits(model, sentences)
        small = result.model if tuned else compact(model, result.layout, result.masks)
        compacted = _logits(small, sentences)
        row = {
            "constraint": result.constraint.ratio,
            "achieved": result.achieved,
            "compared": "after tuning" if tuned else "before the refit",
            "max_difference": _max_difference(compacted, under_masks),
            "max_difference_masked_dense": _max_difference(under_masks, dense),
            "bytes": _saved_bytes(result.model),
            "layers": list(result.layers),
            "warnings": list(result.warnings),
        }
        rows.append(row)
    return rows


def _logits(model: Any, batches: Sequence[Batch]) -> list[Tensor]:
    """Per batch all logits: (B, C) or, for question answering, (2, B, S)."""
    import torch

    with torch.inference_mode():
        outputs = [model.eval()(**batch) for batch in batches]
    return [
        output.logits
        if "logits" in output
        else torch.stack([output.start_logits, output.end_logits])
        for output in outputs
    ]


def _max_difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    import torch

    return float(torch.stack([(a - b).abs().max() for a, b in zip(one, other, strict=True)]).max())


def _saved_bytes(model: Any) -> int:
    """Bytes of the weights on the disk."""
    from rfprune.checkpoints.loading import quiet_transformers

    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("model*.safetensors"))


def _speed(batch: Batch, rounds: int, model: Any, results: Sequence[PruneResult]) -> dict[str, Any]:
    """Milliseconds of a forward pass, and speedups as ratios of times of the same round."""
    import numpy as np

    from rfprune.cost.macs import mac_costs
    from rfprune.model.masks import num_kept

    num_examples, length = batch["input_ids"].shape
    times = np.array(_time_in_turn([model, *(r.model for r in results)], batch, rounds))
    rows = []
    for result, own_times in zip(results, times[1:], strict=True):
        costs = mac_costs(result.layout, length)
        row = {
            "constraint": result.constraint.ratio,
            "ms": _spread(1000 * own_times),
            "speedup": _spread(times[0] / own_times),
            "ideal_by_constraint": 1 / result.constraint.ratio,
            "ideal_by_macs": costs.original / costs.total(num_kept(result.masks)),
        }
        rows.append(row)
    conditions = {"batch_size": num_examples, "tokens": length, "rounds": rounds}
    return conditions | {"original_ms": _spread(1000 * times[0]), "constraints": rows}


def _time_in_turn(models: Sequence[Any], batch: Batch, rounds: int) -> list[list[float]]:
    """Seconds of a forward pass, (models, rounds). Every round starts with another model, so that
    a machine that slows down slows all alike."""
    import torch

    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for number in range(-WARM_UP_ROUNDS, rounds):
            for position in range(len(models)):
                which = (position + number) % len(models)
                start = _now(batch)
                models[which](**batch)
                seconds = _now(batch) - start
                if number >= 0:
                    times[which].append(seconds)
    return times


def _now(batch: Batch) -> float:
    """The time when the device has done all its work."""
    import torch

    device = batch["input_ids"].device.type
    if device != "cpu":
        getattr(torch, device).synchronize()
    return time.perf_counter()


def _spread(values: Any) -> dict[str, float]:
    """Median and quartiles."""
    import numpy as np

    low, middle, high = (float(value) for value in np.percentile(values, (25, 50, 75)))
    return {"median": middle, "quartile_1": low, "quartile_3": high}


def _print_table(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{result['model']}, {result['task']}, {result['settings']['method']}: "
    title += (
        f"{result['sentences']} sentences, {result['threads']} threads, speedups beside 1 / MACs"
    )
    table = Table("constraint", "compact - masked", "masked - dense", "weights", title=title)
    for speed in result["speed"]:
        table.add_column(f"{speed['batch_size']} x {speed['tokens']} tokens", justify="right")
    for index, row in enumerate(result["constraints"]):
        speeds = [speed["constraints"][index] for speed in result["speed"]]
        table.add_row(
            f"{row['constraint']:g}",
            f"{row['max_difference']:.1e}",
            f"{row['max_difference_masked_dense']:.3g}",
            f"{row['bytes'] / 1e6:.1f} of {result['original_bytes'] / 1e6:.1f} MB",
            *(f"{one['speedup']['median']:.2f} / {one['ideal_by_macs']:.2f}" for one in speeds),
        )
    Console(highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
