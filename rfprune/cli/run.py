"""One run of the command: load, score, prune, score again, time both, write it down."""

from __future__ import annotations

import io
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rfprune import distributed
from rfprune.cache import default_folder
from rfprune.checkpoints.device import pick_device
from rfprune.checkpoints.loading import (
    load,
    quiet_transformers,
    resolve_data_dir,
    resolve_max_length,
    resolve_task,
)
from rfprune.checkpoints.precision import round_to_stored_dtype, stored_dtype
from rfprune.checkpoints.sentence_transformers import write_sentence_transformer_files
from rfprune.cli.console import collected_warnings, out_of_memory_is_said
from rfprune.cli.validation import check_kind
from rfprune.cost.constraint import Constraint
from rfprune.export.exports import ExportJob, write_exports
from rfprune.hub.upload import plan_of, push
from rfprune.latency.profile import load_or_profile
from rfprune.max_drop.search import DropSearch, constraints_to_try, find_smallest_model
from rfprune.methods.budget import check_constraints
from rfprune.methods.problem import add_token_mask, prepare_problem
from rfprune.model.checkpoint import save_pruned
from rfprune.pruning import prune_to_each
from rfprune.report.cached_evaluation import evaluate_original, inputs_digest
from rfprune.report.card import write_card
from rfprune.report.console_table import LOG_WIDTH, print_report, write_log
from rfprune.report.measure import Outcome, Prepared, measure
from rfprune.report.output_folder import check_output, holds, staged, weight_bytes
from rfprune.report.page import write_family_page, write_run_page
from rfprune.report.report_json import SCHEMA, read_report, write_report
from rfprune.result import PruneResult
from rfprune.settings import Options
from rfprune.tasks.calibration import calibration_batches
from rfprune.tasks.evaluation import Evaluation, prepare_evaluation
from rfprune.tasks.own_data import warn_about_truncation
from rfprune.tasks.registry import CUSTOM, Task

LATENCY_TABLE_FILE = "latency_table.json"


def run(options: Options, arguments: Sequence[str]) -> None:
    """Do what the flags ask for; `arguments` are the flags as they were given.

    Raises:
        UserError: something that the user can mend.
        OtherProcessError: something was wrong in another of several processes.
    """
    device = pick_device(distributed.local_device(options.run.device))
    with distributed.process_group(device):
        _run(options, arguments, device)


def _run(options: Options, arguments: Sequence[str], device: torch.device) -> None:
    """Of several processes all prune, and the main one prints, scores and writes."""
    quiet = options.run.quiet or not distributed.is_main()
    progress = not quiet and sys.stderr.isatty()
    told = Console(
        file=io.StringIO() if quiet else sys.stderr,
        record=True,  # for log.txt
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
    )
    # A file or a pipe has no width: the table's own, rather than 80 columns that cut it.
    screen = Console(quiet=quiet, width=None if sys.stdout.isatty() else LOG_WIDTH)
    with (
        collected_warnings(told, verbose=options.run.verbose) as heard,
        out_of_memory_is_said(options.data.batch_size),
    ):
        task = resolve_task(
            options.target.task,
            options.target.model,
            data_dir=options.data.data_dir,
            text_columns=options.data.text_columns,
            label_column=options.data.label_column,
        )
        prepared = _prepare(options, task, device, told, progress=progress)
        left = distributed.broadcast_from_main(lambda: _unfinished(options, prepared, told, screen))
        if left and options.target.metric == "latency":
            prepared = _with_latency_table(options, prepared, left, told, progress)
        if not distributed.is_main():
            _help(options, prepared, left)
            return
        if not left:
            _publish(options, told, progress)
            return
        told.print(f"Scoring the original on {prepared.evaluation_set.num_examples} examples")
        original, cached = evaluate_original(prepared, _cache(options), progress=progress)
        told.print("Pruning")
        for outcome in _outcomes(options, prepared, original, left, told, progress):
            result = outcome.result
            stored = round_to_stored_dtype(prepared.stored, result.model)
            if outcome.pruned is None:
                told.print(f"Scoring and timing the model pruned to {result.constraint.ratio:g}")
            report = {
                "schema": SCHEMA,
                "command": shlex.join(["rfprune", *arguments]),
                **measure(options, prepared, original, outcome, stored, progress=progress),
                "cached": sorted(cached.union(result.cached)),
                "identity": _identity(options, prepared, result.constraint.ratio),
                "warnings": list(dict.fromkeys([*heard, *result.warnings])),
            }
            if options.output.export:
                told.print(f"Exporting it: {', '.join(options.output.export)}")
            _save(options, prepared, original, result, stored, report, told)
            print_report(report, screen)
            distributed.barrier()
        _publish(options, told, progress)


