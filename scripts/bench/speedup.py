"""Realised speedup of pruned models beside the ideal, which is the original's MACs over theirs.

python -m scripts.bench.speedup --synthetic bert-base --device cpu
python -m scripts.bench.speedup --synthetic bert-base --device cpu --profile

Original and pruned models run in turn on the same batch, round after round. A measurement is a
runtime, a dtype, a batch size, a length, a constraint and a multiple of neurons. Its speedup is the
median of the rounds' ratios of times, and its quotient is speedup / ideal (MACs of the Transformer
layers at this length).

`--profile` writes instead where the time goes, by kind of operator, at the first of `--cells`.
Compiling takes longer than measuring: processes with the same `--turns FILE` (any name) compile
side by side and then measure one after the other.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.cli.validation import check_exports
from rfprune.errors import UserError
from scripts.bench import harness
from scripts.bench.harness import Conditions, grouped, machine, say
from scripts.bench.models import (
    add_model_or_synthetic,
    layers_of,
)
from scripts.bench.timed_models import (
    TimedModels,
    default_output,
    load_timed_models,
    structure_of,
    time_models,
    warm_up,
)

RUNTIMES = {"cpu": ("eager", "compile", "onnx"), "cuda": ("eager", "compile", "compile-graphs")}
"""By device; `compile-graphs` is `torch.compile(mode="reduce-overhead")`."""

SHAPES = [f"{size}x{length}" for size in (1, 8, 32) for length in (32, 128, 384)]
CONSTRAINTS = [0.75, 0.5, 0.25]

Wait = Callable[[bool], None]


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    options = _parser().parse_args(argv)
    _check(options)
    if options.profile:
        from scripts.bench.operators import complete_profile

        return complete_profile(options, cells_of(options, options.cells[:1]))
    wanted = cells_of(options, options.cells)
    output = options.output or default_output("speedup", options)
    with taking_turns(options.turns) as wait:
        wait(False)
        same = {"machine": machine(options.device)}
        measure = partial(_measure, options, wait)
        return harness.complete(
            __file__, output, wanted, measure, group_by=("dtype", "runtime"), same=same
        )


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser_of(
        __doc__,
        "dtype constraint seed seconds rounds",
        dtype=["float32"],
        constraint=CONSTRAINTS,
        seconds=20.0,
        rounds=50,
    )
    add_model_or_synthetic(parser)
    add = parser.add_argument
    add("--device", choices=tuple(RUNTIMES), default="cpu", help="default: cpu")
    runtimes = sorted({name for names in RUNTIMES.values() for name in names})
    add("--runtime", nargs="+", choices=runtimes, help="default: all of the device")
    add("--cells", nargs="+", default=SHAPES, metavar="BxS", help="batch size x tokens")
    multiple = harness.count("--round-to")
    add("--round-to", type=multiple, nargs="+", default=[1], help="neurons in multiples of these")
    add("--profile", action="store_true", help="where the time goes, at the first of --cells")
    add("--turns", type=Path, metavar="FILE", help="processes with the same one take turns")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Check the flags before anything is loaded, and fill in the runtimes.

    Raises:
        UserError: a value is not possible here.
    """
    known = RUNTIMES[options.device]
    if options.profile:
        if options.runtime not in (None, ["eager"]):
            raise UserError("--profile looks at PyTorch's operators: leave --runtime out.")
        options.runtime = ["eager"]
    if options.runtime is None:
        options.runtime = [name for name in known if name != "onnx" or _has_onnx()]
    for name in options.runtime:
        if name not in known:
            raise UserError(
                f"--runtime {name} does not run with --device {options.device}: choose from "
                f"{', '.join(known)}."
            )
    if "onnx" in options.runtime:
        check_exports(["onnx"])
        if "float32" not in options.dtype:
            raise UserError("--runtime onnx needs --dtype float32: add it, or leave onnx out.")
    if not options.seconds >= 0:
        raise UserError(f"--seconds {options.seconds} is not a number of at least 0.")


def _has_onnx() -> bool:
    try:
        check_exports(["onnx"])
    except UserError as error:
        say(f"without the runtime onnx: {error}")
        return False
    return True


def cells_of(options: argparse.Namespace, cells: Sequence[str]) -> list[Conditions]:
    """All measurements that the flags ask for, those that share models and batches side by side."""
    shared = harness.conditions_of(options, ("model", "device"))
    wanted = []
    for one in harness.each_combination(
        dtype=options.dtype,
        runtime=options.runtime,
        shape=[shape_of(text) for text in cells],
        constraint=options.constraint,
        round_to=options.round_to,
    ):
        batch_size, length = one.pop("shape")
        if one["runtime"] != "onnx" or one["dtype"] == "float32":
            more = {"batch_size": batch_size, "length": length, "seed": options.seed}
            wanted.append(shared | one | more)
    return wanted


def shape_of(text: str) -> tuple[int, int]:
    """Batch size and length of a cell.

    Raises:
        UserError: it is no cell.
    """
    size, _, length = text.partition("x")
    if not (size.isdecimal() and length.isdecimal() and int(size) and int(length)):
        raise UserError(
            f"--cells {text} is not a shape: write batch size x tokens, such as 32x128."
        )
    return int(size), int(length)


def _measure(
    options: argparse.Namespace, wait: Wait, group: Sequence[Conditions]
) -> Iterator[dict[str, Any]]:
    """The measurements of one set of models, shape by shape."""
    wait(False)
    models = load_timed_models(options, group)
    shapes = grouped(group, ("batch_size", "length"))
    if options.turns:
        for shape in shapes:
            warm_up(models, shape)
        wait(True)
    for shape in shapes:
        yield from _measure_shape(models, shape, options)
    _forget_compiled()


def _measure_shape(
    models: TimedModels, group: Sequence[Conditions], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    from rfprune.cost.macs import mac_costs

    ratios = time_models(models, group, options)
    costs = mac_costs(models.layout, group[0]["length"])
    for conditions, ratio in zip(group, ratios, strict=True):
        kept = models.pruned[structure_of(conditions)][0]
        speedup, ideal = 1 / ratio.ratio, costs.original / costs.total(kept)
        yield {
            **conditions,
            "speedup": round(speedup, 5),
            "spread": round(ratio.spread, 5),
            "ideal": round(ideal, 5),
            "quotient": round(speedup / ideal, 5),
            "dense_ms": round(ratio.original.median_ms, 5),
            "pruned_ms": round(ratio.pruned.median_ms, 5),
            "dense_spread": round(ratio.original.spread, 5),
            "rounds": ratio.pruned.rounds,
            "attention": models.dense.config._attn_implementation,
            "layers": layers_of(models.layout, kept),
            "load_average": round(os.getloadavg()[0], 2),
        }


@contextmanager
def taking_turns(path: Path | None) -> Iterator[Wait]:
    """Several processes prepare side by side and measure one at a time, by the lock of one file.

    Gives a function: `wait(False)` returns when no other process measures, `wait(True)` when no
    other process does anything. Without a file both return at once.

    Raises:
        UserError: the file cannot be written.
    """
    if path is None:
        yield lambda _: None
        return
    import fcntl  # not on Windows

    try:
        file = path.open("a")
    except OSError as error:
        raise UserError(f"--turns {path} cannot be written: {error.strerror}.") from error
    with file:
        yield lambda alone: fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)


def _forget_compiled() -> None:
    """Free compiled code and the graphs that CUDA recorded."""
    import gc

    import torch

    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
