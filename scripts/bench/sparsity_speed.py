"""Milliseconds of models with zeros, by runtime, beside a physically smaller one.

python -m scripts.bench.sparsity_speed --model CHECKPOINT --batch-size 8 --length 32

Zeros are placed by magnitude, and units are drawn at random: where they are does not change the
time. OpenVINO is measured in float32, in int8 (NNCF, weights and activations), and in int8 with its
decompression of sparse weights switched on (CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE), which is for
int8 on processors with AMX. All models take turns, in processor time and on one thread, so that
other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.errors import check_installed, import_without_statistics
from rfprune.export.openvino import quiet_nncf
from scripts.bench import harness
from scripts.bench.harness import Conditions
from scripts.bench.models import add_model_or_synthetic, draw_structure, pruned_to, random_batch
from scripts.bench.sparsity import pruned_by_torch, sizes_of
from scripts.profile_latency import load_model

PYTORCH = "PyTorch"
OPENVINO = "OpenVINO"
OPENVINO_INT8 = "OpenVINO, int8"
OPENVINO_INT8_SPARSE = "OpenVINO, int8, sparse decompression"
RUNTIMES = (PYTORCH, OPENVINO, OPENVINO_INT8, OPENVINO_INT8_SPARSE)
SPARSE_FROM = 0.4
"""Maps with at least this fraction of zeros are decompressed."""


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    options = _parser().parse_args(argv)
    check_installed("this measurement", ("openvino", "nncf"), "install both")
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
            (name, runtime): call
            for name, each in models.items()
            for runtime, call in _calls(each, batch).items()
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


def _calls(model: Any, batch: Any) -> dict[str, Callable[[], object]]:
    """A forward pass in each runtime."""
    import torch

    openvino = import_without_statistics("openvino")

    def forward() -> object:
        with torch.inference_mode():
            return model(**batch)

    arrays = {name: values.numpy() for name, values in batch.items()}

    def compiled(model: Any, **properties: Any) -> Callable[[], object]:
        properties |= {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
        }
        request = openvino.Core().compile_model(model, "CPU", properties).create_infer_request()
        return lambda: request.infer(arrays)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer
        converted = openvino.convert_model(model, example_input=dict(batch))
    in_int8 = _in_int8(converted, arrays)
    return {
        PYTORCH: forward,
        OPENVINO: compiled(converted),
        OPENVINO_INT8: compiled(in_int8),
        OPENVINO_INT8_SPARSE: compiled(in_int8, CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE=SPARSE_FROM),
    }


def _in_int8(model: Any, arrays: Any) -> Any:
    """An OpenVINO model with weights and activations in int8; zeros stay zeros."""
    with quiet_nncf() as nncf:
        return nncf.quantize(
            model,
            nncf.Dataset([arrays]),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=1,
            advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
        )


if __name__ == "__main__":
    sys.exit(main())
