"""Everything that a run measures: scores, costs and latency of both models, for report.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rfprune.checkpoints.companion_files import without_vocabularies
from rfprune.checkpoints.loading import LoadedCheckpoint
from rfprune.cost.macs import total_macs
from rfprune.cost.memory import distinct_tensors
from rfprune.cost.params import total_params
from rfprune.cost.sparsity import density, layer_densities, num_zeros, saved_bytes
from rfprune.latency.speedup import Latency, measure_latency
from rfprune.latency.timed_batch import timed_batch
from rfprune.methods.problem import Problem
from rfprune.model.batch import mean_decoder_tokens
from rfprune.model.compact import compact
from rfprune.model.layout import Layout, layout_of
from rfprune.model.masks import masked, num_kept
from rfprune.report.report_json import ratios, stage_seconds, versions
from rfprune.result import PruneResult, units_of_layers
from rfprune.settings import Options
from rfprune.tasks.evaluation import Evaluation, EvaluationSet, divergence, evaluate_model
from rfprune.tasks.generation import continuations
from rfprune.tasks.inference import batch_size
from rfprune.tasks.registry import PER_TOKEN_KINDS
from rfprune.tasks.seq2seq import sample_texts
from rfprune.vocabulary.counting import PieceChanges
from rfprune.vocabulary.trim import TrimmedVocabulary

MAX_POINTS = 64
"""Points of an error curve that are written to the report; a figure shows no more."""

SAMPLE_TEXTS = 3
SAMPLE_WIDTH = 160
"""How many written texts a report shows, and how many characters of each."""

Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class FewerTokens:
    """A trimmed vocabulary, and what it changes on the validation data.

    Attributes:
        data: the validation data by the trimmed tokenizer.
        changes: how the validation texts are encoded, beside the original.
    """

    vocabulary: TrimmedVocabulary
    data: EvaluationSet
    changes: PieceChanges


@dataclass(frozen=True)
class Prepared:
    """Model, data and settings that all constraints of a run share.

    Attributes:
        loaded: the original, with all its tokens.
        problem: of the model with the tokens that are kept.
        stored: the dtype in which weights are saved.
        batches: calibration batches, by the tokenizer of the pruned models.
        evaluation_set: the validation data by the original's tokenizer.
        seconds: the time that loading took.
        inputs: SHA-256 of model and data, see `inputs_digest`.
        fewer_tokens: the trimmed vocabulary; None with all tokens.
    """

    loaded: LoadedCheckpoint
    problem: Problem
    stored: torch.dtype
    batches: Batches
    evaluation_set: EvaluationSet
    seconds: float
    inputs: str
    fewer_tokens: FewerTokens | None = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the pruned models."""
        trimmed = self.fewer_tokens
        return self.loaded.tokenizer if trimmed is None else trimmed.vocabulary.tokenizer

    @property
    def files(self) -> Mapping[str, bytes]:
        """What goes along with the pruned models."""
        files = self.loaded.files
        return files if self.fewer_tokens is None else without_vocabularies(files)

    @property
    def pruned_set(self) -> EvaluationSet:
        """The validation data by the tokenizer of the pruned models."""
        return self.evaluation_set if self.fewer_tokens is None else self.fewer_tokens.data

    @property
    def reference(self) -> Any:
        """The original for a comparison of logits per token; None if it has other tokens."""
        return self.loaded.model if self.fewer_tokens is None else None


