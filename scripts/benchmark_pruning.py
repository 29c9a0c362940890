"""How long pruning takes, stage by stage, and how much memory, against what any method must pay.

Seconds are set against one forward and backward pass with parameter gradients over the same
examples (a training step without its optimizer, in evaluation mode), and against the floor of one
such pass and two forward passes, both measured before and after every run. Peak memory is that of
a fresh process.

python scripts/benchmark_pruning.py --model ... --task mrpc --data-dir data --output results/...
python scripts/benchmark_pruning.py --synthetic --output results/...
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import one another

from rfprune.cli.exit_codes import NOTHING_WRITTEN, script
from rfprune.errors import UserError
from rfprune.settings import METHODS
from rfprune.tasks.registry import TASKS, get_task

if TYPE_CHECKING:
    from torch import Tensor

    from rfprune.checkpoints.loading import LoadedCheckpoint

Batches = Sequence[Mapping[str, "Tensor"]]

BATCH_SIZE = 32
HEAD_WIDTH = 64
VOCABULARY = 1000
"""Of random models: few embeddings, so that the layers are what is timed."""

TOKENS = 64
"""Of a random example."""


@script(NOTHING_WRITTEN)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process); 0 done, 2 user error, 130 stopped."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    _check(options)
    if options.process:
        print(json.dumps(_process(options.process, options)))
        return 0
    result = _synthetic(options, arguments) if options.synthetic else _real(options, arguments)
    text = json.dumps(result, indent=1, allow_nan=False)
    options.output.write_text(text + "\n", encoding="utf-8")
    _print_table(result)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--model", help="a folder, hub id, alias, or demo")
    add("--task", help=", ".join(TASKS))
    add("--data-dir", type=Path, help="local data, DIR/TASK/...; else the hub")
    add("--method", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add("--constraint", type=float, default=0.5, help="fraction of MACs to keep (default: 0.5)")
    add("--samples", nargs="+", type=int, default=[2048], help="examples, several to see growth")
    add("--rounds", type=int, default=3, help="runs of each method; medians count (default: 3)")
    add("--synthetic", action="store_true", help="random BERTs of several sizes, random tokens")
    add("--widths", nargs="+", type=int, default=[256, 128, 512, 768], help="at the first depth")
    add("--depths", nargs="+", type=int, default=[4, 2, 8, 12], help="at the first width")
    add("--curves", nargs=2, type=int, default=[768, 12], help="width and depth: curves alone")
    add("--output", type=Path, required=True, metavar="FILE.json", help="a new file")
    add("--process", choices=("load", "curves", *METHODS), help=argparse.SUPPRESS)
    return parser


def _check(options: argparse.Namespace) -> None:
    """See that all is there before minutes are spent."""
    from rfprune.cost.constraint import Constraint

    Constraint("mac", options.constraint)
    if not options.synthetic:
        if not (options.model and options.task):
            raise UserError("--model and --task are needed, or --synthetic.")
        get_task(options.task)
    if options.rounds < 1:
        raise UserError(f"--rounds {options.rounds} times nothing: give 1 or more.")
    if options.output.exists():
        raise UserError(f"--output {options.output} exists already: give the name of a new file.")
    if not options.output.absolute().parent.is_dir():
        raise UserError(f"--output {options.output}: there is no folder of that name, make it.")


def _real(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """A checkpoint on its task: the contents of the output file."""
    # before anything is loaded here: a new process inherits the peak of the one that started it
    found = {name: _in_process(name, arguments) for name in ("load", *options.method)}
    loaded = _load(options)
    runs = []
    for num_samples in options.samples:
        batches = _batches(options, loaded, num_samples)
        runs.append(_time_methods(loaded.model, batches, options))
    model_bytes = found["load"]["model_bytes"]
    return _conditions(options) | {
        "model": Path(loaded.source).name,
        "task": options.task,
        "runs": runs,
        "model_bytes": model_bytes,
        "allowed_bytes": 2 * model_bytes + 10**9,
        "peak_bytes": {name: process["peak_bytes"] for name, process in found.items()},
    }


def _synthetic(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Random models: the contents of the output file."""
    curves = _in_process("curves", arguments)
    sizes = [(width, options.depths[0]) for width in options.widths]
    sizes += [(options.widths[0], depth) for depth in options.depths[1:]]
    runs = []
    for width, depth in sizes:
        model = _random_model(width, depth)
        batches = _random_batches(options.samples[0])
        runs.append(_time_methods(model, batches, options))
    return _conditions(options) | {
        "model": "random BERT",
        "runs": runs,
        "curves": curves,
        "model_bytes": curves["model_bytes"],
        "peak_bytes": {"error curves": curves["peak_bytes"]},
    }


