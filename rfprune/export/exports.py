"""What `--export` adds to an output: the model in other forms, each checked and measured.

dense/: original shapes with zeros, for any tool that knows the architecture.
onnx/:  model.onnx, and with `--quantize` model_quantized.onnx with int8 weights.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rfprune.errors import UserError
from rfprune.export.onnx import (
    OnnxModel,
    export_onnx,
    max_difference,
    model_inputs,
    quantize_onnx,
    varied_inputs,
)
from rfprune.latency.speedup import report_budget
from rfprune.latency.timed_batch import typical_batch
from rfprune.latency.timing import Timer, TimingBudget, time_interleaved
from rfprune.model.dense import save_dense
from rfprune.result import PruneResult
from rfprune.tasks.evaluation import Evaluation, EvaluationSet, divergence, evaluate_model

TOLERANCE = 1e-4
"""Logits of an export may differ by this much from the pruned model's, in units of the largest;
in half precision by more."""

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class ExportJob:
    """What exports are made from and checked against.

    Attributes:
        original: the model before pruning, on any device; it is timed beside the exports.
        batches: calibration inputs, on which outputs are compared.
        reference: how the original scored; divergences are from it.
        stored: the dtype that PyTorch weights are saved in.
    """

    original: Any
    result: PruneResult
    tokenizer: Any
    batches: Sequence[Batch]
    evaluation_set: EvaluationSet
    reference: Evaluation
    stored: torch.dtype
    progress: bool = False


def write_exports(
    kinds: Sequence[str], folder: Path, job: ExportJob, *, quantize: bool
) -> dict[str, Any]:
    """Write the exports `kinds` ("dense", "onnx") into `folder`: the entry "exports" of the report.

    Paths are relative to the folder, sizes in bytes, latencies in milliseconds on the CPU.

    Raises:
        UserError: the model cannot be exported, or an export computes something else.
    """
    exports: dict[str, Any] = {}
    if "dense" in kinds:
        exports["dense"] = _write_dense(folder, job)
    if "onnx" in kinds:
        exports |= _write_onnx(folder, job, quantize)
    return exports


def _write_dense(folder: Path, job: ExportJob) -> dict[str, Any]:
    result = job.result
    dense = save_dense(
        result.model, result.layout, result.masks, folder / "dense", job.tokenizer, dtype=job.stored
    )
    difference = _checked("dense", result.model.eval(), dense.eval(), job.batches)
    return {"path": "dense", "bytes": _bytes(folder / "dense", "*.safetensors"), **difference}


def _write_onnx(folder: Path, job: ExportJob, quantize: bool) -> dict[str, Any]:
    onnx = folder / "onnx"
    onnx.mkdir()
    path, small = onnx / "model.onnx", onnx / "model_quantized.onnx"
    pruned = export_onnx(job.result.model, typical_batch(job.batches), path)
    runs: dict[str, nn.Module] = {"onnx": OnnxModel(path, pruned.config)}
    entry = {"path": "onnx/model.onnx", "bytes": _bytes(onnx, "model.onnx*")}
    entry |= _checked("ONNX", pruned, runs["onnx"], job.batches)
    exports: dict[str, Any] = {"onnx": entry | _scored(runs["onnx"], job)}
    if quantize:
        quantize_onnx(path, small)
        runs["onnx_int8"] = OnnxModel(small, pruned.config)
        entry = {"path": "onnx/model_quantized.onnx"}
        entry["bytes"] = _bytes(onnx, "model_quantized.onnx*")
        exports["onnx_int8"] = entry | _scored(runs["onnx_int8"], job)
    original = job.original.to("cpu")  # a copy, unless it is there already
    try:
        models = {"original": original, "pruned": pruned, **runs}
        milliseconds, conditions = time_on_cpu(models, typical_batch(job.batches))
    finally:
        job.original.to(job.result.model.device)
    for name in runs:
        exports[name]["latency_ms"] = milliseconds[name]
    in_torch = {f"{name}_ms": milliseconds[name] for name in ("original", "pruned")}
    return exports | {"latency": conditions | in_torch}


def time_on_cpu(
    models: Mapping[str, nn.Module],
    batch: Batch,
    *,
    budget: TimingBudget | None = None,
    timer: Timer = time.perf_counter,
) -> tuple[dict[str, float], dict[str, int]]:
    """Median milliseconds of a forward pass by model, all in turn, and the conditions."""
    inputs = model_inputs(next(iter(models.values())), batch)
    with torch.inference_mode():
        timings = time_interleaved(
            [partial(model.eval(), **inputs) for model in models.values()],
            "cpu",
            budget or report_budget(),
            timer=timer,
        )
    shape = next(iter(inputs.values())).shape
    conditions = {"batch_size": shape[0], "sequence_length": shape[-1]}
    conditions["rounds"] = timings[0].rounds
    conditions["threads"] = torch.get_num_threads()
    found = zip(models, timings, strict=True)
    return {name: timing.median_ms for name, timing in found}, conditions


def _checked(
    name: str, pruned: Any, exported: nn.Module, batches: Sequence[Batch]
) -> dict[str, Any]:
    """The largest difference on real inputs of several sizes.

    Raises:
        UserError: it is more than rounding.
    """
    device = next(pruned.parameters()).device
    inputs = [
        {key: value.to(device) for key, value in model_inputs(pruned, batch).items()}
        for batch in varied_inputs(batches)
    ]
    difference, largest = max_difference(pruned, exported, inputs)
    allowed = max(TOLERANCE, 50 * torch.finfo(next(pruned.parameters()).dtype).eps)
    if not difference <= allowed * max(1.0, largest):
        raise UserError(
            f"the {name} export differs from the pruned model by up to {difference:.2g} on "
            f"calibration inputs, which is more than rounding: leave it out of --export"
        )
    sizes = [list(next(iter(batch.values())).shape) for batch in inputs]
    return {"max_difference": difference, "checked_on": sizes}


def _scored(model: nn.Module, job: ExportJob) -> dict[str, Any]:
    """By the same evaluation as every other model."""
    data = job.evaluation_set
    evaluation = evaluate_model(model, data, reference=job.original, progress=job.progress)
    return {
        "score": evaluation.score,
        "scores": dict(evaluation.scores),
        "divergence": divergence(job.reference, evaluation),
    }


def _bytes(folder: Path, pattern: str) -> int:
    """Bytes of a model's files; `model.onnx*` has its weights beside it where they are large."""
    return sum(path.stat().st_size for path in folder.glob(pattern))
