"""Time the pruning of a checkpoint by one process and by several, in turns, on CPU.

Each process has one thread, so that several have the cores that one has not. Every run is a fresh
launch; what is compared is its seconds by stage, not the start of Python. Masks and weights of all
runs are compared as well: speed that changes the outcome would be worth nothing.

python scripts/benchmark_processes.py --model demo --task sst2 --output results/processes_...json
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import one another

from rfprune.cli.exit_codes import NOTHING_WRITTEN, script
from rfprune.errors import UserError
from rfprune.settings import METHODS
from rfprune.tasks.registry import TASKS, get_task

BATCH_SIZE = 32


@script(NOTHING_WRITTEN)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process); 0 done, 2 user error, 130 stopped."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    if options.process:
        print(json.dumps(_process(options)))
        return 0
    _check(options)
    result = _measure(options, arguments)
    text = json.dumps(result, indent=1, allow_nan=False)
    options.output.write_text(text + "\n", encoding="utf-8")
    _print_table(result)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, help="a folder, hub id, alias, or demo")
    add("--task", required=True, help=", ".join(TASKS))
    add("--data-dir", type=Path, help="local data, DIR/TASK/...; else the hub")
    add("--method", nargs="+", choices=METHODS, default=["curvature", "kwon"])
    add("--constraint", type=float, default=0.5, help="fraction of MACs to keep (default: 0.5)")
    add("--samples", type=int, default=512, help="calibration examples (default: 512)")
    add("--processes", nargs="+", type=int, default=[1, 2], help="default: 1 2")
    add("--rounds", type=int, default=3, help="launches of each; medians count (default: 3)")
    add("--output", type=Path, required=True, metavar="FILE.json", help="a new file")
    add("--process", action="store_true", help=argparse.SUPPRESS)
    return parser


def _check(options: argparse.Namespace) -> None:
    """See that all is there before minutes are spent."""
    get_task(options.task)
    if options.rounds < 1 or min(options.processes) < 1:
        raise UserError("--rounds and --processes are whole numbers of at least 1.")
    if options.output.exists():
        raise UserError(f"--output {options.output} exists already: give the name of a new file.")
    if not options.output.absolute().parent.is_dir():
        raise UserError(f"--output {options.output}: there is no folder of that name, make it.")


def _measure(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """The contents of the output file; what is compared runs in turns."""
    from rfprune.report.report_json import versions

    launches: dict[int, list[dict[str, Any]]] = {count: [] for count in options.processes}
    for _ in range(options.rounds):
        for count, runs in launches.items():
            runs.append(_launch(count, arguments))
    reference = launches[options.processes[0]][0]
    return {
        "schema": 1,
        "model": reference["model"],
        "task": options.task,
        "constraint": options.constraint,
        "samples": options.samples,
        "batch_size": BATCH_SIZE,
        "rounds": options.rounds,
        "device": "cpu",
        "threads_a_process": 1,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
        "methods": {
            method: {str(count): _summary(runs, method) for count, runs in launches.items()}
            for method in options.method
        },
        "same_masks": all(
            run[method]["masks"] == reference[method]["masks"]
            for runs in launches.values()
            for run in runs
            for method in options.method
        ),
    }


def _summary(runs: Sequence[Mapping[str, Any]], method: str) -> dict[str, Any]:
    """Medians of the seconds by stage, and all sums."""
    seconds = [run[method]["seconds"] for run in runs]
    medians = {name: statistics.median(row[name] for row in seconds) for name in seconds[0]}
    return medians | {"all_seconds": [row["prune_total"] for row in seconds]}


def _launch(count: int, arguments: Sequence[str]) -> dict[str, Any]:
    """Run `_process` in so many new processes; what the main one found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(count):
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(count),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, __file__, *arguments, "--process"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        started.append(process)
    outputs = [process.communicate() for process in started]
    for process, (_, errors) in zip(started, outputs, strict=True):
        if process.returncode:
            _, _, reason = errors.rpartition("error: ")
            raise UserError(reason.strip() or f"a process ended with {process.returncode}.")
    found: dict[str, Any] = json.loads(outputs[0][0])
    return found


def _process(options: argparse.Namespace) -> dict[str, Any]:
    """Load, and prune by each method; by method the seconds by stage and a hash of the masks."""
    import hashlib

    import torch

    from rfprune import distributed
    from rfprune.checkpoints.loading import load, resolve_data_dir, resolve_max_length
    from rfprune.cost.constraint import Constraint
    from rfprune.pruning import prune
    from rfprune.settings import Settings
    from rfprune.tasks.calibration import calibration_batches

    task, cpu = get_task(options.task), torch.device("cpu")
    with distributed.process_group(cpu):
        loaded = load(options.model, task, device=cpu, dtype=torch.float32)
        batches = calibration_batches(
            task,
            loaded.tokenizer,
            resolve_data_dir(options.model, options.data_dir),
            num_samples=options.samples,
            batch_size=BATCH_SIZE,
            max_length=resolve_max_length(loaded, task, None),
            seed=0,
            with_labels=False,
        )
        constraint = Constraint("mac", options.constraint)
        found: dict[str, Any] = {"model": Path(loaded.source).name}
        few = batches[: distributed.world_size()]
        prune(loaded.model, few, constraint)  # the first passes of a process are slower
        for method in options.method:
            distributed.barrier()
            result = prune(
                loaded.model, batches, constraint, Settings(method=method, round_to=None)
            )
            kept = b"".join((mask != 0).numpy().tobytes() for mask in result.masks)
            digest = hashlib.sha256(kept).hexdigest()
            found[method] = {"seconds": result.seconds, "masks": digest}
        distributed.barrier()
    return found


def _print_table(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    title = f"{result['model']}, {result['samples']} examples: seconds (of one process)"
    stages = ("collect", "search", "tune", "prune_total")
    table = Table("method", "processes", *stages, title=title)
    for method, rows in result["methods"].items():
        first = next(iter(rows.values()))
        for count, row in rows.items():
            cells = [f"{row[name]:.1f} ({row[name] / first[name]:.2f})" for name in stages]
            table.add_row(method, count, *cells)
    console.print(table)
    console.print(f"The same masks in all runs: {'yes' if result['same_masks'] else 'NO'}")


if __name__ == "__main__":
    sys.exit(main())
