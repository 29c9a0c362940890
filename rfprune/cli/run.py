"""One run of the command: load, evaluate, prune, evaluate again, measure latency, save."""

from __future__ import annotations

import hashlib
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from warnings import warn

import torch

from rfprune import distributed
from rfprune.cache import default_folder
from rfprune.checkpoints.device import pick_device
from rfprune.checkpoints.loading import (
    LoadedCheckpoint,
    load,
    resolve_data_dir,
    resolve_max_length,
    resolve_task,
)
from rfprune.checkpoints.precision import round_to_stored_dtype, stored_dtype
from rfprune.cli.console import (
    Consoles,
    collected_warnings,
    open_consoles,
    out_of_memory_as_user_error,
)
from rfprune.cli.memory import placement, warn_of_exceeded_memory
from rfprune.cli.outputs import export_job, identity_of, publish, save_output, unfinished_ratios
from rfprune.cli.validation import check_kind, check_vocabulary
from rfprune.cli.vocabulary import (
    held_out_texts,
    trim_checkpoint,
    warn_of_more_tokens,
    with_new_ids,
)
from rfprune.cost.constraint import Constraint
from rfprune.cost.sizes import Sizes
from rfprune.errors import RfpruneWarning, UserError
from rfprune.export.formats import check_formats
from rfprune.latency.profile import load_or_profile
from rfprune.max_drop.search import DropSearch, constraints_to_try, find_smallest_model
from rfprune.methods.budget import check_constraints
from rfprune.methods.problem import add_token_mask, prepare_problem
from rfprune.pruning import Target, prune_to_each
from rfprune.report.cached_evaluation import evaluate_original, inputs_digest, with_targets
from rfprune.report.console_table import print_report
from rfprune.report.measure import FewerTokens, Outcome, Prepared, measure
from rfprune.report.report_json import SCHEMA
from rfprune.settings import Options
from rfprune.tasks.baseline import below_baseline
from rfprune.tasks.calibration import calibration_batches
from rfprune.tasks.evaluation import Evaluation, EvaluationSet, prepare_evaluation
from rfprune.tasks.max_length import NO_LIMIT
from rfprune.tasks.own_data import warn_about_truncation
from rfprune.tasks.registry import OWN_DATA, HeldOut, Task


def run(options: Options, arguments: Sequence[str]) -> None:
    """Prune to every constraint of the options, or to the largest allowed drop, and save.

    Under a launcher all processes prune together; the main one evaluates, prints and saves.

    Args:
        arguments: the flags as they were given, for the report.

    Raises:
        UserError: something that the user can fix.
        OtherProcessError: another process of the run failed.
    """
    device = pick_device(distributed.local_device(options.run.device))
    with distributed.process_group(device):
        consoles = open_consoles(quiet=options.run.quiet or not distributed.is_main())
        with (
            collected_warnings(consoles.log, verbose=options.run.verbose) as warnings,
            out_of_memory_as_user_error(options.data.batch_size),
        ):
            prepared = _prepare(options, device, consoles)
            ratios = distributed.broadcast_from_main(
                lambda: unfinished_ratios(options, prepared, consoles)
            )
            if ratios and options.target.metric == "latency":
                prepared = _with_latency_table(options, prepared, ratios, consoles)
            if not distributed.is_main():
                _prune_with_main_process(options, prepared, ratios)
                return
            if ratios:
                command = shlex.join(["rfprune", *arguments])
                _make_models(options, command, prepared, ratios, warnings, consoles)
            publish(options, consoles)


