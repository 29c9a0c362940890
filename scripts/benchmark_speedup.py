"""How much faster is a pruned model, and how much of what its MACs promise is that?

Original and pruned models run in turn on the same batch, round after round. A cell is a runtime, a
dtype, a batch size, a length and a constraint. Its speedup comes from the median of the rounds'
ratios of times; its ideal is the original's MACs over the pruned model's (Transformer layers, at
this length), and its quotient speedup / ideal.

    python scripts/benchmark_speedup.py --synthetic bert-base --device cpu
    python scripts/benchmark_speedup.py --synthetic bert-base --device cpu --profile

Every cell is one line of JSON in the output file, written as soon as it is there; the same command
goes on where it was stopped. `--profile` writes instead where the time goes, by kind of operator.
Compiling takes longer than measuring: processes with the same `--turns FILE` (any name) and the
same output compile at the same time, and when all have, they measure one after the other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import one another

from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.cli.validation import check_exports
from rfprune.errors import UserError
from scripts.bench import say
from scripts.speedup_models import RUNTIMES, SYNTHETIC
from scripts.sweep import append_line, model_name, read_lines

if TYPE_CHECKING:
    from scripts.speedup_timing import Wait

CELL = (
    *("model", "device", "dtype", "runtime", "batch_size", "length"),
    *("constraint", "round_to", "seed"),
)
"""Two lines that agree in all of these are the same measurement."""

DTYPES = ("float32", "bfloat16", "float16")
BATCH_SIZES, LENGTHS, CONSTRAINTS = (1, 8, 32), (32, 128, 384), (0.75, 0.5, 0.25)
MAX_ROUNDS = 50

Cell = dict[str, Any]


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130 stopped."""
    options = parser().parse_args(argv)
    cells = cells_of(options)
    output = options.output or default_output(options)
    if options.profile:
        from scripts.speedup_profile import write_profile

        write_profile(options, cells, output)
    else:
        _complete(options, cells, output)
    return 0


def parser() -> argparse.ArgumentParser:
    """The flags: what to time, and how long."""
    flags = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = flags.add_argument
    model = flags.add_mutually_exclusive_group(required=True)
    model.add_argument("--synthetic", choices=SYNTHETIC, help="random weights in this size")
    model.add_argument("--model", metavar="FOLDER", help="a dense checkpoint")
    add("--device", choices=tuple(RUNTIMES), default="cpu", help="default: cpu")
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="default: float32")
    runtimes = sorted({name for names in RUNTIMES.values() for name in names})
    add("--runtime", nargs="+", choices=runtimes, help="default: all of the device")
    add("--batch-size", type=int, nargs="+", default=BATCH_SIZES, help="default: 1 8 32")
    add("--length", type=int, nargs="+", default=LENGTHS, help="tokens; default: 32 128 384")
    add("--cells", nargs="+", metavar="BxS", help="only these, such as 32x128 1x32")
    add("--constraint", type=float, nargs="+", default=CONSTRAINTS, help="default: 0.75 0.5 0.25")
    add("--round-to", type=int, nargs="+", default=(1,), help="keep neurons in multiples of these")
    add("--seed", type=int, default=0, help="draws what is kept (default: 0)")
    add("--seconds", type=float, default=20.0, help="a shape and runtime; default: 20")
    add("--rounds", type=int, default=MAX_ROUNDS, help=f"at most; default: {MAX_ROUNDS}")
    add("--profile", action="store_true", help="where the time goes, at the first of --cells")
    add("--turns", type=Path, metavar="FILE", help="processes with the same one take turns")
    add("--output", type=Path, metavar="FILE", help="default: in results, named after the flags")
    return flags


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """All that the flags ask for, what shares models and batches side by side.

    Raises:
        UserError: a flag's value is not possible, or the values together ask for nothing.
    """
    from rfprune.cost.constraint import Constraint

    for name, least in (("seed", 0), ("rounds", 1), ("seconds", 0)):
        if not getattr(options, name) >= least:
            given = getattr(options, name)
            raise UserError(f"--{name} {given} is not possible: give {least} or more.")
    if min(options.round_to) < 1:
        raise UserError(f"--round-to {min(options.round_to)} is not possible: give 1 or more.")
    constraints = [Constraint("mac", ratio).ratio for ratio in options.constraint]
    pairs = product(_dtypes(options), _runtimes(options))
    cells = [
        {
            "model": options.synthetic or model_name(options.model),
            "device": options.device,
            "dtype": dtype,
            "runtime": runtime,
            "batch_size": batch_size,
            "length": length,
            "constraint": constraint,
            "round_to": round_to,
            "seed": options.seed,
        }
        for dtype, runtime in pairs
        if runtime != "onnx" or dtype == "float32"
        for batch_size, length in _shapes(options)
        for constraint in dict.fromkeys(constraints)
        for round_to in dict.fromkeys(options.round_to)
    ]
    if not cells:
        raise UserError("--runtime onnx runs in float32 alone: take it out, or add that --dtype.")
    return cells


def _dtypes(options: argparse.Namespace) -> list[str]:
    return list(dict.fromkeys(options.dtype))


