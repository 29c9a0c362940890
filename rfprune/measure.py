"""What a run measures of a pruned model beside its original: most of report.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfprune.command_line import Options
from rfprune.cost.macs import total_macs
from rfprune.cost.params import total_params
from rfprune.loading import Loaded
from rfprune.model.layout import layout_of
from rfprune.report.latency import Latency, measure_latency, typical_batch
from rfprune.report.report_json import ratios, stage_seconds, versions
from rfprune.result import PruneResult, Settings
from rfprune.tasks.evaluation import Evaluation, EvaluationSet, divergence, evaluate_model

Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Prepared:
    """What all constraints of a run share; `seconds` went into loading.

    `stored`: the dtype that weights are saved in.
    """

    loaded: Loaded
    settings: Settings
    stored: torch.dtype
    batches: Batches
    evaluation_set: EvaluationSet
    original: Evaluation
    seconds: float


def measure(
    options: Options,
    prepared: Prepared,
    result: PruneResult,
    stored: torch.dtype,
    *,
    progress: bool,
) -> dict[str, Any]:
    """Score and time a pruned model beside the original: most of report.json."""
    model, original = prepared.loaded.model, prepared.original
    pruned = evaluate_model(result.model, prepared.evaluation_set, progress=progress)
    latency = measure_latency(model, result.model, typical_batch(prepared.batches))
    before = _costs(model, original, latency.original_ms, result.mean_tokens, prepared.stored)
    after = _costs(result.model, pruned, latency.pruned_ms, result.mean_tokens, stored)
    return {
        "model": options.model,
        "source": prepared.loaded.source,
        "task": options.task,
        "method": options.method,
        "metric": options.metric,
        "constraint": result.constraint.ratio,
        "seed": options.seed,
        "samples": sum(len(batch["input_ids"]) for batch in prepared.batches),
        "settings": dataclasses.asdict(prepared.settings),
        "device": str(model.device),
        "dtype": name_of(model.dtype),
        "stored_dtype": name_of(stored),
        "versions": versions(),
        "original": before,
        "pruned": after,
        "achieved": ratios(before, after),
        "metric_name": original.metric_name,
        "scores": {"original": dict(original.scores), "pruned": dict(pruned.scores)},
        "divergence": divergence(original, pruned),
        "evaluated_examples": original.num_examples,
        "mean_tokens": result.mean_tokens,
        "latency": _conditions(latency),
        "seconds": stage_seconds(
            result.seconds, load=prepared.seconds, evaluate=original.seconds + pruned.seconds
        ),
        "layers": list(result.layers),
        "output_dir": str(options.output_folder(result.constraint.ratio)),
    }


def _costs(
    model: Any, evaluation: Evaluation, latency_ms: float, tokens: float, stored: torch.dtype
) -> dict[str, float]:
    """One model's column of the report; counted on the model as it stands."""
    tensors = _distinct(model.state_dict())
    return {
        "score": evaluation.score,
        "macs": total_macs(layout_of(model), tokens),
        "params": total_params(model),
        "bytes": sum(
            tensor.numel() * (stored if tensor.is_floating_point() else tensor.dtype).itemsize
            for tensor in tensors
        ),
        "latency_ms": latency_ms,
    }


def _distinct(state: Mapping[str, Tensor]) -> list[Tensor]:
    """Tied weights are stored once."""
    return list({tensor.data_ptr(): tensor for tensor in state.values()}.values())


def file_bytes(folder: Path) -> int:
    """Bytes of the weights that were saved to a folder."""
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors"))


def _conditions(latency: Latency) -> dict[str, int]:
    conditions = dataclasses.asdict(latency)
    return {name: value for name, value in conditions.items() if not name.endswith("_ms")}


def name_of(dtype: torch.dtype) -> str:
    """As the flags and the report call it: float32."""
    return str(dtype).removeprefix("torch.")
