"""Cached outputs of the original model, and the digests that identify the inputs of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfprune.cache import Key, data_digest, environment, load_or_compute, model_digest
from rfprune.report.measure import Prepared
from rfprune.result import StageTimer
from rfprune.settings import WritingSettings
from rfprune.tasks.evaluation import Evaluation, EvaluationSet, Logits, evaluate_model
from rfprune.tasks.seq2seq import (
    generation_config,
    row_numbers,
    warn_about_long_targets,
    with_written,
    written_tokens,
)

Batches = Sequence[Mapping[str, Tensor]]


def evaluate_original(
    prepared: Prepared, cache: Path | None, *, progress: bool
) -> tuple[Evaluation, set[str]]:
    """Scores of the original, with its logits from the cache if they are there.

    Returns:
        The scores, and the names of the stages that came from the cache.
    """
    timer, model, evaluation_set = StageTimer(), prepared.loaded.model, prepared.evaluation_set

    def load_logits(compute: Callable[[], Logits]) -> Logits:
        tensors = load_or_compute(
            lambda: tuple(torch.from_numpy(logits) for logits in compute()),
            cache,
            lambda: _logits_key(model, evaluation_set),
            timer,
            "evaluate",
        )
        return tuple(tensor.numpy() for tensor in tensors)

    evaluation = evaluate_model(
        model, evaluation_set, progress=progress, load_or_compute=load_logits
    )
    return evaluation, timer.cached


def with_targets(
    model: Any,
    batches: Batches,
    writing: WritingSettings,
    *,
    cache: Path | None,
    progress: bool,
) -> list[dict[str, Tensor]]:
    """Calibration batches of task seq2seq with the texts that the model writes, which are cached.

    A warning says if many of them were cut; see `rfprune.tasks.seq2seq`.
    """
    rows = row_numbers(batches)
    (found,) = load_or_compute(
        lambda: (
            torch.from_numpy(written_tokens(model, batches, rows, writing, progress=progress)),
        ),
        cache,
        lambda: {
            "targets": generation_config(model, writing).to_dict(),
            "model": model_digest(model),
            "data": data_digest(batches),
            **environment(model),
        },
        StageTimer(),
        "write",
    )
    tokens = found.numpy()
    warn_about_long_targets(model, tokens, writing)
    return list(with_written(model, batches, rows, tokens))


def _logits_key(model: Any, evaluation_set: EvaluationSet) -> Key:
    task = evaluation_set.task
    writes = task.kind == "seq2seq"
    return {
        "logits": task.name,
        **({"written": generation_config(model, task.writing).to_dict()} if writes else {}),
        "model": model_digest(model),
        "data": evaluation_digest(evaluation_set),
        **environment(model),
    }


def inputs_digest(model: Any, batches: Batches, evaluation_set: EvaluationSet) -> str:
    """SHA-256 of everything that determines a run besides its flags."""
    inputs = {
        "model": model_digest(model),
        "calibration": data_digest(batches),
        "evaluation": evaluation_digest(evaluation_set),
        **environment(model),
    }
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def evaluation_digest(evaluation_set: EvaluationSet) -> str:
    """SHA-256 of the data that a model is evaluated on."""
    return data_digest(_parts(evaluation_set))


def _parts(evaluation_set: EvaluationSet) -> Iterator[dict[str, Tensor]]:
    for batch, rows in zip(evaluation_set.batches, evaluation_set.rows, strict=True):
        yield {**batch, "rows": torch.from_numpy(rows)}
    if evaluation_set.labels is not None:
        yield {"labels": torch.from_numpy(evaluation_set.labels)}
    if (pairs := evaluation_set.pairs) is not None:
        yield {
            "texts": _bytes_of([pairs.sources, pairs.targets, asdict(evaluation_set.task.writing)])
        }
    if (questions := evaluation_set.questions) is not None:
        yield {
            "texts": _bytes_of([questions.contexts, questions.answers]),
            "in_context": torch.from_numpy(questions.windows.in_context),
            "null_position": torch.from_numpy(questions.windows.null_position),
        }


def _bytes_of(values: Any) -> Tensor:
    """Texts and numbers as bytes of JSON, for a digest."""
    return torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)
