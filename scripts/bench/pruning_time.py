"""Seconds and memory of pruning a checkpoint, beside those of a training step on the same examples.

python -m scripts.bench.pruning_time --model CHECKPOINT --task sst2 --data-dir data --samples 1024

The two yardsticks are one forward and backward pass with gradients of all parameters (a training
step without its optimizer, in eval mode), and the floor: one such pass and two forward passes. Both
are timed before and after every run. Peak memory is that of a fresh process.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.settings import METHODS
from scripts.bench import harness
from scripts.bench.harness import Conditions, machine
from scripts.bench.models import Batch, load_checkpoint, settings_of

LOAD = "load"
"""The process that only loads model and data."""


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    if options.alone:
        print(json.dumps(_alone(options)))
        return 0
    shared = harness.conditions_of(options, ("model", "task", "constraint", "batch_size"))
    wanted = [
        shared | one
        for one in harness.each_combination(
            requested_samples=options.samples, method=options.method
        )
    ]
    here = machine("cpu")
    output = options.output or harness.default_output(
        "pruning_time", shared["model"], f"{here['threads']}thread"
    )
    same = {name: here[name] for name in ("device_name", "threads")}
    measure = partial(_measure, options, arguments)
    return harness.complete(
        __file__, output, wanted, measure, group_by=("requested_samples",), same=same
    )


def _parser() -> argparse.ArgumentParser:
    names = "model task data-dir method constraint samples batch-size rounds"
    parser = harness.parser_of(
        __doc__, names, method=["curvature", "kwon"], constraint=0.5, samples=[2048], rounds=3
    )
    parser.add_argument("--alone", choices=(LOAD, *METHODS), help=argparse.SUPPRESS)
    return parser


def _measure(
    options: argparse.Namespace, arguments: Sequence[str], group: Sequence[Conditions]
) -> Iterator[dict[str, Any]]:
    """Medians over rounds of the seconds by stage, and their sum as a multiple of the yardsticks,
    each the mean of its values right before and right after."""
    from rfprune.cost.constraint import Constraint
    from rfprune.model.batch import token_mask
    from rfprune.pruning import prune

    samples, methods = group[0]["requested_samples"], [one["method"] for one in group]
    constraint = Constraint("mac", options.constraint)
    # before anything is loaded here: a new process inherits the peak of its parent
    peaks = {
        name: harness.in_process(
            "scripts.bench.pruning_time",
            [*arguments, "--samples", str(samples), "--alone", name],
        )
        for name in (LOAD, *methods)
    }
    checkpoint = load_checkpoint(options)
    model, batches = checkpoint.model, checkpoint.batches(samples, seed=0, labels=True)
    yardsticks_of(model, batches[:2])  # the first passes of a process are slower
    yardsticks = [yardsticks_of(model, batches)]
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for _ in range(options.rounds):
        for method in methods:
            result = prune(model, batches, constraint, settings_of(method=method))
            yardsticks.append(yardsticks_of(model, batches))
            total = result.seconds["prune_total"]
            around = _each(statistics.mean, yardsticks[-2:])
            multiples = {f"times_{name}": total / seconds for name, seconds in around.items()}
            runs[method].append(result.seconds | multiples)
    for conditions in group:
        own = runs[conditions["method"]]
        yield {
            **conditions,
            "tokens": sum(int(token_mask(batch).sum()) for batch in batches),
            "rounds": options.rounds,
            "yardsticks": _each(statistics.median, yardsticks),
            "seconds": _each(statistics.median, own),
            "all_seconds": [run["prune_total"] for run in own],
            "model_bytes": peaks[LOAD]["model_bytes"],
            "load_peak_bytes": peaks[LOAD]["peak_bytes"],
            "peak_bytes": peaks[conditions["method"]]["peak_bytes"],
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


def _each(summarise: Any, rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(summarise([row[name] for row in rows])) for name in rows[0]}


def _alone(options: argparse.Namespace) -> dict[str, float]:
    """Peak memory of a process that loads model and data, and prunes unless it is LOAD."""
    from rfprune.cost.constraint import Constraint
    from rfprune.pruning import prune

    checkpoint = load_checkpoint(options)
    batches = checkpoint.batches(options.samples[0], seed=0, labels=True)
    if options.alone != LOAD:
        constraint = Constraint("mac", options.constraint)
        prune(checkpoint.model, batches, constraint, settings_of(method=options.alone))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "peak_bytes": peak if sys.platform == "darwin" else 1024 * peak,
        "model_bytes": checkpoint.model.get_memory_footprint(),
    }


if __name__ == "__main__":
    sys.exit(main())