def _prepare(options: Options, device: torch.device, consoles: Consoles) -> Prepared:
    """Load and check the checkpoint and the data; bad input ends the run here."""
    target, data = options.target, options.data
    check_vocabulary(target.vocabulary)
    task = resolve_task(
        target.task,
        target.model,
        data_dir=data.data_dir,
        text_columns=data.text_columns,
        label_column=data.label_column,
        train_split=data.train_split,
        validation_split=data.validation_split,
        held_out=HeldOut.from_flags(data.validation_fraction, options.settings.seed),
        writing=options.writing,
    )
    check_kind(
        task,
        exports=options.output.export,
        max_drop=target.max_drop,
        vocabulary=target.vocabulary,
    )
    consoles.log.print(f"Loading {target.model} and the data of {task.name}")
    start = time.perf_counter()
    dtype = getattr(torch, options.run.dtype or "float32")
    placed = placement(options, task, device, dtype)
    if placed.offload is not None and placed.offload != options.run.offload:
        consoles.log.print(f"Offloading the layers to {placed.offload} to stay within --max-memory")
    loaded = load(target.model, task, device=device, dtype=dtype, offload=placed.offload)
    check_formats(loaded.model, loaded.tokenizer, options)
    stored = stored_dtype(loaded.source) if options.run.dtype is None else dtype
    max_length = resolve_max_length(loaded, task, data.max_length)
    data_dir = resolve_data_dir(target.model, data.data_dir)
    batches = calibration_batches(
        task,
        loaded.tokenizer,
        data_dir,
        num_samples=data.samples,
        batch_size=data.batch_size,
        max_length=max_length,
        seed=options.settings.seed,
        with_labels=options.settings.use_labels,
    )

    def validation_data(tokenizer: Any) -> EvaluationSet:
        return prepare_evaluation(
            task,
            tokenizer,
            data_dir,
            batch_size=data.batch_size,
            max_length=max_length,
            limit=data.eval_limit,
        )

    evaluation_set = validation_data(loaded.tokenizer)
    if task.kind == "seq2seq":
        consoles.log.print(f"Generating target texts from up to {data.samples} sources")
        batches = distributed.broadcast_from_main(
            lambda: with_targets(
                loaded.model,
                batches,
                task.writing,
                cache=_cache_folder(options),
                progress=consoles.progress,
            )
        )
    _warn_about_truncation(options, task, loaded, batches, "calibration")
    model, vocabulary = loaded.model, None
    if target.vocabulary:
        vocabulary = trim_checkpoint(target, loaded, batches)
        model, batches = vocabulary.model, with_new_ids(vocabulary, batches)
    problem = prepare_problem(
        model,
        batches,
        options.settings,
        cache=_cache_folder(options),
        progress=consoles.progress,
    )
    problem = replace(problem, max_bytes=placed.free_bytes)
    if vocabulary is not None:
        problem = replace(problem, untrimmed=loaded.model)
    if not options.removes_units and options.settings.sparsity is None:
        problem = replace(problem, warnings=())  # they are about what is fitted, and nothing is
    for warning in problem.warnings:
        warn(warning, RfpruneWarning, stacklevel=2)
    batches = [dict(add_token_mask(model, problem.layout, batch)) for batch in batches]
    if target.metric != "latency":  # checked once there is a latency table
        check_constraints(problem, _constraints(options, target.ratios))
    if target.sizes is not None:
        Sizes.load(target.sizes).kept(problem.layout)
    fewer_tokens = None
    if vocabulary is not None:
        changes = vocabulary.compare(held_out_texts(task, data_dir, data.eval_limit))
        warn_of_more_tokens(changes)
        trimmed_set = validation_data(vocabulary.tokenizer)
        fewer_tokens = FewerTokens(vocabulary, trimmed_set, changes)
    _warn_about_truncation(options, task, loaded, evaluation_set.batches, "validation")
    seconds = time.perf_counter() - start
    inputs = inputs_digest(model, batches, evaluation_set)
    if target.sizes is not None:  # the file may change under the same name
        inputs = hashlib.sha256(inputs.encode() + target.sizes.read_bytes()).hexdigest()
    return Prepared(loaded, problem, stored, batches, evaluation_set, seconds, inputs, fewer_tokens)


def _warn_about_truncation(
    options: Options,
    task: Task,
    loaded: LoadedCheckpoint,
    batches: Sequence[Mapping[str, torch.Tensor]],
    examples: str,
) -> None:
    """Warn if texts were cut; long contexts and running text are split without gaps instead."""
    if task.kind in ("question-answering", "language-modeling", "image-classification"):
        return
    longest = resolve_max_length(loaded, replace(task, max_length=NO_LIMIT), None)
    length = resolve_max_length(loaded, task, options.data.max_length)
    warn_about_truncation(
        batches,
        length,
        examples=examples,
        is_default=options.data.max_length is None and task.name in OWN_DATA,
        is_longest=length == longest,
    )