def _runtimes(options: argparse.Namespace) -> list[str]:
    known = RUNTIMES[options.device]
    if options.runtime is None:
        runtimes = [name for name in known if name != "onnx" or _has_onnx()]
    else:
        runtimes = list(dict.fromkeys(options.runtime))
    for name in runtimes:
        if name not in known:
            raise UserError(
                f"--runtime {name} does not run with --device {options.device}: choose from "
                f"{', '.join(known)}."
            )
    check_exports([name for name in runtimes if name == "onnx"])
    return runtimes


def _has_onnx() -> bool:
    try:
        check_exports(["onnx"])
    except UserError as error:
        say(f"without the runtime onnx: {error}")
        return False
    return True


def _shapes(options: argparse.Namespace) -> list[tuple[int, int]]:
    shapes = list(product(options.batch_size, options.length))
    if options.cells is not None:
        shapes = [_shape(text) for text in options.cells]
    for shape in shapes:
        if min(shape) < 1:
            raise UserError(f"a batch of {shape[0]} x {shape[1]} tokens is not possible.")
    return list(dict.fromkeys(shapes))


def _shape(text: str) -> tuple[int, int]:
    size, _, length = text.partition("x")
    if not (size.isdecimal() and length.isdecimal()):
        raise UserError(f"--cells {text} is no shape: write batch size x length, such as 32x128.")
    return int(size), int(length)


def default_output(options: argparse.Namespace) -> Path:
    """A file in results whose name says the conditions."""
    import torch

    parts = ["speedup_profile" if options.profile else "speedup"]
    parts.append(options.synthetic or model_name(options.model))
    parts.append(options.device)
    if options.device == "cpu":
        parts.append(f"{torch.get_num_threads()}thread")
    if options.profile:
        parts.append(options.dtype[0])
    name = "_".join(parts) + (".json" if options.profile else ".jsonl")
    return Path(__file__).resolve().parents[1] / "results" / name


def _complete(options: argparse.Namespace, cells: Sequence[Cell], output: Path) -> None:
    """Measure what the output does not hold yet."""
    from rfprune.checkpoints.device import pick_device
    from scripts.speedup_models import load_dense
    from scripts.speedup_timing import forget_compiled, machine, taking_turns

    pick_device(options.device)
    with taking_turns(options.turns) as wait:
        wait(False)
        here = machine(options.device)
        missing = _missing(cells, output, here)
        if not missing:
            return
        dense = load_dense(options.synthetic, options.model)
        check_lengths(dense, missing)
        append_line(output, None)
        for family in _grouped(missing, ("dtype", "runtime")):
            wait(False)
            for line in _measured(dense, family, options, wait):
                append_line(output, line | {"machine": here})
                say(_in_words(line))
            forget_compiled()


def _missing(cells: Sequence[Cell], output: Path, here: Mapping[str, Any]) -> list[Cell]:
    """Raises UserError where the output holds what cannot stand beside new measurements."""
    there = read_lines(output)
    if any(line.get("machine") != here for line in there):
        raise UserError(
            f"--output {output} holds measurements of another machine or other versions: name "
            f"another file, or move it away."
        )
    measured = {key_of(line) for line in there}
    missing = [cell for cell in cells if key_of(cell) not in measured]
    say(f"{output}: {len(missing)} of {len(cells)} cells to measure")
    return missing


def _measured(
    dense: Any, family: Sequence[Cell], options: argparse.Namespace, wait: Wait
) -> Iterator[dict[str, Any]]:
    """The cells that one set of models serves, shape by shape."""
    from scripts.speedup_timing import make_field, measure, warm_up

    field = make_field(dense, family)
    groups = _grouped(family, ("batch_size", "length"))
    if options.turns:
        for group in groups:
            warm_up(field, group)
        wait(True)
    for group in groups:
        yield from measure(field, group, seconds=options.seconds, max_rounds=options.rounds)


def key_of(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """The conditions of a line, or of what is to become one."""
    return tuple(line.get(name) for name in CELL)


def check_lengths(model: Any, cells: Sequence[Cell]) -> None:
    """Raises UserError where a batch is longer than the model's positions."""
    most = model.config.max_position_embeddings - 2  # RoBERTa's positions start at 2
    longest = max(cell["length"] for cell in cells)
    if longest > most:
        raise UserError(f"--length {longest} is more than this model reads: give {most} or less.")


def _grouped(cells: Sequence[Cell], names: Sequence[str]) -> list[list[Cell]]:
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell[name] for name in names), []).append(cell)
    return list(groups.values())


def _in_words(line: Mapping[str, Any]) -> str:
    return (
        f"{line['dtype']} {line['runtime']} {line['batch_size']}x{line['length']} "
        f"{line['constraint']:g} by {line['round_to']}: {line['speedup']:.2f} (spread "
        f"{line['spread']:.1%}) of {line['ideal']:.2f} = {line['quotient']:.2f}, "
        f"{line['dense_ms']:.2f} ms dense, {line['rounds']} rounds"
    )


if __name__ == "__main__":
    sys.exit(main())
