"""Milliseconds of models with zeros, by runtime, beside a physically smaller one.

python -m scripts.bench.sparsity_speed --model CHECKPOINT --batch-size 8 --length 32

Zeros are placed by magnitude, and units are drawn at random: where they are does not change the
time. OpenVINO is measured as it is, and with its decompression of sparse weights switched on
(CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE). All models take turns, in processor time and on one thread,
so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.errors import check_installed
from scripts.bench import harness
from scripts.bench.harness import Conditions
from scripts.bench.models import add_model_or_synthetic, draw_structure, pruned_to, random_batch
from scripts.bench.sparsity import pruned_by_torch, sizes_of
from scripts.profile_latency import load_model

RUNTIMES = ("PyTorch", "OpenVINO", "OpenVINO, sparse decompression")
SPARSE_FROM = 0.4
"""Maps with at least this fraction of zeros are decompressed."""


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    options = _parser().parse_args(argv)
    check_installed("this measurement", ("openvino",), "install it")
    here = harness.machine("cpu")
    name = harness.model_name(options)
    wanted = [
        {"model": name, "batch_size": size, "length": length}
        for size in options.batch_size
        for length in options.length
    ]
    output = options.output or harness.default_output(
        "sparsity-speed", name, f"{here['threads']}thread"
    )
    measure = partial(_measure, options)
    same = {key: here[key] for key in ("device_name", "threads", "cores")}
    return harness.complete(
        __file__, output, wanted, measure, same=same, group_by=("batch_size", "length")
    )


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser_of(
        __doc__, "batch-size length rounds", batch_size=[1, 8], length=[32], rounds=15
    )
    add_model_or_synthetic(parser)
    return parser


def _measure(options: argparse.Namespace, group: Sequence[Conditions]) -> Iterator[dict[str, Any]]:
    import torch

    from rfprune.latency.timing import TimingBudget, time_interleaved

    model = load_model(options.model, options.synthetic, torch.float32)
    models = _models(model)
    budget = TimingBudget(1e9, max_rounds=options.rounds, tolerance=0)
    for one in group:
        batch = random_batch(model, one["batch_size"], one["length"])
        calls = {
            (name, runtime): _call(each, runtime, batch)
            for name, each in models.items()
            for runtime in RUNTIMES
        }
        timings = time_interleaved(list(calls.values()), "cpu", budget, timer=time.process_time)
        milliseconds: dict[str, dict[str, float]] = {name: {} for name in models}
        for (name, runtime), timing in zip(calls, timings, strict=True):
            milliseconds[name][runtime] = timing.median_ms
        yield {
            **one,
            "rounds": options.rounds,
            "models": {
                name: {**sizes_of(models[name]), "ms": own} for name, own in milliseconds.items()
            },
        }


def _models(model: Any) -> dict[str, Any]:
    """The original, one with half of the parameters of its layers, and copies with zeros."""
    from rfprune import Settings, prune
    from rfprune.model.layout import layout_of

    layout = layout_of(model)
    batch = random_batch(model, 1, 8)
    by_pattern = prune(
        model, [batch], None, Settings(sparsity="2:4", sparsity_criterion="magnitude")
    )
    return {
        "original": model,
        "units, half of the layers' MACs": pruned_to(
            model, layout, draw_structure(layout, 0.5, seed=0, round_to=8)
        ),
        "2:4": by_pattern.model,
        "anywhere, 0.5": pruned_by_torch(model, 0.5, everywhere=False),
        "anywhere, 0.9": pruned_by_torch(model, 0.1, everywhere=False),
    }


def _call(model: Any, runtime: str, batch: Any) -> Callable[[], object]:
    """A forward pass in a runtime."""
    import torch

    if runtime == RUNTIMES[0]:

        def forward() -> object:
            with torch.inference_mode():
                return model(**batch)

        return forward
    import openvino  # type: ignore[import-untyped,unused-ignore]

    converted = openvino.convert_model(model, example_input=dict(batch))
    properties: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    if runtime == RUNTIMES[2]:
        properties["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] = SPARSE_FROM
    compiled = openvino.Core().compile_model(converted, "CPU", properties)
    request = compiled.create_infer_request()
    arrays = {name: values.numpy() for name, values in batch.items()}
    return lambda: request.infer(arrays)


if __name__ == "__main__":
    sys.exit(main())
