"""The flags of the command, checked as far as that goes without importing torch.

`parse(argv)` gives the settings of a run or raises a UserError of one sentence.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from rfprune.cli import flag_values as value
from rfprune.cli.data_flags import add_data, check_data
from rfprune.cli.hub_flags import add_hub, check_hub
from rfprune.cli.method_flags import add_method, with_method
from rfprune.errors import UserError
from rfprune.report.output_folder import check_output
from rfprune.settings import DTYPES, EXPORTS, METRICS, Options
from rfprune.tasks.registry import (
    CUSTOM,
    LANGUAGE_MODELING,
    SIMILARITY,
    TASK_NAMES,
    TASKS,
    default_batch_size,
    default_samples,
)

_EPILOG = """\
examples:
  rfprune --model demo --task sst2 --constraint 0.5
  rfprune --model bert-base --task mrpc --constraint 0.5
  rfprune --model path/to/checkpoint --task mrpc --data-dir path/to/data --constraint 0.7 0.5 0.3
  rfprune --model bert-base --task mrpc --max-drop 1
  rfprune --model path/to/checkpoint --task custom --data-dir path/to/data --text-columns review \\
      --label-column verdict --constraint 0.5
"""


def parse(argv: Sequence[str]) -> Options:
    """Read the flags.

    Raises:
        UserError: a flag is unknown, missing, or has a value that it cannot have.
    """
    flags = vars(_parser().parse_args(argv))
    flags["constraint"] = tuple(dict.fromkeys(flags["constraint"] or ()))
    flags["samples"] = flags["samples"] or default_samples(flags["task"])
    flags["batch_size"] = flags["batch_size"] or default_batch_size(flags["task"])
    flags["export"] = tuple(dict.fromkeys(flags["export"]))
    flags["text_columns"] = flags["text_columns"] and tuple(flags["text_columns"])
    options = Options(**with_method(flags))
    if options.latency_table is not None and options.metric != "latency":
        raise UserError(
            f"--latency-table does nothing for --metric {options.metric}: leave it out, or give "
            f"--metric latency."
        )
    value.check_task(options.task, TASK_NAMES)
    check_data(options.task, options.data_dir, options.text_columns, options.label_column)
    value.check_device(options.device)
    check_hub(
        options.push_to_hub,
        private=options.private,
        dry_run=options.hub_dry_run,
        models=len(options.ratios),
    )
    value.check_exports(options.export, quantize=options.quantize)
    for ratio in options.ratios:
        check_output(
            options.output_folder(ratio),
            overwrite=options.overwrite,
            flags=options.identity(ratio),
        )
    return options


class _Parser(argparse.ArgumentParser):
    """Leaves it to main to say what is wrong: one sentence, no usage text before it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see rfprune --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rfprune",
        description="Prune heads and FFN neurons of a fine-tuned Transformer, without retraining.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"rfprune {version('rfprune')}")
    _add_what(parser)
    add_data(parser)
    add_method(parser)
    _add_run(parser)
    add_hub(parser)
    return parser


def _add_what(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to prune")
    group.add_argument(
        "--model",
        required=True,
        type=value.name("--model"),
        help="a folder, a hub id, an alias such as bert-base, or demo (embedded, needs no network)",
    )
    group.add_argument(
        "--task",
        required=True,
        help=f"{', '.join(TASKS)}; or {CUSTOM}: your own checkpoint and data; "
        f"{LANGUAGE_MODELING}, on any text; {SIMILARITY}, of embeddings",
    )
    size = group.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--constraint",
        nargs="+",
        type=value.ratio,
        metavar="RATIO",
        help="fraction of the original cost to keep, between 0 and 1; several give several models",
    )
    size.add_argument(
        "--max-drop",
        type=value.points,
        metavar="POINTS",
        help="or the smallest model that loses at most so many points (of 100) of the task's score",
    )
    group.add_argument(
        "--metric",
        choices=METRICS,
        default="mac",
        help="the cost that counts: MACs, parameters, bytes of weights, or measured milliseconds "
        "on this device (default: mac)",
    )
    group.add_argument(
        "--latency-table",
        type=value.folder("--latency-table"),
        metavar="FILE",
        help="of --metric latency; made by scripts/profile_latency.py, for the batch size and "
        "length that it was made for (default: measured first, on a typical batch)",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--device", help="cpu, cuda, cuda:N or mps (default: the best there is)")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the weights (default: float32, and stored as the original's are)",
    )
    group.add_argument(
        "--output-dir",
        type=value.folder("--output-dir"),
        metavar="DIR",
        help="default: outputs/MODEL/TASK/METRIC-CONSTRAINT/seed-N, or METRIC-drop-POINTS; several "
        "constraints make folders in it",
    )
    group.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    group.add_argument(
        "--export",
        nargs="+",
        action="extend",
        choices=EXPORTS,
        default=[],
        help="dense: also in the original shapes, with zeros; onnx: also as ONNX, any batch size "
        "and length (needs rfprune[onnx])",
    )
    group.add_argument(
        "--quantize", action="store_true", help="of --export onnx; also with int8 weights"
    )
    kept = group.add_mutually_exclusive_group()
    kept.add_argument(
        "--cache-dir",
        type=value.folder("--cache-dir"),
        metavar="DIR",
        help="what is collected is kept here for other constraints (default: $RFPRUNE_CACHE, or "
        "~/.cache/rfprune)",
    )
    kept.add_argument("--no-cache", action="store_true", help="collect again and keep nothing")
    group.add_argument(
        "--score-stages",
        action="store_true",
        help="also score what was selected, before it is fitted, for the report",
    )
    group.add_argument("--quiet", action="store_true", help="print nothing but errors")
    group.add_argument("--verbose", action="store_true", help="print the libraries' warnings too")
