"""One run of the command: load, score, prune, score again, time both, write it down."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from rfprune.calibration import calibration_batches
from rfprune.command_line import Options
from rfprune.cost.constraint import Constraint
from rfprune.cost.macs import total_macs
from rfprune.cost.params import total_params
from rfprune.device import pick_device
from rfprune.errors import RfpruneWarning, UserError
from rfprune.inspection import reason
from rfprune.loading import Loaded, data_folder, length_limit, load, quiet_transformers
from rfprune.model.checkpoint import save_pruned
from rfprune.model.layout import layout_of
from rfprune.output import staged
from rfprune.pipeline import check_constraints, prune_family
from rfprune.precision import round_weights, stored_dtype
from rfprune.report.latency import Latency, measure_latency, typical_batch
from rfprune.report.report_json import SCHEMA, ratios, stage_seconds, versions, write_report
from rfprune.report.table import LOG_WIDTH, print_report, write_log
from rfprune.result import PruneResult, Settings
from rfprune.tasks.evaluation import (
    Evaluation,
    EvaluationSet,
    divergence,
    evaluate_model,
    prepare_evaluation,
)
from rfprune.tasks.registry import Task, get_task

Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Prepared:
    """What all constraints of a run share; `seconds` went into loading.

    `stored`: the dtype that weights are saved in.
    """

    loaded: Loaded
    stored: torch.dtype
    batches: Batches
    evaluation_set: EvaluationSet
    original: Evaluation
    seconds: float


def run(options: Options, arguments: Sequence[str]) -> None:
    """Do what the flags ask for; `arguments` are the flags as they were given.

    Raises:
        UserError: something that the user can mend.
    """
    task = get_task(options.task)
    progress = not options.quiet and sys.stderr.isatty()
    told = Console(
        stderr=True, quiet=options.quiet, highlight=False, markup=False, emoji=False, soft_wrap=True
    )
    # A file or a pipe has no width: the table's own, rather than 80 columns that cut it.
    screen = Console(quiet=options.quiet, width=None if sys.stdout.isatty() else LOG_WIDTH)
    with (
        collected_warnings(told, verbose=options.verbose) as heard,
        out_of_memory_is_said(options.batch_size),
    ):
        prepared = _prepare(options, task, told, progress)
        results = prune_family(
            prepared.loaded.model,
            prepared.batches,
            _constraints(options),
            _settings(options),
            progress=progress,
        )
        told.print("Pruning")
        for result in results:
            stored = _rounded_to(prepared.stored, result.model)
            told.print(f"Scoring and timing the model pruned to {result.constraint.ratio:g}")
            report = {
                "schema": SCHEMA,
                "command": shlex.join(["rfprune", *arguments]),
                **_measure(options, prepared, result, stored, progress),
                "warnings": list(dict.fromkeys([*heard, *result.warnings])),
            }
            _save(options, prepared, result, stored, report)
            print_report(report, screen)


def _save(
    options: Options,
    prepared: Prepared,
    result: PruneResult,
    stored: torch.dtype,
    report: dict[str, Any],
) -> None:
    """Write model, masks, tokenizer, report and log, all of them or nothing; completes `report`."""
    folder = options.output_folder(result.constraint.ratio)
    with staged(folder, overwrite=options.overwrite) as temporary, quiet_transformers():
        tokenizer = prepared.loaded.tokenizer
        save_pruned(result.model, result.layout, result.masks, temporary, tokenizer, dtype=stored)
        report["pruned"]["bytes"] = _file_bytes(temporary)
        write_report(report, temporary)
        write_log(report, temporary)


def _rounded_to(dtype: torch.dtype, model: nn.Module) -> torch.dtype:
    """Round the weights to what will be stored of them, so that this is what is measured."""
    if dtype == next(model.parameters()).dtype or round_weights(model, dtype):
        return dtype
    warnings.warn(
        f"The pruned weights are beyond the range of {_name(dtype)}, the dtype of the original's "
        f"file: they are stored in float32.",
        RfpruneWarning,
        stacklevel=2,
    )
    return torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def out_of_memory_is_said(batch_size: int) -> Iterator[None]:
    """Smaller batches mend it.

    Raises:
        UserError: memory ran out, on the device or beside it.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        on_cpu = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        if not (on_cpu or isinstance(error, torch.cuda.OutOfMemoryError)):
            raise
        raise UserError(
            f"Memory ran out with batches of {batch_size} ({reason(error)}): give a smaller "
            f"--batch-size, fewer --samples or a smaller --max-length."
        ) from error


@contextmanager
def collected_warnings(told: Console, *, verbose: bool) -> Iterator[list[str]]:
    """Show our own warnings as they come and keep them; others only where `verbose` asks."""
    heard: list[str] = []

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, RfpruneWarning):
            if str(message) in heard:
                return
            heard.append(str(message))
        elif not verbose:
            return
        told.print(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("default" if verbose else "ignore")
        warnings.simplefilter("always", RfpruneWarning)
        warnings.showwarning = show
        yield heard


def _constraints(options: Options) -> list[Constraint]:
    return [Constraint(options.metric, ratio) for ratio in options.constraint]


def _settings(options: Options) -> Settings:
    return Settings(
        method=options.method,
        use_labels=options.use_labels,
        gradients=options.gradients,
        rearrange=not options.skip_rearrange,
        tune=not options.skip_tune,
        teacher=options.teacher,
        seed=options.seed,
    )


def _prepare(options: Options, task: Task, told: Console, progress: bool) -> Prepared:
    """Load the checkpoint and all data, and score the original: everything that can be wrong
    with the input shows here, before the pruning."""
    told.print(f"Loading {options.model} and the data of {task.name}")
    start = time.perf_counter()
    device = pick_device(options.device)
    dtype = getattr(torch, options.dtype or "float32")
    loaded = load(options.model, task, device=device, dtype=dtype)
    stored = stored_dtype(loaded.source) if options.dtype is None else dtype
    max_length = length_limit(loaded, task, options.max_length)
    data_dir = data_folder(options.model, options.data_dir)
    batches = calibration_batches(
        task,
        loaded.tokenizer,
        data_dir,
        num_samples=options.samples,
        batch_size=options.batch_size,
        max_length=max_length,
        seed=options.seed,
        with_labels=options.use_labels,
    )
    check_constraints(loaded.model, batches, _constraints(options))
    evaluation_set = prepare_evaluation(
        task,
        loaded.tokenizer,
        data_dir,
        batch_size=options.batch_size,
        max_length=max_length,
        limit=options.eval_limit,
    )
    seconds = time.perf_counter() - start
    told.print(f"Scoring the original on {evaluation_set.num_examples} examples")
    original = evaluate_model(loaded.model, evaluation_set, progress=progress)
    return Prepared(loaded, stored, batches, evaluation_set, original, seconds)


def _measure(
    options: Options,
    prepared: Prepared,
    result: PruneResult,
    stored: torch.dtype,
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
        "settings": dataclasses.asdict(_settings(options)),
        "device": str(model.device),
        "dtype": _name(model.dtype),
        "stored_dtype": _name(stored),
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


def _file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors"))


def _conditions(latency: Latency) -> dict[str, int]:
    conditions = dataclasses.asdict(latency)
    return {name: value for name, value in conditions.items() if not name.endswith("_ms")}
