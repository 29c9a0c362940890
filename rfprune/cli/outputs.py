"""The outputs of a run: which are complete already, writing one, and publishing all."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console

from rfprune.checkpoints.companion_files import write_companion_files
from rfprune.checkpoints.loading import quiet_transformers
from rfprune.checkpoints.sentence_transformers import is_reranker, pools
from rfprune.cli.console import Consoles
from rfprune.export.contract import ExportJob
from rfprune.export.formats import write_exports
from rfprune.hub.upload import describe_push, push
from rfprune.model.checkpoint import save_pruned
from rfprune.model.staging import staged
from rfprune.report.card import write_card
from rfprune.report.console_table import print_report, write_log
from rfprune.report.measure import Prepared
from rfprune.report.output_folder import check_output, holds, weight_bytes
from rfprune.report.page import write_family_page, write_run_page
from rfprune.report.report_json import read_report, write_report
from rfprune.result import PruneResult
from rfprune.settings import Options
from rfprune.tasks.evaluation import Evaluation

LATENCY_TABLE_FILE = "latency_table.json"


def identity_of(options: Options, prepared: Prepared, ratio: float | None) -> dict[str, str]:
    """The identity of an output: the flags, and the model and data that they name."""
    return {"flags": options.identity(ratio), "inputs": prepared.inputs}


def unfinished_ratios(
    options: Options, prepared: Prepared, consoles: Consoles
) -> list[float | None]:
    """The ratios without a complete output; prints the results of those that are complete.

    Raises:
        UserError: the folder of an output holds something else.
    """
    unfinished = []
    for ratio in options.target.ratios:
        folder = options.output_folder(ratio)
        if not options.output.overwrite and holds(folder, identity_of(options, prepared, ratio)):
            consoles.log.print(
                f"'{folder}': already complete, skipping (--overwrite prunes it again)"
            )
            print_report(read_report(folder), consoles.results)
            continue
        check_output(folder, overwrite=options.output.overwrite)
        unfinished.append(ratio)
    return unfinished


def save_output(
    options: Options,
    prepared: Prepared,
    result: PruneResult,
    report: dict[str, Any],
    exports: ExportJob | None,
    log: Console,
) -> None:
    """Write model, masks, tokenizer, report and log to the output folder: all of them or nothing.

    Args:
        report: most of report.json; the entries about the files are added.
        exports: what --export needs, if it was given.
    """
    folder = options.output_folder(result.ratio)
    with staged(folder, overwrite=options.output.overwrite) as temporary, quiet_transformers():
        dtype = getattr(torch, report["stored_dtype"])
        tokenizer = prepared.tokenizer
        save_pruned(
            result.model,
            result.layout,
            result.masks,
            temporary,
            tokenizer,
            removed_layers=result.removed_layers,
            dtype=dtype,
        )
        report["pruned"]["bytes"] = weight_bytes(temporary)
        files = prepared.files
        write_companion_files(files, temporary)
        report["embedder"] = pools(files)
        report["reranker"] = is_reranker(files)
        if exports is not None:
            report["exports"] = write_exports(options.output.export, temporary, exports)
            if "dense" in options.output.export:
                write_companion_files(files, temporary / "dense")
        if prepared.problem.latency_table is not None:
            prepared.problem.latency_table.save(temporary / LATENCY_TABLE_FILE)
        write_report(report, temporary)
        write_run_page(report, temporary)
        write_card(report, temporary, options.hub.push_to_hub)
        write_log(report, temporary, log.export_text(clear=False))


def export_job(
    options: Options,
    prepared: Prepared,
    original: Evaluation,
    result: PruneResult,
    stored: torch.dtype,
) -> ExportJob:
    """What the exports of a pruned model are made from and compared with."""
    return ExportJob(
        original=prepared.problem.model,
        result=result,
        tokenizer=prepared.tokenizer,
        batches=prepared.batches,
        evaluation_set=prepared.pruned_set,
        reference=original,
        stored=stored,
        quantize=options.output.quantize,
        gguf_types=options.output.gguf_types,
    )


def publish(options: Options, consoles: Consoles) -> None:
    """Write the page with all sizes, and upload the output if --push-to-hub was given."""
    log, hub = consoles.log, options.hub
    folders = [options.output_folder(ratio) for ratio in options.target.ratios]
    page = write_family_page(folders)
    if page is not None:
        log.print(f"Wrote a page with all sizes: '{page}'")
    if hub.push_to_hub is None:
        return
    if hub.hub_dry_run:
        log.print(describe_push(folders[0], hub.push_to_hub, private=hub.private))
        return
    log.print(f"Pushing to {hub.push_to_hub}")
    address = push(folders[0], hub.push_to_hub, private=hub.private, progress=consoles.progress)
    log.print(f"Pushed to {address}")