def _conditions(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from rfprune.report.report_json import versions

    return {
        "schema": 1,
        "constraint": options.constraint,
        "batch_size": BATCH_SIZE,
        "rounds": options.rounds,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "dtype": "float32",
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
    }


def _load(options: argparse.Namespace) -> LoadedCheckpoint:
    import torch

    from rfprune.checkpoints.loading import load

    cpu = torch.device("cpu")
    return load(options.model, get_task(options.task), device=cpu, dtype=torch.float32)


def _batches(options: argparse.Namespace, loaded: LoadedCheckpoint, num_samples: int) -> Batches:
    from rfprune.checkpoints.loading import resolve_data_dir, resolve_max_length
    from rfprune.tasks.calibration import calibration_batches

    task = get_task(options.task)
    return calibration_batches(
        task,
        loaded.tokenizer,
        resolve_data_dir(options.model, options.data_dir),
        num_samples=num_samples,
        batch_size=BATCH_SIZE,
        max_length=resolve_max_length(loaded, task, None),
        seed=0,
        with_labels=True,  # for the training step; pruning does not look at them
    )


def _random_model(width: int, depth: int) -> Any:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=max(1, width // HEAD_WIDTH),
        intermediate_size=4 * width,
    )
    return BertForSequenceClassification(config).eval()


def _random_batches(num_samples: int) -> Batches:
    import torch

    ids = torch.randint(VOCABULARY, (num_samples, TOKENS)).split(BATCH_SIZE)
    return [{"input_ids": part, "labels": torch.arange(len(part)) % 2} for part in ids]


def _time_methods(model: Any, batches: Batches, options: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds: seconds by stage, and their sum as a multiple of the two yardsticks,
    each the mean of what was measured right before and right after."""
    from rfprune.cost.constraint import Constraint
    from rfprune.model.batch import token_mask
    from rfprune.pruning import prune
    from rfprune.settings import Settings

    _yardsticks(model, batches[:2])  # the first passes of a process are slower
    yardsticks = [_yardsticks(model, batches)]
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in options.method}
    for _ in range(options.rounds):
        for method in options.method:
            constraint = Constraint("mac", options.constraint)
            result = prune(model, batches, constraint, Settings(method, round_to=None))
            yardsticks.append(_yardsticks(model, batches))
            total = result.seconds["prune_total"]
            around = _each(statistics.mean, yardsticks[-2:])
            multiples = {f"times_{name}": total / seconds for name, seconds in around.items()}
            runs[method].append(result.seconds | multiples)
    return {
        "hidden_size": model.config.hidden_size,
        "layers": model.config.num_hidden_layers,
        "samples": sum(len(batch["input_ids"]) for batch in batches),
        "tokens": sum(int(token_mask(batch).sum()) for batch in batches),
        "yardsticks": _each(statistics.median, yardsticks),
        "methods": {
            method: _each(statistics.median, own) | {"all_seconds": [r["prune_total"] for r in own]}
            for method, own in runs.items()
        },
    }


def _yardsticks(model: Any, batches: Batches) -> dict[str, float]:
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
    """Summarise the rows' values of each name."""
    return {name: float(summarise([row[name] for row in rows])) for name in rows[0]}


def _in_process(name: str, arguments: Sequence[str]) -> dict[str, float]:
    """Run `_process(name)` in a fresh process."""
    command = [sys.executable, __file__, *arguments, "--process", name]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # it finds what this one finds
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    if done.returncode:
        _, _, reason = done.stderr.rpartition("error: ")
        raise UserError(reason.strip() or f"a process of its own ended with {done.returncode}.")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _process(name: str, options: argparse.Namespace) -> dict[str, float]:
    """What a fresh process is for: all error curves of one random model; or to load model and data,
    and to prune if `name` is that of a method."""
    from rfprune.cost.constraint import Constraint
    from rfprune.pruning import prune
    from rfprune.settings import Settings

    if name == "curves":
        return _curves(options)
    loaded = _load(options)
    batches = _batches(options, loaded, max(options.samples))
    if name in METHODS:
        prune(
            loaded.model,
            batches,
            Constraint("mac", options.constraint),
            Settings(name, round_to=None),
        )
    return {"peak_bytes": _peak_bytes(), "model_bytes": loaded.model.get_memory_footprint()}


def _curves(options: argparse.Namespace) -> dict[str, float]:
    """Seconds and memory of all error curves of one random model."""
    from rfprune.model.frozen import frozen
    from rfprune.model.layout import layout_of
    from rfprune.stages.calibration import Calibration
    from rfprune.stages.curvature import collect_curvature, error_curves

    width, depth = options.curves
    model, batches = _random_model(width, depth), _random_batches(options.samples[0])
    layout = layout_of(model)
    with frozen(model):
        collected = collect_curvature(Calibration(model, layout, batches))
    collected_peak, start = _peak_bytes(), time.perf_counter()
    error_curves(model, layout, collected)
    return {
        "hidden_size": width,
        "layers": depth,
        "seconds": time.perf_counter() - start,
        "model_bytes": model.get_memory_footprint(),
        "collected_peak_bytes": collected_peak,
        "peak_bytes": _peak_bytes(),
    }


def _peak_bytes() -> int:
    """The most memory this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _print_table(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    title = f"{result['model']}: seconds of pruning, {result['threads']} threads"
    columns = ("layers x width", "examples", "method", "seconds", "x one pass", "x the floor")
    table = Table(*columns, title=title)
    for run in result["runs"]:
        for method, row in run["methods"].items():
            table.add_row(
                f"{run['layers']} x {run['hidden_size']}",
                str(run["samples"]),
                method,
                f"{row['prune_total']:.1f}",
                f"{row['times_forward_backward']:.2f}",
                f"{row['times_floor']:.2f}",
            )
    console.print(table)
    if "curves" in result:
        layers, width, seconds = (result["curves"][n] for n in ("layers", "hidden_size", "seconds"))
        console.print(f"error curves of {layers} layers of width {width}: {seconds:.1f} s")
    for name, peak in result["peak_bytes"].items():
        console.print(f"peak of {name}: {peak / 1e6:.0f} MB")
    console.print(f"weights of the model: {result['model_bytes'] / 1e6:.0f} MB")


if __name__ == "__main__":
    sys.exit(main())
