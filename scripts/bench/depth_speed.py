"""Realised speed of the same MACs removed in two ways: narrower layers, or fewer layers.

python -m scripts.bench.depth_speed --model CHECKPOINT --constraint 0.7 0.5 --cells 1x1 1x32 32x32

The original, a model with narrower layers (drawn as by a global allocation, neurons in multiples of
8) and a model with fewer layers run in turn on the same batch; weights and tokens change no time. A
language model that reads one token (1x1) does what it does for each new token of a text. On a CPU
the times are processor time, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from rfprune.cli.exit_codes import RESUMABLE, script
from scripts.bench import harness
from scripts.bench.harness import Conditions
from scripts.bench.models import add_model_or_synthetic, draw_structure, pruned_to, random_batch
from scripts.bench.speedup import shape_of
from scripts.bench.timed_models import TOLERANCE, default_output
from scripts.profile_latency import load_model

ROUND_TO = 8


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    options = _parser().parse_args(argv)
    shared = harness.conditions_of(options, ("model", "dtype"))
    wanted = [
        shared | {"batch_size": size, "length": length, "constraint": constraint}
        for size, length in map(shape_of, options.cells)
        for constraint in options.constraint
    ]
    return harness.complete(
        __file__,
        options.output or default_output("depth-speed", options),
        wanted,
        partial(_measure, options),
        same={"machine": harness.machine(options.device)},
        group_by=("batch_size", "length"),
    )


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser_of(
        __doc__,
        "dtype constraint device seconds rounds",
        constraint=[0.8, 0.6],
        device="cpu",
        seconds=30.0,
        rounds=50,
    )
    add_model_or_synthetic(parser)
    parser.add_argument(
        "--cells", nargs="+", default=["1x1", "1x32", "32x32"], metavar="BxS", help="batch x tokens"
    )
    return parser


def _measure(options: argparse.Namespace, group: Sequence[Conditions]) -> Iterator[dict[str, Any]]:
    """The measurements of one shape: all models take turns."""
    import torch

    from rfprune.cost.macs import mac_costs
    from rfprune.latency.timing import TimingBudget, time_ratios
    from rfprune.model.layout import layout_of

    first = group[0]
    dense = load_model(options.model, options.synthetic, getattr(torch, first["dtype"]))
    dense = dense.to(options.device)
    layout = layout_of(dense)
    costs = mac_costs(layout, first["length"])
    ways = [_models(dense, layout, costs, one["constraint"]) for one in group]
    batch = random_batch(dense, first["batch_size"], first["length"])
    calls = [partial(model, **batch) for own in ways for model, _ in own.values()]
    budget = TimingBudget(options.seconds, max_rounds=options.rounds, tolerance=TOLERANCE)
    with torch.inference_mode():
        timer = time.process_time if options.device == "cpu" else time.perf_counter
        original = partial(dense, **batch)
        ratios = iter(time_ratios(original, calls, options.device, budget, timer=timer))
    for one, own in zip(group, ways, strict=True):
        found = {way: (next(ratios), macs) for way, (_, macs) in own.items()}
        yield {
            **one,
            "dense_ms": round(found["widths"][0].original.median_ms, 5),
            "rounds": found["widths"][0].pruned.rounds,
            "ways": {
                way: {
                    "ideal": round(costs.original / macs, 5),
                    "speedup": round(1 / ratio.ratio, 5),
                    "spread": round(ratio.spread, 5),
                    "ms": round(ratio.pruned.median_ms, 5),
                }
                for way, (ratio, macs) in found.items()
            },
        }


def _models(dense: Any, layout: Any, costs: Any, constraint: float) -> dict[str, tuple[Any, float]]:
    """A model with narrower layers and one with fewer, and the MACs of each.

    The first is drawn for the MACs of the second, which come in steps of a layer.
    """
    from rfprune.model.depth import remove_layers

    number = len(layout.layers)
    whole = [block.num_units for block in layout.blocks]

    def macs_without(removed: Sequence[int]) -> float:
        kept = [
            0 if block.layer in removed else units
            for block, units in zip(layout.blocks, whole, strict=True)
        ]
        return float(costs.total(kept, removed))

    removed: list[int] = []
    while macs_without(removed) > constraint * costs.original and len(removed) < number - 1:
        removed = list(range(number - 2 - len(removed), number - 1))
    fewer = macs_without(removed)
    kept = draw_structure(layout, fewer / costs.original, seed=0, round_to=ROUND_TO)
    return {
        "widths": (pruned_to(dense, layout, kept), costs.total(kept)),
        "layers": (remove_layers(dense, layout, removed).eval(), fewer),
    }


if __name__ == "__main__":
    sys.exit(main())
