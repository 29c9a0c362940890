"""Where the time of a pruned model goes, by kind of operator, for scripts/benchmark_speedup.py.

If everything shrank as the MACs did, a kind of operator would take its share of the original's time
over the ideal speedup. What it takes beyond that is what it loses; the losses of all kinds add up
to the whole gap between the ideal time and the true one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from rfprune.checkpoints.device import pick_device
from rfprune.cost.macs import mac_costs
from rfprune.errors import UserError
from scripts.bench import say
from scripts.speedup_models import Batch, layers_of, load_dense, make_batch
from scripts.speedup_timing import Cell, Run, machine, make_field, structure_of, time_field

PASSES = 5
"""Forward passes of each model that are profiled, in turn, after two that warm up."""

VARIED = ("constraint", "round_to")
"""What the models that are profiled side by side differ in."""

OPERATORS = ("aten::", "mkldnn::")
"""Beginnings of the names of operators."""

KINDS: Mapping[str, tuple[str, ...]] = {
    "matrix products": ("aten::addmm", "aten::mm", "aten::bmm", "mkldnn::_linear_pointwise"),
    "attention": (
        "aten::_scaled_dot_product",
        "aten::_flash_attention_forward",
        "aten::_efficient_attention_forward",
        "aten::_cudnn_attention_forward",
        "aten::_softmax",
    ),
    "activation": ("aten::gelu", "aten::relu", "aten::silu"),
    "norms": ("aten::native_layer_norm",),
    "residual sums": ("aten::add",),
    "copies": ("aten::copy_", "aten::clone", "aten::cat", "aten::index"),
}
"""Beginnings of operators' names; everything else is "other operators"."""

OTHER, OUTSIDE = "other operators", "outside of operators"
"""Outside: Python, dispatch and, on a GPU, its waiting for work; wall time less all operators."""


def write_profile(options: Any, cells: Sequence[Cell], output: Path) -> None:
    """Profile the original and the pruned models at the first shape; write the JSON, print a table.

    Raises:
        UserError: the output is there already, or the flags ask for another runtime than eager.
    """
    if output.exists():
        raise UserError(f"--output {output} exists already: name another file, or remove it.")
    if options.runtime not in (None, ["eager"]):
        raise UserError("--profile looks at PyTorch's operators: leave --runtime out, or eager.")
    pick_device(options.device)
    first = next(cell for cell in cells if cell["runtime"] == "eager")
    names = ("dtype", "runtime", "batch_size", "length")
    group = [cell for cell in cells if all(cell[name] == first[name] for name in names)]
    result = profile(load_dense(options.synthetic, options.model), group, options)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}.") from error
    say(f"wrote {output}")
    for row in result["pruned"]:
        print_row(row)


def profile(dense: Any, group: Sequence[Cell], options: Any) -> dict[str, Any]:
    """The contents of the output file: milliseconds of one forward pass, by kind of operator.

    On the CPU "all" is the time of the pass while it was profiled; on a GPU, where profiling slows
    down what asks for work, it was timed without.
    """
    cell = group[0]
    field = make_field(dense, group)
    batch = make_batch(field.dense, cell["batch_size"], cell["length"])
    runs = [field.run_dense, *(run for _, run in field.pruned.values())]
    with torch.inference_mode():
        for run in runs * 2:
            run(batch)
        rounds = [[_profiled(run, batch) for run in runs] for _ in range(PASSES)]
    passes = [_middle([each[which] for each in rounds]) for which in range(len(runs))]
    speedups = [
        median(each[0]["ms"]["all"] / each[which]["ms"]["all"] for each in rounds)
        for which in range(1, len(runs))
    ]
    if batch["input_ids"].is_cuda:
        ratios = time_field(field, group, seconds=options.seconds, max_rounds=options.rounds)
        speedups = [1 / ratio.ratio for ratio in ratios]
        times = [ratios[0].original, *(ratio.pruned for ratio in ratios)]
        for own, timing in zip(passes, times, strict=True):
            own["ms"][OUTSIDE] += timing.median_ms - own["ms"]["all"]
            own["ms"]["all"] = timing.median_ms
    costs = mac_costs(field.layout, cell["length"])
    rows = []
    for one, speedup, own in zip(group, speedups, passes[1:], strict=True):
        kept = field.pruned[structure_of(one)][0]
        ideal = costs.original / costs.total(kept)
        row = {
            "constraint": one["constraint"],
            "round_to": one["round_to"],
            "ideal": round(ideal, 5),
            "speedup": round(speedup, 5),
            "layers": layers_of(field.layout, kept),
            **_rounded(own),
            "lost_ms": _lost(passes[0]["ms"], own["ms"], ideal),
        }
        rows.append(row)
    return {
        "schema": 1,
        **{name: value for name, value in cell.items() if name not in VARIED},
        "passes": PASSES,
        "load_average": round(os.getloadavg()[0], 2),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(cell["device"]),
        "dense": _rounded(passes[0]),
        "pruned": rows,
    }