def _outcomes(
    options: Options,
    prepared: Prepared,
    original: Evaluation,
    left: Sequence[float | None],
    told: Console,
    progress: bool,
) -> Iterator[Outcome]:
    """The pruned models: one a constraint, or the one that a search finds."""
    if options.target.max_drop is None:
        yield from map(Outcome, prune_to_each(prepared.problem, _constraints(options, left)))
        return
    search = DropSearch(
        options.target.max_drop, options.target.metric, prepared, original, progress
    )
    yield find_smallest_model(
        search,
        lambda constraints: prune_to_each(prepared.problem, constraints),
        told.print,
    )


def _help(options: Options, prepared: Prepared, left: Sequence[float | None]) -> None:
    """Do another process' share of the pruning; what comes out is what the main one has."""
    if not left:
        return
    if options.target.max_drop is not None:
        for _ in prune_to_each(prepared.problem, constraints_to_try(options.target.metric)):
            pass  # the main one decides what comes next
        distributed.barrier()
        return
    for _ in prune_to_each(prepared.problem, _constraints(options, left)):
        distributed.barrier()  # the main one is timing what it has


def _save(
    options: Options,
    prepared: Prepared,
    original: Evaluation,
    result: PruneResult,
    stored: torch.dtype,
    report: dict[str, Any],
    told: Console,
) -> None:
    """Write model, masks, tokenizer, report and log, all of them or nothing; completes `report`."""
    folder = options.output_folder(result.constraint.ratio)
    with staged(folder, overwrite=options.output.overwrite) as temporary, quiet_transformers():
        tokenizer = prepared.loaded.tokenizer
        save_pruned(result.model, result.layout, result.masks, temporary, tokenizer, dtype=stored)
        report["pruned"]["bytes"] = weight_bytes(temporary)
        report["embedder"] = write_sentence_transformer_files(
            prepared.loaded.sentence_transformer.files, temporary
        )
        if options.output.export:
            report["exports"] = write_exports(
                options.output.export,
                temporary,
                _export_job(prepared, original, result, stored),
                quantize=options.output.quantize,
            )
        if prepared.problem.latency_table is not None:
            prepared.problem.latency_table.save(temporary / LATENCY_TABLE_FILE)
        write_report(report, temporary)
        write_run_page(report, temporary)
        write_card(report, temporary, options.hub.push_to_hub)
        write_log(report, temporary, told.export_text(clear=False))


def _publish(options: Options, told: Console, progress: bool) -> None:
    """Put a family on one page, and a model on the hub if that was asked for."""
    folders = [options.output_folder(ratio) for ratio in options.target.ratios]
    page = write_family_page(folders)
    if page is not None:
        told.print(f"All sizes are on one page, '{page}'")
    repository = options.hub.push_to_hub
    if repository is None:
        return
    if options.hub.hub_dry_run:
        told.print(plan_of(folders[0], repository, private=options.hub.private))
        return
    told.print(f"Pushing to {repository}")
    address = push(folders[0], repository, private=options.hub.private, progress=progress)
    told.print(f"Pushed to {address}")


