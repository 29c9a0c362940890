"""An original, its pruned copies and the runtimes that run them: timed in turn, or profiled."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.bench import harness
from scripts.bench.harness import Conditions
from scripts.bench.models import Batch, Kept, draw_structure, pruned_to, random_batch
from scripts.profile_latency import load_model

if TYPE_CHECKING:
    from rfprune.latency.timing import Ratio
    from rfprune.model.layout import Layout

WARM_UP_ROUNDS = {"cpu": 1, "cuda": 3}
"""The first pass compiles; CUDA's graphs are recorded at the second."""

TOLERANCE = 0.003
"""Rounds end when the standard error of every speedup is below this fraction of it."""

Run = Callable[[Batch], object]


def default_output(kind: str, options: argparse.Namespace) -> Path:
    """results/KIND_MODEL_DEVICE[_Nthread].jsonl."""
    import torch

    threads = f"{torch.get_num_threads()}thread" if options.device == "cpu" else None
    return harness.default_output(kind, harness.model_name(options), options.device, threads)


@dataclass(frozen=True)
class TimedModels:
    """The models that are timed in turn; pruned ones by constraint and multiple of neurons."""

    dense: Any
    layout: Layout
    run_dense: Run
    pruned: Mapping[tuple[float, int], tuple[Kept, Run]]


def load_timed_models(options: argparse.Namespace, group: Sequence[Conditions]) -> TimedModels:
    """The models of measurements that share device, dtype and runtime."""
    import torch

    from rfprune.model.layout import layout_of

    first = group[0]
    dtype = getattr(torch, first["dtype"])
    dense = load_model(options.model, options.synthetic, dtype).to(first["device"])
    layout = layout_of(dense)
    pruned = {}
    for ratio, round_to in dict.fromkeys(structure_of(one) for one in group):
        kept = draw_structure(layout, ratio, seed=first["seed"], round_to=round_to)
        pruned[ratio, round_to] = kept, runner(first["runtime"], pruned_to(dense, layout, kept))
    return TimedModels(dense, layout, runner(first["runtime"], dense), pruned)


def structure_of(conditions: Conditions) -> tuple[float, int]:
    """The key of a pruned model."""
    return conditions["constraint"], conditions["round_to"]


def runner(runtime: str, model: Any) -> Run:
    """A function that runs a model on a batch by a runtime.

    Compiled code and ONNX files are made for batches of any size and length (PyTorch makes its own
    for a batch of one). Each compiled model compiles at its first batch.
    """
    if runtime == "onnx":
        return _onnx_runner(model)
    if runtime == "eager":
        return lambda batch: model(**batch)
    import torch

    def forward(batch: Batch) -> object:
        return model(**batch)

    # torch keeps compiled variants by code object, and tries all of them at each call: with one
    # code object for all models, the time of one would depend on how many models there are.
    forward.__code__ = forward.__code__.replace(co_name=f"forward_{id(model)}")
    mode = "reduce-overhead" if runtime == "compile-graphs" else None
    return torch.compile(forward, dynamic=True, mode=mode)


def _onnx_runner(model: Any) -> Run:
    import tempfile

    from rfprune.export.onnx import OnnxModel, export_onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, random_batch(model, 2, 16), path)
        exported = OnnxModel(path)
    return lambda batch: exported(**batch)


def time_models(
    models: TimedModels, group: Sequence[Conditions], options: argparse.Namespace
) -> list[Ratio]:
    """The original and the pruned models of one shape in turn, after they have been warmed up."""
    import torch

    from rfprune.latency.timing import TimingBudget, time_ratios

    calls = warm_up(models, group)
    budget = TimingBudget(
        options.seconds, max_rounds=options.rounds, tolerance=TOLERANCE, warm_up_rounds=0
    )
    with torch.inference_mode():
        return time_ratios(
            calls[0],
            calls[1:],
            models.dense.device,
            budget,
        )


def warm_up(models: TimedModels, group: Sequence[Conditions]) -> list[Callable[[], object]]:
    """Calls of the original and of the pruned models on one shape; each has been made before."""
    import torch

    batch = random_batch(models.dense, group[0]["batch_size"], group[0]["length"])
    runs = [models.run_dense, *(models.pruned[structure_of(one)][1] for one in group)]
    calls: list[Callable[[], object]] = [partial(run, batch) for run in runs]
    with torch.inference_mode():
        for _ in range(WARM_UP_ROUNDS[group[0]["device"]]):
            for call in calls:
                call()
    return calls