@dataclass(frozen=True)
class Outcome:
    """A pruned model, and what the search of `--max-drop` knows about it.

    Attributes:
        pruned: its scores, if the search has evaluated it already (in the stored dtype).
        search: the entry "max_drop" of the report.
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
    """Evaluate and time a pruned model beside the original.

    Args:
        original: scores of the original.
        stored: the dtype in which the pruned weights are saved.

    Returns:
        The entries of report.json, except those that the command adds (its own text, identity,
        warnings and exports).
    """
    model, result = prepared.loaded.model, outcome.result
    pruned = outcome.pruned
    if pruned is None:
        data = prepared.pruned_set
        pruned = evaluate_model(
            result.model,
            data,
            reference=prepared.reference,
            reference_evaluation=original,
            progress=progress,
        )
        pruned = _per_original_token(pruned, prepared.fewer_tokens)
    stages = []
    if options.output.score_stages:
        data = prepared.pruned_set
        unpruned = prepared.problem.model
        stages = stage_scores(unpruned, result, data, original, pruned, progress=progress)
    latency = measure_latency(
        model, result.model, timed_batch(prepared.batches, prepared.problem.latency_table)
    )
    tokens = result.mean_tokens, mean_decoder_tokens(prepared.batches)
    macs = total_macs(result.layout, *tokens), total_macs(layout_of(result.model), *tokens)
    before = _costs(model, macs[0], original, latency.original_ms, prepared.stored)
    after = _costs(result.model, macs[1], pruned, latency.pruned_ms, stored)
    return {
        "model": options.target.model,
        "source": prepared.loaded.source,
        "task": options.target.task,
        "kind": original.kind,
        "higher_is_better": prepared.evaluation_set.task.higher_is_better,
        "method": options.settings.method,
        "metric": options.target.metric,
        "constraint": result.ratio,
        "sizes": None if options.target.sizes is None else str(options.target.sizes),
        "seed": options.settings.seed,
        "samples": sum(batch_size(batch) for batch in prepared.batches),
        "settings": dataclasses.asdict(prepared.problem.settings),
        "device": str(model.device),
        "dtype": dtype_name(model.dtype),
        "stored_dtype": dtype_name(stored),
        "versions": versions(),
        "original": before,
        "pruned": after,
        "achieved": ratios(before, after),
        "metric_name": original.metric_name,
        "scores": {"original": dict(original.scores), "pruned": dict(pruned.scores)},
        "divergence": _divergence(original, pruned, prepared.fewer_tokens),
        **_continuations(prepared, result.model),
        **_written(prepared, original, pruned),
        **_fewer_tokens(options, prepared.fewer_tokens),
        "evaluated_examples": original.num_examples,
        "mean_tokens": result.mean_tokens,
        "plain": getattr(result.model.config, "rfprune", None) is None,
        "latency": _conditions(latency),
        "promise": latency_promise(result, latency),
        "seconds": stage_seconds(
            result.seconds, load=prepared.seconds, evaluate=original.seconds + pruned.seconds
        ),
        **({} if outcome.search is None else {"max_drop": outcome.search}),
        "layers": list(result.layers),
        "original_layers": original_layers(result.layout),
        "removed_layers": list(result.removed_layers),
        "curves": curve_points(result),
        **_zeros(result, stored),
        "stages": stages,
        "data_dir": None if options.data.data_dir is None else str(options.data.data_dir),
        "output_dir": str(options.output_folder(result.ratio)),
    }


def _zeros(result: PruneResult, stored: torch.dtype) -> dict[str, Any]:
    """Density and compressed size of the linear maps within the layers; empty without zeros.

    Args:
        stored: the dtype in which the pruned weights are saved.
    """
    maps, removed = result.sparsity, result.removed_layers
    if maps is None:
        return {}
    layers = layer_densities(maps, len(result.layout.layers) - len(removed))
    for position in removed:  # ascending, so each finds its place
        layers.insert(position, 0.0)
    return {
        "sparsity": {
            "density": density(maps),
            "layers": layers,
            "weights": sum(one.num_weights for one in maps),
            "zeros": num_zeros(maps),
            "saved_bytes": saved_bytes(maps, stored.itemsize),
            "maps": [dataclasses.asdict(one) for one in maps],
        }
    }


def _continuations(prepared: Prepared, pruned: Any) -> dict[str, Any]:
    """Sample texts of language models, before and after."""
    if prepared.evaluation_set.task.kind != "language-modeling":
        return {}
    models = {"original": prepared.loaded.model}, {"pruned": pruned}
    tokenizers = prepared.loaded.tokenizer, prepared.tokenizer
    data = prepared.evaluation_set, prepared.pruned_set
    before, after = (
        continuations(one, tokenizer, each.batches)
        for one, tokenizer, each in zip(models, tokenizers, data, strict=True)
    )
    return {"continuations": {**after, **before} if before and after else {}}


def _written(prepared: Prepared, original: Evaluation, pruned: Evaluation) -> dict[str, Any]:
    """Sample texts of encoder-decoders, before and after."""
    before, after = prepared.evaluation_set.pairs, prepared.pruned_set.pairs
    if before is None or after is None:
        return {}
    texts = {
        "original": before.texts(original.logits[0][:SAMPLE_TEXTS]),
        "pruned": after.texts(pruned.logits[0][:SAMPLE_TEXTS]),
    }
    return {"written": sample_texts(before, texts, width=SAMPLE_WIDTH)}


def _per_original_token(pruned: Evaluation, fewer: FewerTokens | None) -> Evaluation:
    """A perplexity per token of the original tokenizer: a trimmed one makes more tokens of a text,
    and the mean over them would look better than the probability of the text is."""
    if fewer is None or pruned.kind != "language-modeling":
        return pruned
    more = fewer.changes.tokens_after / fewer.changes.tokens_before
    scores = {**pruned.scores, pruned.metric_name: pruned.score**more}
    return dataclasses.replace(pruned, score=scores[pruned.metric_name], scores=scores)


def _divergence(
    original: Evaluation, pruned: Evaluation, fewer: FewerTokens | None
) -> float | None:
    """Divergence of the pruned model; None where the two have logits of other tokens."""
    per_token = original.kind in (*PER_TOKEN_KINDS, "question-answering")
    return None if fewer is not None and per_token else divergence(original, pruned)


def _fewer_tokens(options: Options, fewer: FewerTokens | None) -> dict[str, Any]:
    """The entry of a trimmed vocabulary; empty without one."""
    if fewer is None:
        return {}
    return {
        "vocabulary": {
            "files": [str(path) for path in options.target.vocabulary],
            "min_count": options.target.vocabulary_min_count,
            "original": fewer.vocabulary.num_original,
            "pruned": len(fewer.vocabulary.old_ids),
            "held_out": dataclasses.asdict(fewer.changes),
        }
    }


def _costs(
    model: Any,
    macs: float,
    evaluation: Evaluation,
    latency_ms: float,
    stored: torch.dtype,
) -> dict[str, float]:
    """Score, costs and latency of one model.

    Args:
        stored: the dtype in which floating-point weights are saved.
    """
    tensors = distinct_tensors(model)
    return {
        "score": evaluation.score,
        "macs": macs,
        "params": total_params(model),
        "bytes": sum(
            tensor.numel() * (stored if tensor.is_floating_point() else tensor.dtype).itemsize
            for tensor in tensors
        ),
        "latency_ms": latency_ms,
    }


def latency_promise(result: PruneResult, latency: Latency) -> dict[str, Any] | None:
    """Target, predicted and measured latency, and the candidates that were timed; None without a
    constraint on latency."""
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


def dtype_name(dtype: torch.dtype) -> str:
    """The name that the flags and the report use: float32."""
    return str(dtype).removeprefix("torch.")


def original_layers(layout: Layout) -> list[dict[str, int]]:
    """Heads and neurons of each layer before pruning."""
    return units_of_layers(layout, [block.num_units for block in layout.blocks])


def curve_points(result: PruneResult) -> list[dict[str, Any]]:
    """The error curve of each block with at most MAX_POINTS points, and the units it keeps.

    A method that ranks single units has no error curves. There the error of keeping n units is the
    summed importance of all but the n most important ones. Errors are in the unit of the method.
    """
    curves = []
    for index, (block, kept) in enumerate(
        zip(result.layout.blocks, num_kept(result.masks), strict=True)
    ):
        errors = _errors(result, index)
        if errors is None:
            return []
        units = thinned_units(len(errors) - 1, kept)
        curves.append(
            {
                "kind": block.sublayer.name,
                "layer": block.layer,
                "units": units,
                "errors": [float(f"{float(errors[n]):.6g}") for n in units],
                "kept": kept,
            }
        )
    return curves


def _errors(result: PruneResult, index: int) -> Tensor | None:
    """(U + 1,): the error of keeping n units of a block."""
    if result.curves is not None:
        return result.curves[index].errors
    if result.importance is None:
        return None
    lost = result.importance[index].cpu().double().sort().values.cumsum(0)
    return torch.cat([lost.new_zeros(1), lost]).flip(0)


def thinned_units(total: int, kept: int) -> list[int]:
    """At most MAX_POINTS evenly spaced numbers of units from 0 to `total`, `kept` among them."""
    steps = min(total, MAX_POINTS - 2)
    even = {round(step * total / steps) for step in range(steps + 1)} if steps else {0}
    return sorted(even | {kept})


def stage_scores(
    model: Any,
    result: PruneResult,
    evaluation_set: EvaluationSet,
    original: Evaluation,
    pruned: Evaluation,
    *,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Score and divergence of the original, of the selected units without a fit, and of the result.

    Args:
        model: the original; it is evaluated once more, with the removed units masked.
        original: its scores.
        pruned: scores of the pruned model.
    """
    chosen = tuple((mask != 0).to(mask.dtype) for mask in result.masks)
    # two models of text run at once, so they cannot be one, and masks cannot remove layers
    if original.kind in PER_TOKEN_KINDS or result.removed_layers:
        small = compact(model, result.layout, chosen, result.removed_layers)
        selected = evaluate_model(
            small,
            evaluation_set,
            reference=model,
            reference_evaluation=original,
            progress=progress,
        )
    else:
        with masked(model, result.layout, chosen):
            selected = evaluate_model(model, evaluation_set, progress=progress)
    stages = {"original": original, "selected": selected, "fitted": pruned}
    return [
        {"stage": name, "score": scores.score, "divergence": divergence(original, scores)}
        for name, scores in stages.items()
    ]
