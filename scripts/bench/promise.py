"""Latency that was promised, and latency that was measured: constraints on latency, timed again.

python -m scripts.bench.promise --synthetic bert-base --batch-size 8 --length 128
python -m scripts.bench.promise --model CHECKPOINT --batch-size 32 --length 32

Units are chosen by their weights alone, since only time matters here. Each pruned model is timed
beside the original once more, for longer than `prune` itself takes to check its choice. A model
with as many MACs that was chosen by `--metric mac` runs in the same rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rfprune.cli.exit_codes import RESUMABLE, script
from scripts.bench import harness
from scripts.bench.harness import Conditions, machine
from scripts.bench.models import add_model_or_synthetic, random_batch
from scripts.profile_latency import load_model

if TYPE_CHECKING:
    from rfprune.result import PruneResult

CONSTRAINTS = [0.85, 0.7, 0.55, 0.4, 0.25]
MIN_ROUNDS, MAX_ROUNDS = 11, 400
TOLERANCE = 0.007
"""Standard error of the last measurement, if there is time to reach it."""


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    options = _parser().parse_args(argv)
    here = machine(options.device)
    shared = harness.conditions_of(options, ("model", "device", "dtype", "batch_size", "length"))
    output = options.output or harness.default_output(
        "promise",
        shared["model"],
        f"{options.batch_size}x{options.length}",
        f"{here['threads']}thread" if options.device == "cpu" else options.device,
        options.dtype,
    )
    wanted = [shared | one for one in harness.each_combination(constraint=options.constraint)]
    same = {name: here[name] for name in ("device_name", "threads")}
    return harness.complete(__file__, output, wanted, partial(_measure, options), same=same)


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser_of(
        __doc__,
        "device dtype batch-size length constraint seconds",
        device="cpu",
        length=128,
        constraint=CONSTRAINTS,
        seconds=90.0,
    )
    add_model_or_synthetic(parser)
    parser.add_argument(
        "--profile-seconds",
        type=float,
        default=120.0,
        metavar="S",
        help="of measuring the latency table at most (default: 120)",
    )
    return parser


def _measure(options: argparse.Namespace, group: Sequence[Conditions]) -> Iterator[dict[str, Any]]:
    """Prune to every constraint from one latency table, and time each result."""
    import torch

    from rfprune.cost.constraint import Constraint
    from rfprune.latency.profile import BUDGET, profile_latency
    from rfprune.model.layout import layout_of
    from rfprune.pruning import prune, prune_family
    from rfprune.settings import Settings

    dtype = getattr(torch, options.dtype)
    model = load_model(options.model, options.synthetic, dtype).to(options.device)
    batch = random_batch(model, options.batch_size, options.length)
    table = profile_latency(
        model,
        layout_of(model),
        batch,
        budget=replace(BUDGET, seconds=options.profile_seconds),
        progress=sys.stderr.isatty(),
    )
    constraints = [Constraint("latency", one["constraint"]) for one in group]
    settings = Settings(method="importance", importance="magnitude-l2", tune=False)
    results = prune_family(model, [batch], constraints, settings, latency_table=table)
    for conditions, result in zip(group, results, strict=True):
        promise = result.promise
        assert promise is not None
        by_mac = prune(model, [batch], Constraint("mac", result.achieved["mac"]), settings)
        yield {
            **conditions,
            "settings": asdict(settings),
            **_timed_again(model, result, by_mac, batch, options.seconds),
            "mac": result.achieved["mac"],
            "layers": list(result.layers),
            "attempts": [
                {name: getattr(attempt, name) for name in ("predicted", "measured", "error")}
                for attempt in promise.attempts
            ],
            "table": {
                name: getattr(table, name) for name in ("total_ms", "rest_ms", "scale", "rounds")
            },
        }


def _timed_again(
    model: Any, result: PruneResult, by_mac: PruneResult, batch: Any, seconds: float
) -> dict[str, Any]:
    """Pruned latencies as fractions of the original's, and the milliseconds."""
    import torch

    from rfprune.latency.timing import TimingBudget, time_ratios

    with torch.inference_mode():
        found, other = time_ratios(
            partial(model, **batch),
            [partial(one.model.eval(), **batch) for one in (result, by_mac)],
            model.device,
            TimingBudget(seconds, MIN_ROUNDS, MAX_ROUNDS, TOLERANCE),
        )
    return {
        "measured": found.ratio,
        "error": found.error,
        "spread": found.spread,
        "original_ms": found.original.median_ms,
        "pruned_ms": found.pruned.median_ms,
        "rounds": found.original.rounds,
        "by_mac": {
            "measured": other.ratio,
            "error": other.error,
            "mac": by_mac.achieved["mac"],
            "layers": list(by_mac.layers),
        },
    }


if __name__ == "__main__":
    sys.exit(main())
