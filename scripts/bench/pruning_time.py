"""Seconds and memory of pruning a checkpoint, by one process or several, beside a training step.

python -m scripts.bench.pruning_time --model CHECKPOINT --task sst2 --samples 1024 --processes 1 2

Every run is a fresh launch, on a CPU; only pruning itself is timed. In every round the yardsticks
are timed too: one forward and backward pass with gradients of all parameters (a training step
without its optimizer, in eval mode), and the floor, one such pass and two forward passes. Several
processes have one thread each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import socket
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from rfprune.cli.exit_codes import RESUMABLE, script
from scripts.bench import harness
from scripts.bench.harness import Conditions, machine
from scripts.bench.models import Batch, load_checkpoint, num_examples

if TYPE_CHECKING:
    from rfprune.result import PruneResult

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "curvature": {"method": "curvature"},
    "kwon": {"method": "kwon"},
    "kwon-lsmr": {"method": "kwon", "teacher": "scheduled", "lsmr": True},
    "kprune": {"peer": "kprune"},
}
"""What is timed (see `scripts.bench.peers.peer.Variant`). `kwon-lsmr` is as published, the authors'
solver included."""

YARDSTICKS = "yardsticks"
"""The process that loads model and data, and times the yardsticks."""

Runs = Sequence[Mapping[str, Any]]


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    if options.alone:
        print(
            json.dumps(
                _time_yardsticks(options) if options.alone == YARDSTICKS else _prune(options)
            )
        )
        return 0
    shared = harness.conditions_of(options, ("model", "task", "constraint", "batch_size"))
    shared["requested_samples"] = options.samples
    wanted = [
        shared | one
        for one in harness.each_combination(method=options.method, processes=options.processes)
    ]
    here = machine("cpu")
    output = options.output or harness.default_output(
        "pruning_time", shared["model"], f"{here['threads']}thread"
    )
    same = {name: here[name] for name in ("device_name", "threads", "cores")}
    measure = partial(_measure, options, arguments)
    return harness.complete(__file__, output, wanted, measure, same=same)


def _parser() -> argparse.ArgumentParser:
    names = "model task data-dir constraint samples batch-size rounds"
    parser = harness.parser_of(__doc__, names, constraint=0.5, rounds=3)
    parser.add_argument(
        "--method", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all"
    )
    number = harness.count("--processes")
    parser.add_argument("--processes", nargs="+", type=number, default=[1], help="default: 1")
    parser.add_argument("--alone", choices=(YARDSTICKS, *VARIANTS), help=argparse.SUPPRESS)
    return parser


def _measure(
    options: argparse.Namespace, arguments: Sequence[str], group: Sequence[Conditions]
) -> Iterator[dict[str, Any]]:
    """Medians over the rounds; all that is compared takes turns."""
    yardsticks: list[dict[str, Any]] = []
    runs: list[list[dict[str, Any]]] = [[] for _ in group]
    for _ in range(options.rounds):
        yardsticks.append(_launch(1, [*arguments, "--alone", YARDSTICKS]))
        for own, one in zip(runs, group, strict=True):
            own.append(_launch(one["processes"], [*arguments, "--alone", one["method"]]))
    step = _medians(yardsticks, "seconds")
    by_method: dict[str, set[str]] = {}
    for own, one in zip(runs, group, strict=True):
        by_method.setdefault(one["method"], set()).update(run["masks"] for run in own)
    for own, conditions in zip(runs, group, strict=True):
        seconds = _medians(own, "seconds")
        total = seconds["prune_total"]
        yield {
            **conditions,
            "settings": own[0]["settings"],
            "samples": own[0]["samples"],
            "tokens": yardsticks[0]["tokens"],
            "rounds": options.rounds,
            "yardsticks": step,
            "seconds": seconds,
            "all_seconds": [run["seconds"]["prune_total"] for run in own],
            **{f"times_{name}": total / value for name, value in step.items()},
            "model_bytes": yardsticks[0]["model_bytes"],
            "load_peak_bytes": max(run["peak_bytes"] for run in yardsticks),
            "peak_bytes": max(run["peak_bytes"] for run in own),
            "same_masks": len(by_method[conditions["method"]]) == 1,
            "load_average": round(os.getloadavg()[0], 2),
        }


def _medians(runs: Runs, name: str) -> dict[str, float]:
    return {key: statistics.median(run[name][key] for run in runs) for key in runs[0][name]}


def _launch(processes: int, arguments: Sequence[str]) -> dict[str, Any]:
    """Start this many processes: the result of the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environments = [
        {**group, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        for rank in range(processes)
    ]
    found: dict[str, Any]
    found, *_ = harness.in_processes(
        "scripts.bench.pruning_time", arguments, environments if processes > 1 else [{}]
    )
    return found


def _prune(options: argparse.Namespace) -> dict[str, Any]:
    """Prune in this process, or in this one of several."""
    import torch

    from rfprune import distributed
    from rfprune.cost.constraint import Constraint
    from rfprune.methods.problem import prepare_problem
    from rfprune.pruning import prune_to_each
    from scripts.bench.peers.peer import collector, settings_of_variant

    variant = VARIANTS[options.alone]
    settings = settings_of_variant(variant, seed=0)
    constraint = Constraint("mac", options.constraint)

    def prune(model: Any, batches: Sequence[Batch]) -> PruneResult:
        problem = prepare_problem(model, batches, settings)
        return next(prune_to_each(problem, [constraint], collect=collector(variant)))

    with distributed.process_group(torch.device("cpu")):
        checkpoint = load_checkpoint(options)
        batches = checkpoint.batches(options.samples, seed=0)
        few = batches[: distributed.world_size()]
        prune(checkpoint.model, few)  # the first passes are slower
        distributed.barrier()
        result = prune(checkpoint.model, batches)
        distributed.barrier()
    kept = b"".join((mask != 0).numpy().tobytes() for mask in result.masks)
    return {
        "seconds": result.seconds,
        "samples": num_examples(batches),
        "settings": asdict(settings),
        "masks": hashlib.sha256(kept).hexdigest(),
        "peak_bytes": _peak_bytes(),
    }


def _time_yardsticks(options: argparse.Namespace) -> dict[str, Any]:
    from rfprune.model.batch import token_mask

    checkpoint = load_checkpoint(options)
    batches = checkpoint.batches(options.samples, seed=0, labels=True)
    peak = _peak_bytes()
    yardsticks_of(checkpoint.model, batches[:2])  # the first passes are slower
    return {
        "seconds": yardsticks_of(checkpoint.model, batches),
        "tokens": sum(int(token_mask(batch).sum()) for batch in batches),
        "model_bytes": checkpoint.model.get_memory_footprint(),
        "peak_bytes": peak,
    }


def yardsticks_of(model: Any, batches: Sequence[Batch]) -> dict[str, float]:
    """Seconds of one forward and backward pass, and of that and two forward passes."""
    import torch

    start = time.perf_counter()
    for batch in batches:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)
    middle = time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            model(**batch)
    end = time.perf_counter()
    forward_backward = middle - start
    return {"forward_backward": forward_backward, "floor": forward_backward + 2 * (end - middle)}


def _peak_bytes() -> int:
    """The most memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    sys.exit(main())