def _with_latency_table(
    options: Options, prepared: Prepared, ratios: Sequence[float | None], consoles: Consoles
) -> Prepared:
    """Add the latency table of this device: from the given file, or measured now."""
    path, problem = options.target.latency_table, prepared.problem
    if path is None:
        consoles.log.print("Measuring the latency of heads and neurons on this device")
    table = distributed.broadcast_from_main(
        lambda: load_or_profile(
            path,
            problem.model,
            problem.layout,
            prepared.batches,
            round_to=problem.settings.round_to,
            progress=consoles.progress,
        )
    )
    problem = replace(problem, latency_table=table)
    check_constraints(problem, _constraints(options, ratios))
    return replace(prepared, problem=problem)


def _make_models(
    options: Options,
    command: str,
    prepared: Prepared,
    ratios: Sequence[float | None],
    warnings: Sequence[str],
    consoles: Consoles,
) -> None:
    """Prune, measure and save one model after another."""
    log, progress = consoles.log, consoles.progress
    log.print(f"Scoring the original on {prepared.evaluation_set.num_examples} examples")
    original, cached = evaluate_original(prepared, _cache_folder(options), progress=progress)
    reason = below_baseline(prepared.evaluation_set, original, prepared.loaded.model)
    if reason is not None:
        if options.target.max_drop is not None:
            raise UserError(
                f"--max-drop {options.target.max_drop:g} needs an original that works, but its "
                f"{reason}; correct that, or give a size with --constraint"
            )
        warn(f"The original's {reason}.", RfpruneWarning, stacklevel=2)
    log.print("Pruning")
    for outcome in _outcomes(options, prepared, original, ratios, consoles):
        result = outcome.result
        stored = round_to_stored_dtype(prepared.stored, result.model)
        if outcome.pruned is None:
            size = "" if result.ratio is None else f" to {result.ratio:g}"
            log.print(f"Scoring and timing the model pruned{size}")
        report = {
            "schema": SCHEMA,
            "command": command,
            **measure(options, prepared, original, outcome, stored, progress=progress),
            "cached": sorted(cached.union(result.cached)),
            "identity": identity_of(options, prepared, result.ratio),
            "warnings": list(dict.fromkeys([*warnings, *result.warnings])),
        }
        exports = None
        if options.output.export:
            log.print(f"Exporting: {', '.join(options.output.export)}")
            exports = export_job(options, prepared, original, result, stored)
        warn_of_exceeded_memory(options)
        save_output(options, prepared, result, report, exports, log)
        print_report(report, consoles.results)
        distributed.barrier()


def _outcomes(
    options: Options,
    prepared: Prepared,
    original: Evaluation,
    ratios: Sequence[float | None],
    consoles: Consoles,
) -> Iterator[Outcome]:
    """The pruned models: one per constraint, or the smallest within --max-drop."""
    target, problem = options.target, prepared.problem
    if target.max_drop is None:
        yield from map(Outcome, prune_to_each(problem, _wanted(options, ratios)))
        return
    search = DropSearch(target.max_drop, target.metric, prepared, original, consoles.progress)
    yield find_smallest_model(
        search, lambda constraints: prune_to_each(problem, constraints), consoles.log.print
    )


def _prune_with_main_process(
    options: Options, prepared: Prepared, ratios: Sequence[float | None]
) -> None:
    """This process's share of the pruning; the main process has the results."""
    if not ratios:
        return
    target, problem = options.target, prepared.problem
    if target.max_drop is not None:
        for _ in prune_to_each(problem, constraints_to_try(target.metric)):
            pass  # the main process decides what to try next
        distributed.barrier()
        return
    for _ in prune_to_each(problem, _wanted(options, ratios)):
        distributed.barrier()  # the main process measures the latency meanwhile


def _cache_folder(options: Options) -> Path | None:
    return (options.run.cache_dir or default_folder()) if options.run.cache else None


def _wanted(options: Options, ratios: Sequence[float | None]) -> Sequence[Target]:
    """The constraints to prune to: a single None where all units stay."""
    if options.target.sizes is not None:
        return [Sizes.load(options.target.sizes)]
    return _constraints(options, ratios) if options.target.constraint else [None]


def _constraints(options: Options, ratios: Sequence[float | None]) -> list[Constraint]:
    return [Constraint(options.target.metric, ratio) for ratio in ratios if ratio is not None]
