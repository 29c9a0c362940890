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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.cli.validation import check_exports
from rfprune.errors import UserError
from scripts.bench import harness
from scripts.bench.harness import Conditions, grouped, machine, say
from scripts.bench.models import (
    Batch,
    Kept,
    add_model_or_synthetic,
    draw_structure,
    layers_of,
    pruned_to,
    random_batch,
)
from scripts.profile_latency import load_model

if TYPE_CHECKING:
    from rfprune.latency.timing import Ratio
    from rfprune.model.layout import Layout

RUNTIMES = {"cpu": ("eager", "compile", "onnx"), "cuda": ("eager", "compile", "compile-graphs")}
"""By device; `compile-graphs` is `torch.compile(mode="reduce-overhead")`."""

SHAPES = [f"{size}x{length}" for size in (1, 8, 32) for length in (32, 128, 384)]
CONSTRAINTS = [0.75, 0.5, 0.25]

WARM_UP_ROUNDS = {"cpu": 1, "cuda": 3}
"""The first pass compiles; CUDA's graphs are recorded at the second."""

TOLERANCE = 0.003
"""Rounds end when the standard error of every speedup is below this fraction of it."""

Run = Callable[[Batch], object]
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
        shape=[_shape(text) for text in cells],
        constraint=options.constraint,
        round_to=options.round_to,
    ):
        batch_size, length = one.pop("shape")
        if one["runtime"] != "onnx" or one["dtype"] == "float32":
            more = {"batch_size": batch_size, "length": length, "seed": options.seed}
            wanted.append(shared | one | more)
    return wanted


def _shape(text: str) -> tuple[int, int]:
    size, _, length = text.partition("x")
    if not (size.isdecimal() and length.isdecimal() and int(size) and int(length)):
        raise UserError(
            f"--cells {text} is not a shape: write batch size x tokens, such as 32x128."
        )
    return int(size), int(length)


def default_output(kind: str, options: argparse.Namespace) -> Path:
    """results/KIND_MODEL_DEVICE[_Nthread].jsonl."""
    import torch

    threads = f"{torch.get_num_threads()}thread" if options.device == "cpu" else None
    return harness.default_output(kind, harness.model_name(options), options.device, threads)


@dataclass(frozen=True)
class Field:
    """The models that are timed in turn; pruned ones by constraint and multiple of neurons."""

    dense: Any
    layout: Layout
    run_dense: Run
    pruned: Mapping[tuple[float, int], tuple[Kept, Run]]


def make_field(options: argparse.Namespace, group: Sequence[Conditions]) -> Field:
    """The models of measurements that share device, dtype and runtime."""
    import torch

    from rfprune.model.layout import layout_of

    first = group[0]
    dtype = getattr(torch, first["dtype"])
    dense = load_model(options.model, options.synthetic, dtype).to(first["device"])
    layout = layout_of(dense)
    pruned = {}
    for ratio, round_to in dict.fromkeys(structure_of(one) for one in group):
        kept = draw_structure(layout, ratio, seed=first["seed"], round_to=round_to)
        pruned[ratio, round_to] = kept, runner(first["runtime"], pruned_to(dense, layout, kept))
    return Field(dense, layout, runner(first["runtime"], dense), pruned)


def structure_of(conditions: Conditions) -> tuple[float, int]:
    """The key of a pruned model in a field."""
    return conditions["constraint"], conditions["round_to"]


def runner(runtime: str, model: Any) -> Run:
    """A function that runs a model on a batch by a runtime.

    Compiled code and ONNX files are made for batches of any size and length (PyTorch makes its own
    for a batch of one). Each compiled model compiles at its first batch.
    """
    if runtime == "onnx":
        return _onnx_runner(model)
    if runtime == "eager":
        return lambda batch: model(**batch)
    import torch

    def forward(batch: Batch) -> object:
        return model(**batch)

    # torch keeps compiled variants by code object, and tries all of them at each call: with one
    # code object for all models, the time of one would depend on how many models there are.
    forward.__code__ = forward.__code__.replace(co_name=f"forward_{id(model)}")
    mode = "reduce-overhead" if runtime == "compile-graphs" else None
    return torch.compile(forward, dynamic=True, mode=mode)


def _onnx_runner(model: Any) -> Run:
    import tempfile

    from rfprune.export.onnx import OnnxModel, export_onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, random_batch(model, 2, 16), path)
        exported = OnnxModel(path)
    return lambda batch: exported(**batch)


def _measure(
    options: argparse.Namespace, wait: Wait, group: Sequence[Conditions]
) -> Iterator[dict[str, Any]]:
    """The measurements of one set of models, shape by shape."""
    wait(False)
    field = make_field(options, group)
    shapes = grouped(group, ("batch_size", "length"))
    if options.turns:
        for shape in shapes:
            warm_up(field, shape)
        wait(True)
    for shape in shapes:
        yield from _measure_shape(field, shape, options)
    _forget_compiled()


def _measure_shape(
    field: Field, group: Sequence[Conditions], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    from rfprune.cost.macs import mac_costs

    ratios = time_field(field, group, options)
    costs = mac_costs(field.layout, group[0]["length"])
    for conditions, ratio in zip(group, ratios, strict=True):
        kept = field.pruned[structure_of(conditions)][0]
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
            "attention": field.dense.config._attn_implementation,
            "layers": layers_of(field.layout, kept),
            "load_average": round(os.getloadavg()[0], 2),
        }


def time_field(
    field: Field, group: Sequence[Conditions], options: argparse.Namespace
) -> list[Ratio]:
    """The original and the pruned models of one shape in turn, after they have been warmed up."""
    import torch

    from rfprune.latency.timing import TimingBudget, time_ratios

    calls = warm_up(field, group)
    budget = TimingBudget(
        options.seconds, max_rounds=options.rounds, tolerance=TOLERANCE, warm_up_rounds=0
    )
    with torch.inference_mode():
        return time_ratios(
            calls[0],
            calls[1:],
            field.dense.device,
            budget,
        )


def warm_up(field: Field, group: Sequence[Conditions]) -> list[Callable[[], object]]:
    """Calls of the original and of the pruned models on one shape; each has been made before."""
    import torch

    batch = random_batch(field.dense, group[0]["batch_size"], group[0]["length"])
    runs = [field.run_dense, *(field.pruned[structure_of(one)][1] for one in group)]
    calls: list[Callable[[], object]] = [partial(run, batch) for run in runs]
    with torch.inference_mode():
        for _ in range(WARM_UP_ROUNDS[group[0]["device"]]):
            for call in calls:
                call()
    return calls


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
