"""Where the time of a pruned model goes, by kind of operator: `speedup --profile`.

If everything shrank as the MACs did, a kind of operator would take its share of the original's time
over the ideal speedup. The time beyond that is its loss. The losses of all kinds add up to the gap
between the ideal time and the measured one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from rfprune.cost.macs import mac_costs
from scripts.bench import harness
from scripts.bench.harness import Conditions, Line, machine
from scripts.bench.models import Batch, layers_of, random_batch
from scripts.bench.timed_models import (
    Run,
    default_output,
    load_timed_models,
    structure_of,
    time_models,
)

PASSES = 5
"""Profiled forward passes of each model, in turn, after two that warm up."""

VARIED = ("constraint", "round_to")
"""What models that are profiled side by side differ in."""

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


def complete_profile(options: argparse.Namespace, cells: Sequence[Conditions]) -> int:
    """Profile original and pruned models at one shape, for every dtype; the exit code."""
    output = options.output or default_output("operators", options)
    shapes = harness.grouped(cells, [name for name in cells[0] if name not in VARIED])
    by_key = {tuple(_shared(group[0]).values()): group for group in shapes}

    def measure(missing: Sequence[Conditions]) -> Iterator[dict[str, Any]]:
        for one in missing:
            yield one | _profile(by_key[tuple(one.values())], options)

    wanted = [_shared(group[0]) for group in shapes]
    same = {"machine": machine(options.device)}
    return harness.complete(__file__, output, wanted, measure, same=same)


def _shared(cell: Conditions) -> Conditions:
    return {name: value for name, value in cell.items() if name not in VARIED}


def _profile(group: Sequence[Conditions], options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of one forward pass, by kind of operator, of all models of one shape.

    On the CPU "all" is the time of the pass while it was profiled; on a GPU, where profiling slows
    down Python, it was timed without.
    """
    cell = group[0]
    models = load_timed_models(options, group)
    batch = random_batch(models.dense, cell["batch_size"], cell["length"])
    runs = [models.run_dense, *(run for _, run in models.pruned.values())]
    with torch.inference_mode():
        for run in runs * 2:
            run(batch)
        rounds = [[_profiled(run, batch) for run in runs] for _ in range(PASSES)]
    passes = [_median_pass([each[which] for each in rounds]) for which in range(len(runs))]
    speedups = [
        median(each[0]["ms"]["all"] / each[which]["ms"]["all"] for each in rounds)
        for which in range(1, len(runs))
    ]
    if batch["input_ids"].is_cuda:
        ratios = time_models(models, group, options)
        speedups = [1 / ratio.ratio for ratio in ratios]
        times = [ratios[0].original, *(ratio.pruned for ratio in ratios)]
        for own, timing in zip(passes, times, strict=True):
            own["ms"][OUTSIDE] += timing.median_ms - own["ms"]["all"]
            own["ms"]["all"] = timing.median_ms
    costs = mac_costs(models.layout, cell["length"])
    rows = []
    for one, speedup, own in zip(group, speedups, passes[1:], strict=True):
        kept = models.pruned[structure_of(one)][0]
        ideal = costs.original / costs.total(kept)
        row = {
            **{name: one[name] for name in VARIED},
            "ideal": round(ideal, 5),
            "speedup": round(speedup, 5),
            "layers": layers_of(models.layout, kept),
            **_rounded(own),
            "lost_ms": {
                name: round(own["ms"][name] - passes[0]["ms"][name] / ideal, 5)
                for name in own["ms"]
            },
        }
        rows.append(row)
    return {"passes": PASSES, "dense": _rounded(passes[0]), "pruned": rows}


def _median_pass(passes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The pass of median time: its parts add up, which medians of parts would not."""
    return sorted(passes, key=lambda one: one["ms"]["all"])[len(passes) // 2]


def _rounded(one: Line) -> dict[str, Any]:
    return {**one, "ms": {name: round(value, 5) for name, value in one["ms"].items()}}


def _profiled(run: Run, batch: Batch) -> dict[str, Any]:
    """Milliseconds of a pass by kind of operator, and every shape of matrix products with its
    rate."""
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
