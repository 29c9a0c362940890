"""Are promised latencies kept? Prune to fractions of the latency, and measure afresh.

python scripts/benchmark_promise.py --synthetic bert-base --batch-size 8 --length 128
python scripts/benchmark_promise.py --model CHECKPOINT --batch-size 32 --length 32

Units are chosen by their weights alone, for it is time that counts here; what comes out is timed
beside the original once more, for longer than the pruning itself did. It goes on where it was
stopped. scripts/promise_table.py makes the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import one another

from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.errors import UserError
from scripts.bench import say
from scripts.speedup_models import SYNTHETIC, load_dense
from scripts.sweep import append_line, model_name, read_lines

if TYPE_CHECKING:
    from torch import Tensor

    from rfprune.latency.table import LatencyTable
    from rfprune.result import PruneResult

CONSTRAINTS = (0.85, 0.7, 0.55, 0.4, 0.25)
DTYPES = ("float32", "bfloat16")
MIN_ROUNDS = 11
MAX_ROUNDS = 400
TOLERANCE = 0.007
"""Standard error of the last measurement, where there is time to reach it."""

KEY = ("model", "device", "dtype", "batch_size", "length", "constraint")


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130 stopped."""
    options = _parser().parse_args(argv)
    output = options.output or _default_output(options)
    _complete(options, output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--synthetic", choices=SYNTHETIC, help="random weights in this size")
    model.add_argument("--model", metavar="FOLDER", help="a dense checkpoint")
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--dtype", choices=DTYPES, default="float32", help="default: float32")
    add("--batch-size", type=int, default=32, help="default: 32")
    add("--length", type=int, default=128, help="tokens; default: 128")
    add("--constraint", type=float, nargs="+", default=CONSTRAINTS, help="fractions of the latency")
    add("--seconds", type=float, default=90.0, help="of the last measurement at most; default: 90")
    add("--profile-seconds", type=float, default=120.0, help="of the table at most; default: 120")
    add("--output", type=Path, metavar="FILE", help="default: in results, named after the flags")
    return parser


def _default_output(options: argparse.Namespace) -> Path:
    import torch

    model = options.synthetic or model_name(options.model)
    device = "cuda" if options.device == "cuda" else f"{torch.get_num_threads()}thread"
    shape = f"{options.batch_size}x{options.length}"
    folder = Path(__file__).resolve().parents[1] / "results"
    return folder / f"promise_{model}_{shape}_{device}_{options.dtype}.jsonl"


def _complete(options: argparse.Namespace, output: Path) -> None:
    """Measure what the output does not hold yet."""
    here = {
        "model": options.synthetic or model_name(options.model),
        "device": options.device,
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "length": options.length,
    }
    lines = read_lines(output)
    if any(line["device_name"] != _device_name(options) for line in lines):
        raise UserError(f"--output {output} was measured on another machine: name another file.")
    measured = {tuple(line[name] for name in KEY) for line in lines}
    missing = [
        ratio
        for ratio in dict.fromkeys(options.constraint)
        if tuple((here | {"constraint": ratio})[name] for name in KEY) not in measured
    ]
    say(f"{output}: {len(missing)} of {len(options.constraint)} constraints to measure")
    if not missing:
        return
    append_line(output, None)
    for line in _measured(options, missing):
        append_line(output, here | line)
        say(
            f"{line['constraint']:g}: predicted {line['attempts'][0]['predicted']:.3f}, "
            f"measured {line['attempts'][0]['measured']:.3f} at first; in the end "
            f"{line['measured']:.3f} ± {line['error']:.1%}, {len(line['attempts'])} attempts"
        )


def _device_name(options: argparse.Namespace) -> str:
    from scripts.speedup_timing import machine

    return str(machine(options.device)["device_name"])


def _measured(options: argparse.Namespace, missing: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Prune to every constraint from one latency table, and time what comes out."""
    import torch

    from rfprune.cost.constraint import Constraint
    from rfprune.latency.profile import BUDGET, profile_latency
    from rfprune.model.layout import layout_of
    from rfprune.pruning import prune_family
    from rfprune.settings import Settings
    from scripts.speedup_timing import machine

    constraints = [Constraint("latency", ratio) for ratio in missing]
    model = load_dense(options.synthetic, options.model)
    model = model.to(options.device, getattr(torch, options.dtype))
    batch = _batch(model, options)
    table = profile_latency(
        model,
        layout_of(model),
        batch,
        budget=replace(BUDGET, seconds=options.profile_seconds),
        progress=sys.stderr.isatty(),
    )
    settings = Settings(method="importance", importance="magnitude-l2", tune=False)
    for result in prune_family(model, [batch], constraints, settings, latency_table=table):
        yield {
            "constraint": result.constraint.ratio,
            **_afresh(model, result, batch, options.seconds),
            **_attempts(result),
            "table": _summary(table),
            **machine(options.device),
        }


def _batch(model: Any, options: argparse.Namespace) -> dict[str, Tensor]:
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = options.batch_size, options.length
    ids = torch.randint(5, model.config.vocab_size, shape, generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {name: value.to(model.device) for name, value in batch.items()}


def _afresh(
    model: Any, result: PruneResult, batch: dict[str, Tensor], seconds: float
) -> dict[str, Any]:
    """The ratio measured once more, for longer, and the milliseconds it comes from."""
    from functools import partial

    import torch

    from rfprune.latency.timing import TimingBudget, time_ratio

    with torch.inference_mode():
        found = time_ratio(
            partial(model, **batch),
            partial(result.model.eval(), **batch),
            model.device,
            TimingBudget(seconds, min(MIN_ROUNDS, MAX_ROUNDS), MAX_ROUNDS, TOLERANCE),
        )
    return {
        "measured": found.ratio,
        "error": found.error,
        "spread": found.spread,
        "original_ms": found.original.median_ms,
        "pruned_ms": found.pruned.median_ms,
        "rounds": found.original.rounds,
    }


def _attempts(result: PruneResult) -> dict[str, Any]:
    promise = result.promise
    assert promise is not None
    return {
        "mac": result.achieved["mac"],
        "layers": list(result.layers),
        "attempts": [
            {"predicted": attempt.predicted, "measured": attempt.measured, "error": attempt.error}
            for attempt in promise.attempts
        ],
    }


def _summary(table: LatencyTable) -> dict[str, float]:
    return {
        "total_ms": table.total_ms,
        "rest_ms": table.rest_ms,
        "scale": table.scale,
        "rounds": table.rounds,
    }


if __name__ == "__main__":
    sys.exit(main())
