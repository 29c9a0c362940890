"""What a run measures of a pruned model beside its original: most of report.json."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfprune.cache import Key, circumstances, data_digest, model_digest, remembering
from rfprune.checkpoints.loading import LoadedCheckpoint
from rfprune.cost.macs import total_macs
from rfprune.cost.params import total_params
from rfprune.latency.speedup import Latency, measure_latency
from rfprune.latency.table import LatencyTable
from rfprune.latency.timed_batch import timed_batch
from rfprune.methods.budget import mean_decoder_tokens
from rfprune.model.layout import layout_of
from rfprune.report.report_json import ratios, stage_seconds, versions
from rfprune.report.stage_scores import curve_points, original_layers, stage_scores
from rfprune.result import PruneResult, StageTimer
from rfprune.settings import Options, Settings
from rfprune.tasks.evaluation import (
    Evaluation,
    EvaluationSet,
    Logits,
    divergence,
    evaluate_model,
)
from rfprune.tasks.generation import continuations
from rfprune.tasks.inference import batch_size

Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Prepared:
    """What all constraints of a run share; `seconds` went into loading.

    `stored`: the dtype that weights are saved in. `inputs`: their hash, see `inputs_digest`.
    `latency_table`: where latency is the metric.
    """

    loaded: LoadedCheckpoint
    settings: Settings
    stored: torch.dtype
    batches: Batches
    evaluation_set: EvaluationSet
    seconds: float
    inputs: str
    latency_table: LatencyTable | None = None


@dataclass(frozen=True)
class Outcome:
    """A pruned model, and what is known of it where a search has found it.

    `pruned`: its score, when rounded to what is stored. `search`: what the report says of how it
    was found.
    """

    result: PruneResult
    pruned: Evaluation | None = None
    search: Mapping[str, Any] | None = None


def measure(
    options: Options,
    prepared: Prepared,
    original: Evaluation,
    outcome: Outcome,
    stored: torch.dtype,
    *,
    progress: bool,
) -> dict[str, Any]:
    """Score and time a pruned model beside the original: most of report.json."""
    model, result = prepared.loaded.model, outcome.result
    pruned = outcome.pruned
    if pruned is None:
        data = prepared.evaluation_set
        pruned = evaluate_model(result.model, data, reference=model, progress=progress)
    stages = []
    if options.score_stages:
        data = prepared.evaluation_set
        stages = stage_scores(model, result, data, original, pruned, progress=progress)
    latency = measure_latency(
        model, result.model, timed_batch(prepared.batches, prepared.latency_table)
    )
    written = mean_decoder_tokens(result.layout, prepared.batches)
    tokens = (result.mean_tokens, written)
    before = _costs(model, original, latency.original_ms, tokens, prepared.stored)
    after = _costs(result.model, pruned, latency.pruned_ms, tokens, stored)
    return {
        "model": options.model,
        "source": prepared.loaded.source,
        "task": options.task,
        "kind": original.kind,
        "higher_is_better": prepared.evaluation_set.task.higher_is_better,
        "method": options.method,
        "metric": options.metric,
        "constraint": result.constraint.ratio,
        "seed": options.seed,
        "samples": sum(batch_size(batch) for batch in prepared.batches),
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
        **_written(prepared, result.model),
        "evaluated_examples": original.num_examples,
        "mean_tokens": result.mean_tokens,
        "latency": _conditions(latency),
        "promise": promised(result, latency),
        "seconds": stage_seconds(
            result.seconds, load=prepared.seconds, evaluate=original.seconds + pruned.seconds
        ),
        **({} if outcome.search is None else {"max_drop": outcome.search}),
        "layers": list(result.layers),
        "original_layers": original_layers(result.layout),
        "curves": curve_points(result),
        "stages": stages,
        "data_dir": None if options.data_dir is None else str(options.data_dir),
        "output_dir": str(options.output_folder(result.constraint.ratio)),
    }


def _written(prepared: Prepared, pruned: Any) -> dict[str, Any]:
    """What language models write, before and after."""
    if prepared.evaluation_set.task.kind != "language-modeling":
        return {}
    models = {"original": prepared.loaded.model, "pruned": pruned}
    batches = prepared.evaluation_set.batches
    return {"continuations": continuations(models, prepared.loaded.tokenizer, batches)}


def evaluate_original(
    prepared: Prepared, cache: Path | None, *, progress: bool
) -> tuple[Evaluation, set[str]]:
    """Score the original, or only look its logits up; and the stages that were on disk already."""
    timer, model, evaluation_set = StageTimer(), prepared.loaded.model, prepared.evaluation_set
    remember = remembering(cache, lambda: _logits_key(model, evaluation_set), timer, "evaluate")

    def remember_arrays(compute: Callable[[], Logits]) -> Logits:
        tensors = remember(lambda: tuple(torch.from_numpy(logits) for logits in compute()))
        return tuple(tensor.numpy() for tensor in tensors)

    evaluation = evaluate_model(model, evaluation_set, progress=progress, remember=remember_arrays)
    return evaluation, timer.cached


def _logits_key(model: Any, evaluation_set: EvaluationSet) -> Key:
    return {
        "logits": evaluation_set.task.name,
        "model": model_digest(model),
        "data": evaluation_digest(evaluation_set),
        **circumstances(model),
    }


def inputs_digest(model: Any, batches: Batches, evaluation_set: EvaluationSet) -> str:
    """SHA-256 of all that goes into a run besides its flags."""
    inputs = {
        "model": model_digest(model),
        "calibration": data_digest(batches),
        "evaluation": evaluation_digest(evaluation_set),
        **circumstances(model),
    }
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def evaluation_digest(evaluation_set: EvaluationSet) -> str:
    """SHA-256 of all that a model is scored on."""
    return data_digest(_parts(evaluation_set))


def _parts(evaluation_set: EvaluationSet) -> Iterator[dict[str, Tensor]]:
    for batch, rows in zip(evaluation_set.batches, evaluation_set.rows, strict=True):
        yield {**batch, "rows": torch.from_numpy(rows)}
    if evaluation_set.labels is not None:
        yield {"labels": torch.from_numpy(evaluation_set.labels)}
    if (questions := evaluation_set.questions) is not None:
        texts = json.dumps([questions.contexts, questions.answers]).encode()
        yield {
            "texts": torch.frombuffer(bytearray(texts), dtype=torch.uint8),
            "in_context": torch.from_numpy(questions.windows.in_context),
            "null_position": torch.from_numpy(questions.windows.null_position),
        }


def _costs(
    model: Any,
    evaluation: Evaluation,
    latency_ms: float,
    tokens: tuple[float, float | None],
    stored: torch.dtype,
) -> dict[str, float]:
    """One model's column of the report; counted on the model as it stands.

    `tokens`: that are read, and that a decoder of these makes, where there is one.
    """
    tensors = _distinct(model.state_dict())
    return {
        "score": evaluation.score,
        "macs": total_macs(layout_of(model), *tokens),
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


def promised(result: PruneResult, latency: Latency) -> dict[str, Any] | None:
    """Of a constraint on latency: what was promised, predicted by the table, and measured in the
    end, on the fitted model; and the choices that were timed on the way there."""
    promise = result.promise
    if promise is None:
        return None
    return {
        "promised_ms": promise.promised * latency.original_ms,
        "predicted_ms": promise.predicted * latency.original_ms,
        "measured_ms": latency.pruned_ms,
        "attempts": [
            {"predicted": attempt.predicted, "measured": attempt.measured, "error": attempt.error}
            for attempt in promise.attempts
        ],
    }


def _conditions(latency: Latency) -> dict[str, int]:
    conditions = dataclasses.asdict(latency)
    return {name: value for name, value in conditions.items() if not name.endswith("_ms")}


def name_of(dtype: torch.dtype) -> str:
    """As the flags and the report call it: float32."""
    return str(dtype).removeprefix("torch.")
