"""Score a checkpoint, dense or pruned, on a task's validation data.

python scripts/evaluate.py --model outputs/... --task mrpc --data-dir data --output scores.json
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import warn

from rfprune.cli.exit_codes import NOTHING_WRITTEN, script
from rfprune.cli.parser import add_flags
from rfprune.cli.validation import check_data, check_new_file, check_task, check_writing
from rfprune.errors import RfpruneWarning, UserError
from rfprune.settings import DTYPES, DataSettings, RunSettings, WritingSettings
from rfprune.tasks.registry import TASK_NAMES, HeldOut, default_batch_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rfprune.tasks.evaluation import Evaluation


SPLITS_AND_COLUMNS = (
    "validation_fraction",
    "train_split",
    "validation_split",
    "text_columns",
    "label_column",
)


@script(NOTHING_WRITTEN)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    options = _parser().parse_args(argv)
    check_task(options.task)
    RunSettings(device=options.device)
    check_data(
        options.task,
        options.data_dir,
        options.text_columns,
        options.label_column,
        options.validation_fraction,
    )
    check_writing(options.task, _writing(options))
    if options.output is not None:
        check_new_file("--output", options.output)
    _print_table(_evaluate(options), options.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="folder (dense or pruned), hub id or alias")
    parser.add_argument("--task", required=True, help=", ".join(TASK_NAMES))
    columns = SPLITS_AND_COLUMNS
    add_flags(parser, DataSettings, ("data_dir", *columns, "batch_size", "max_length"))
    add_flags(parser, WritingSettings)
    parser.add_argument("--limit", type=int, help="score this many random examples of each split")
    seed = "draws the examples, and the rows of --validation-fraction (default: 0)"
    parser.add_argument("--seed", type=int, default=0, help=seed)
    add_flags(parser, RunSettings, ("device",))
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the scores there")
    return parser


def _writing(options: argparse.Namespace) -> WritingSettings:
    return WritingSettings(
        **{one.name: getattr(options, one.name) for one in fields(WritingSettings)}
    )


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Load and score: the contents of the output file."""
    import torch
    from rich.console import Console

    from rfprune.checkpoints.device import pick_device
    from rfprune.checkpoints.loading import load, resolve_data_dir, resolve_max_length, resolve_task
    from rfprune.cli.console import collected_warnings
    from rfprune.report.report_json import versions
    from rfprune.tasks.baseline import below_baseline
    from rfprune.tasks.evaluation import evaluate_model, prepare_evaluation

    with collected_warnings(Console(stderr=True, highlight=False), verbose=False) as warnings:
        task = resolve_task(
            options.task,
            options.model,
            data_dir=options.data_dir,
            text_columns=options.text_columns,
            label_column=options.label_column,
            train_split=options.train_split,
            validation_split=options.validation_split,
            held_out=HeldOut.from_flags(options.validation_fraction, options.seed),
            writing=_writing(options),
        )
        device = pick_device(options.device)
        loaded = load(options.model, task, device=device, dtype=getattr(torch, options.dtype))
        max_length = resolve_max_length(loaded, task, options.max_length)
        batch_size = options.batch_size
        if batch_size is None:
            batch_size = default_batch_size(task.name)
        evaluation_set = prepare_evaluation(
            task,
            loaded.tokenizer,
            resolve_data_dir(options.model, options.data_dir),
            batch_size=batch_size,
            max_length=max_length,
            limit=options.limit,
            seed=options.seed,
        )
        evaluation = evaluate_model(loaded.model, evaluation_set, progress=sys.stderr.isatty())
        if (reason := below_baseline(evaluation_set, evaluation, loaded.model)) is not None:
            warn(f"The model's {reason}.", RfpruneWarning, stacklevel=2)
    return {
        "model": options.model,
        "source": loaded.source,
        "task": task.name,
        "higher_is_better": task.higher_is_better,
        "params": sum(parameter.numel() for parameter in loaded.model.parameters()),
        **_scores(evaluation),
        "splits": dict(evaluation_set.split_sizes),
        "limit": options.limit,
        "seed": options.seed,
        "max_length": max_length,
        "batch_size": batch_size,
        "device": str(device),
        "dtype": options.dtype,
        "versions": versions(),
        "warnings": warnings,
    }


def _scores(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "metric_name": evaluation.metric_name,
        "score": evaluation.score,
        "scores": dict(evaluation.scores),
        "examples": evaluation.num_examples,
        "seconds": evaluation.seconds,
    }


def _print_table(result: dict[str, Any], output: Path | None) -> None:
    """Print the scores, and write them to the output file if there is one."""
    from rich.console import Console
    from rich.table import Table

    if output is not None:
        try:
            output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            output.unlink(missing_ok=True)
            raise UserError(f"--output {output} cannot be written: {error.strerror}.") from error
    table = Table()
    table.add_column("score")
    unit = "points" if result["higher_is_better"] else "value"
    table.add_column(unit, justify="right")
    for name, value in result["scores"].items():
        main_score = name == result["metric_name"]
        table.add_row(name, f"{value:.2f}", style="bold" if main_score else None)
    console = Console(highlight=False)
    console.print(f"{result['model']} on {result['task']}", markup=False, soft_wrap=True)
    console.print(table)
    console.print(
        f"{result['examples']} examples, {result['params'] / 1e6:.1f} million parameters, "
        f"{result['seconds']:.1f} s on {result['device']}"
    )


if __name__ == "__main__":
    sys.exit(main())
