"""Original and pruned models in turn on the same batch, for scripts/benchmark_speedup.py."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rfprune.cost.macs import mac_costs
from rfprune.errors import UserError
from rfprune.latency.conditions import device_name
from rfprune.latency.timing import Ratio, TimingBudget, time_ratios
from rfprune.model.layout import Layout, layout_of
from rfprune.report.report_json import versions
from scripts.speedup_models import (
    Batch,
    Kept,
    draw_structure,
    layers_of,
    make_batch,
    prune_to,
    runner,
)

WARM_UP_ROUNDS = {"cpu": 1, "cuda": 3}
"""The first pass compiles; CUDA's graphs are recorded at the second."""

TOLERANCE = 0.003
"""Rounds end when the standard error of every speedup is below this fraction of it."""

Cell = Mapping[str, Any]
Run = Callable[[Batch], object]
Wait = Callable[[bool], None]


@dataclass(frozen=True)
class Field:
    """Who takes part: the original and, by constraint and grid, what is kept and how it is run."""

    dense: Any
    layout: Layout
    run_dense: Run
    pruned: Mapping[tuple[float, int], tuple[Kept, Run]]


def make_field(dense: Any, cells: Sequence[Cell]) -> Field:
    """The models of cells that share device, dtype and runtime; `dense` is moved there."""
    cell = cells[0]
    dense.to(cell["device"], getattr(torch, cell["dtype"]))
    layout = layout_of(dense)
    pruned = {}
    for ratio, round_to in dict.fromkeys(structure_of(cell) for cell in cells):
        kept = draw_structure(layout, ratio, seed=cell["seed"], round_to=round_to)
        run = runner(cell["runtime"], prune_to(dense, layout, kept))
        pruned[ratio, round_to] = kept, run
    return Field(dense, layout, runner(cell["runtime"], dense), pruned)


def structure_of(cell: Cell) -> tuple[float, int]:
    """By what a field knows its pruned models."""
    return cell["constraint"], cell["round_to"]


def measure(
    field: Field, group: Sequence[Cell], *, seconds: float, max_rounds: int
) -> list[dict[str, Any]]:
    """Lines of the file: the cells of one shape, and what was measured for them."""
    ratios = time_field(field, group, seconds=seconds, max_rounds=max_rounds)
    costs = mac_costs(field.layout, group[0]["length"])
    lines = []
    for cell, ratio in zip(group, ratios, strict=True):
        kept = field.pruned[structure_of(cell)][0]
        speedup, ideal = 1 / ratio.ratio, costs.original / costs.total(kept)
        line = {
            **cell,
            "speedup": round(speedup, 5),
            "spread": round(ratio.spread, 5),
            "ideal": round(ideal, 5),
            "quotient": round(speedup / ideal, 5),
            "dense_ms": round(ratio.original.median_ms, 5),
            "pruned_ms": round(ratio.pruned.median_ms, 5),
            "dense_spread": round(ratio.original.spread, 5),
            "rounds": ratio.pruned.rounds,
            "attention": field.dense.config._attn_implementation,
            "layers": layers_of(field.layout, kept),
            "load_average": round(os.getloadavg()[0], 2),
            "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        lines.append(line)
    return lines


def time_field(
    field: Field, group: Sequence[Cell], *, seconds: float, max_rounds: int
) -> list[Ratio]:
    """The original and the pruned models of one shape in turn; compiling is warming up, and not
    counted to `seconds`."""
    calls = warm_up(field, group)
    with torch.inference_mode():
        return time_ratios(
            calls[0],
            calls[1:],
            field.dense.device,
            TimingBudget(seconds, max_rounds=max_rounds, tolerance=TOLERANCE, warm_up_rounds=0),
        )


def warm_up(field: Field, group: Sequence[Cell]) -> list[Callable[[], object]]:
    """Calls of the original and the pruned models on one shape, each of which has been made."""
    batch = make_batch(field.dense, group[0]["batch_size"], group[0]["length"])
    runs = [field.run_dense, *(field.pruned[structure_of(cell)][1] for cell in group)]
    calls: list[Callable[[], object]] = [partial(run, batch) for run in runs]
    with torch.inference_mode():
        for _ in range(WARM_UP_ROUNDS[group[0]["device"]]):
            for call in calls:
                call()
    return calls


@contextmanager
def taking_turns(path: Path | None) -> Iterator[Wait]:
    """Several processes prepare together and measure one at a time, by the lock of one file.

    Gives a function that waits: `wait(False)` until nobody measures, `wait(True)` until nobody does
    anything. Without a file there is nobody to wait for.

    Raises:
        UserError: the file cannot be written.
    """
    if path is None:
        yield lambda _: None
        return
    import fcntl  # not on Windows

    try:
        file = path.open("a")
    except OSError as error:
        raise UserError(f"--turns {path} cannot be written: {error.strerror}.") from error
    with file:
        yield lambda alone: fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)


def forget_compiled() -> None:
    """Free what was compiled, and the graphs that CUDA recorded."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def machine(device: str) -> dict[str, Any]:
    """What must be the same for two cells to stand in one table."""
    names = ("python", "torch", "transformers")
    found = {name: number for name, number in versions().items() if name in names}
    with suppress(PackageNotFoundError):
        found["onnxruntime"] = version("onnxruntime")
    return {
        "device_name": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "tf32": device == "cuda" and torch.backends.cuda.matmul.allow_tf32,
        "versions": found,
    }
