"""Pruning by one process and by several, in turn, on a CPU: seconds by stage, and equal masks.

python -m scripts.bench.processes --model demo --task sst2 --samples 512 --processes 1 2

Each process has one thread, so that several processes use cores that one leaves idle. Every run is
a fresh launch; only the seconds of pruning are compared, not the start of Python.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from rfprune.cli.exit_codes import RESUMABLE, script
from scripts.bench import harness
from scripts.bench.harness import Conditions
from scripts.bench.models import load_checkpoint, num_examples, settings_of


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    if options.alone:
        print(json.dumps(_prune(options)))
        return 0
    names = ("model", "task", "constraint", "batch_size")
    shared = harness.conditions_of(options, names) | {"requested_samples": options.samples}
    wanted = [
        shared | one
        for one in harness.each_combination(method=options.method, processes=options.processes)
    ]
    cores = os.cpu_count()
    output = options.output or harness.default_output("processes", shared["model"], f"{cores}core")
    measure = partial(_measure, options, arguments)
    return harness.complete(
        __file__, output, wanted, measure, group_by=("method",), same={"cores": cores}
    )


def _parser() -> argparse.ArgumentParser:
    names = "model task data-dir method constraint samples batch-size rounds"
    parser = harness.parser_of(
        __doc__, names, method=["curvature", "kwon"], constraint=0.5, samples=512, rounds=3
    )
    count = harness.count("--processes")
    parser.add_argument("--processes", nargs="+", type=count, default=[1, 2], help="default: 1 2")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    return parser


def _measure(
    options: argparse.Namespace, arguments: Sequence[str], group: Sequence[Conditions]
) -> Iterator[dict[str, Any]]:
    """Medians over the rounds; the numbers of processes take turns."""
    method = group[0]["method"]
    runs: dict[int, list[dict[str, Any]]] = {one["processes"]: [] for one in group}
    for _ in range(options.rounds):
        for count, own in runs.items():
            own.append(_launch(count, [*arguments, "--method", method, "--alone"]))
    digests = {run["masks"] for own in runs.values() for run in own}
    for conditions in group:
        own = runs[conditions["processes"]]
        seconds = [run["seconds"] for run in own]
        yield {
            **conditions,
            "samples": own[0]["samples"],
            "rounds": options.rounds,
            "threads_a_process": 1,
            "load_average": os.getloadavg()[0],
            "seconds": {
                name: statistics.median(row[name] for row in seconds) for name in seconds[0]
            },
            "all_seconds": [row["prune_total"] for row in seconds],
            "same_masks": len(digests) == 1,
        }


def _launch(count: int, arguments: Sequence[str]) -> dict[str, Any]:
    """Prune by so many new processes; the answer of the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environments = [
        {
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(count),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for rank in range(count)
    ]
    found: dict[str, Any]
    found, *_ = harness.in_processes("scripts.bench.processes", arguments, environments)
    return found


def _prune(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds by stage and a digest of the masks, in one process of a group."""
    import torch

    from rfprune import distributed
    from rfprune.cost.constraint import Constraint
    from rfprune.pruning import prune

    with distributed.process_group(torch.device("cpu")):
        checkpoint = load_checkpoint(options)
        batches = checkpoint.batches(options.samples, seed=0)
        constraint = Constraint("mac", options.constraint)
        few = batches[: distributed.world_size()]
        prune(checkpoint.model, few, constraint)  # the first passes of a process are slower
        distributed.barrier()
        result = prune(checkpoint.model, batches, constraint, settings_of(method=options.method[0]))
        distributed.barrier()
    kept = b"".join((mask != 0).numpy().tobytes() for mask in result.masks)
    return {
        "seconds": result.seconds,
        "samples": num_examples(batches),
        "masks": hashlib.sha256(kept).hexdigest(),
    }


if __name__ == "__main__":
    sys.exit(main())
