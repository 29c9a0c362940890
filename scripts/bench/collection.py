"""Collection of statistics by the whole model and layer by layer: CPU seconds and peak memory.

python -m scripts.bench.collection --size 100m 300m --samples 8 --length 128

Every way is run by a fresh process on a Llama-shaped decoder with random weights; its peak memory
is the operating system's count (ru_maxrss). Error curves are not computed.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from rfprune.cli.exit_codes import RESUMABLE, script
from scripts.bench import harness
from scripts.bench.harness import Conditions, machine
from scripts.bench.scale import SIZES, VOCABULARY, make_model

WAYS = ("whole", "layers")


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    names = "samples length batch-size"
    parser = harness.parser_of(__doc__, names, samples=8, length=128, batch_size=4)
    add = parser.add_argument
    add("--size", nargs="+", choices=SIZES, default=["100m", "300m"], help="default: 100m 300m")
    add("--way", nargs="+", choices=WAYS, default=list(WAYS), help="default: both")
    add("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.alone:
        print(json.dumps(_collect(options)))
        return 0
    shared = harness.conditions_of(options, ("samples", "length", "batch_size"))

    def measure(group: Sequence[Conditions]) -> Iterator[dict[str, Any]]:
        for conditions in group:
            flags = [f"--{name.replace('_', '-')}={value}" for name, value in conditions.items()]
            found = harness.in_process("scripts.bench.collection", ["--alone", *flags])
            yield conditions | found

    ways = harness.each_combination(size=options.size, way=options.way)
    output = options.output or harness.default_output("collection", "llama", "cpu")
    here = machine("cpu")
    same = {name: here[name] for name in ("device_name", "threads")}
    return harness.complete(__file__, output, [one | shared for one in ways], measure, same=same)


def _collect(options: argparse.Namespace) -> dict[str, Any]:
    """Collect in this process."""
    import torch

    from rfprune.cost.memory import total_bytes
    from rfprune.model.frozen import frozen
    from rfprune.model.layout import layout_of
    from rfprune.stages.calibration import Calibration
    from rfprune.stages.collection import autograd_bytes
    from rfprune.stages.curvature import collect_curvature

    (size,), (way,) = options.size, options.way
    model = make_model(size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (options.samples, options.length), generator=generator)
    batches = [{"input_ids": part} for part in ids.split(options.batch_size)]
    calibration = Calibration(model, layout_of(model), batches, max_bytes=2**62)
    if way == "layers":  # of too little memory for the statistics of all layers
        calibration = replace(calibration, max_bytes=autograd_bytes(calibration))
    before, start = _peak_bytes(), time.process_time()
    with frozen(model):
        for _, factors in collect_curvature(calibration):
            assert factors.tokens == ids.numel()
            del factors
    return {
        "weight_bytes": total_bytes(model),
        "seconds": time.process_time() - start,
        "bytes_before": before,
        "peak_bytes": _peak_bytes(),
    }


def _peak_bytes() -> int:
    """The most memory that this process has had so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    sys.exit(main())