def _with_latency_table(
    options: Options,
    prepared: Prepared,
    ratios: Sequence[float | None],
    told: Console,
    progress: bool,
) -> Prepared:
    """What sublayers take on this device, from the file that was given, or measured."""
    path, problem = options.target.latency_table, prepared.problem
    if path is None:
        told.print("Measuring what heads and neurons take on this device")
    table = distributed.broadcast_from_main(
        lambda: load_or_profile(
            path,
            problem.model,
            problem.layout,
            prepared.batches,
            round_to=problem.settings.round_to,
            progress=progress,
        )
    )
    problem = replace(problem, latency_table=table)
    check_constraints(problem, _constraints(options, ratios))
    return replace(prepared, problem=problem)


def _export_job(
    prepared: Prepared, original: Evaluation, result: PruneResult, stored: torch.dtype
) -> ExportJob:
    return ExportJob(
        original=prepared.loaded.model,
        result=result,
        tokenizer=prepared.loaded.tokenizer,
        batches=prepared.batches,
        evaluation_set=prepared.evaluation_set,
        reference=original,
        stored=stored,
    )


def _unfinished(
    options: Options, prepared: Prepared, told: Console, screen: Console
) -> list[float | None]:
    """The ratios whose output is not there yet; of the others the table is shown again.

    Raises:
        UserError: an output is there that these flags gave with another model, or other data.
    """
    left = []
    for ratio in options.target.ratios:
        folder = options.output_folder(ratio)
        if not options.output.overwrite and holds(folder, _identity(options, prepared, ratio)):
            told.print(f"'{folder}' is of this very run: kept (--overwrite makes it again)")
            print_report(read_report(folder), screen)
            continue
        check_output(folder, overwrite=options.output.overwrite)
        left.append(ratio)
    return left


def _identity(options: Options, prepared: Prepared, ratio: float | None) -> dict[str, str]:
    """Of one output: the flags, and what they stood for when it was made."""
    return {"flags": options.identity(ratio), "inputs": prepared.inputs}


def _cache(options: Options) -> Path | None:
    return (options.run.cache_dir or default_folder()) if options.run.cache else None


def _constraints(options: Options, ratios: Sequence[float | None]) -> list[Constraint]:
    return [Constraint(options.target.metric, ratio) for ratio in ratios if ratio is not None]


def _prepare(
    options: Options, task: Task, device: torch.device, told: Console, *, progress: bool
) -> Prepared:
    """Load the checkpoint and all data: everything that can be wrong with the input shows here."""
    check_kind(task, exports=options.output.export, max_drop=options.target.max_drop)
    told.print(f"Loading {options.target.model} and the data of {task.name}")
    start = time.perf_counter()
    dtype = getattr(torch, options.run.dtype or "float32")
    loaded = load(options.target.model, task, device=device, dtype=dtype)
    stored = stored_dtype(loaded.source) if options.run.dtype is None else dtype
    max_length = resolve_max_length(loaded, task, options.data.max_length)
    data_dir = resolve_data_dir(options.target.model, options.data.data_dir)
    batches = calibration_batches(
        task,
        loaded.tokenizer,
        data_dir,
        num_samples=options.data.samples,
        batch_size=options.data.batch_size,
        max_length=max_length,
        seed=options.settings.seed,
        with_labels=options.settings.use_labels,
    )
    problem = prepare_problem(
        loaded.model, batches, options.settings, cache=_cache(options), progress=progress
    )
    batches = [dict(add_token_mask(loaded.model, problem.layout, batch)) for batch in batches]
    if options.target.metric != "latency":  # which needs a table first
        check_constraints(problem, _constraints(options, options.target.ratios))
    evaluation_set = prepare_evaluation(
        task,
        loaded.tokenizer,
        data_dir,
        batch_size=options.data.batch_size,
        max_length=max_length,
        limit=options.data.eval_limit,
    )
    if task.name == CUSTOM and options.data.max_length is None and "pixel_values" not in batches[0]:
        warn_about_truncation(evaluation_set.batches, max_length)
    seconds = time.perf_counter() - start
    inputs = inputs_digest(loaded.model, batches, evaluation_set)
    return Prepared(loaded, problem, stored, batches, evaluation_set, seconds, inputs)