def _middle(passes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The pass of median time: its parts add up, which medians of parts would not."""
    return sorted(passes, key=lambda one: one["ms"]["all"])[len(passes) // 2]


def _rounded(one: Mapping[str, Any]) -> dict[str, Any]:
    return {**one, "ms": {name: round(value, 5) for name, value in one["ms"].items()}}


def _lost(dense_ms: Mapping[str, float], own_ms: Mapping[str, float], ideal: float) -> Any:
    return {name: round(own_ms[name] - dense_ms[name] / ideal, 5) for name in own_ms}


def _profiled(run: Run, batch: Batch) -> dict[str, Any]:
    """Milliseconds of a pass by kind of operator, and every shape of matrix products with what it
    reaches."""
    on_gpu = batch["input_ids"].is_cuda
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        start = time.perf_counter()
        run(batch)
        if on_gpu:
            torch.cuda.synchronize()
        wall_ms = 1000 * (time.perf_counter() - start)
    milliseconds = dict.fromkeys((*KINDS, OTHER), 0.0)
    products: list[dict[str, float]] = []
    for event in profiler.key_averages(group_by_input_shape=True):
        if not event.key.startswith(OPERATORS):  # kernels are counted with their operators
            continue
        own_ms = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000
        milliseconds[_kind_of(event.key)] += own_ms
        if event.key == "aten::addmm" and own_ms:
            products.append(_product(event.input_shapes, event.count, own_ms))
    milliseconds[OUTSIDE] = wall_ms - sum(milliseconds.values())
    return {"ms": milliseconds | {"all": wall_ms}, "products": products}


def _kind_of(operator: str) -> str:
    return next((kind for kind, names in KINDS.items() if operator.startswith(names)), OTHER)


def _product(shapes: Sequence[Sequence[int]], calls: int, own_ms: float) -> dict[str, float]:
    """(rows, inputs) times (inputs, outputs), and 1e9 multiply-accumulates a second."""
    (rows, inputs), (_, outputs) = shapes[1:3]
    return {
        "rows": rows,
        "inputs": inputs,
        "outputs": outputs,
        "calls": calls,
        "ms": round(own_ms, 5),
        "gmacs_per_second": round(rows * inputs * outputs * calls / own_ms / 1e6, 1),
    }


def print_row(row: Mapping[str, Any]) -> None:
    """What one constraint loses, and to what, on standard error."""
    ideal_ms = row["ms"]["all"] - row["lost_ms"]["all"]
    say(
        f"{row['constraint']:g} of MACs, neurons by {row['round_to']}: {row['speedup']:.2f} of "
        f"{row['ideal']:.2f}; {row['ms']['all']:.2f} ms, ideal {ideal_ms:.2f} ms"
    )
    for name, lost in row["lost_ms"].items():
        share = lost / ideal_ms
        say(f"  {name:22} {row['ms'][name]:9.3f} ms, lost {lost:+9.3f} ms ({share:+.1%} of ideal)")
