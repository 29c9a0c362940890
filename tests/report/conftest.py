"""Reports with every part that a page can show."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from rfprune.report.report_json import SCHEMA

Report = dict[str, Any]
NUM_LAYERS, NUM_HEADS, NUM_NEURONS = 3, 4, 12

MAX_DROP: Report = {
    "points": 1.5,
    "drop": 1.49,
    "standard_error": 0.6,
    "sure": 0.52,
    "path": [
        {"ratio": 0.7, "score": 80.64, "drop": -0.25, "divergence": 0.002},
        {"ratio": 0.4, "score": 76.0, "drop": 4.39, "divergence": 0.09},
        {"ratio": 0.5, "score": 78.9, "drop": 1.49, "divergence": 0.01},
    ],
    "least_possible": 0.01,
    "seconds": 61.2,
}
PROMISE: Report = {
    "promised_ms": 100.0,
    "predicted_ms": 101.0,
    "measured_ms": 99.0,
    "attempts": [{"predicted": 0.505, "measured": 0.495, "error": 0.004}],
}


def _curves(layers: list[dict[str, int]]) -> list[dict[str, Any]]:
    sizes = {"heads": NUM_HEADS, "cross_heads": NUM_HEADS, "neurons": NUM_NEURONS}
    return [
        {
            "kind": kind,
            "layer": index,
            "units": list(range(size + 1)),
            "errors": [(index + 1) * (1 - n / size) ** 3 for n in range(size + 1)],
            "kept": layer[kind],
        }
        for index, layer in enumerate(layers)
        for kind, size in sizes.items()
        if kind in layer
    ]


def make_report(**changes: Any) -> Report:
    """The report of a run that never was; `changes` replace entries."""
    layers = [{"heads": 3, "neurons": 7}, {"heads": 0, "neurons": 12}, {"heads": 4, "neurons": 1}]
    costs = {"score": 80.39, "macs": 5.7776e8, "params": 22713602, "bytes": 9.086e7}
    report: Report = {
        "schema": SCHEMA,
        "command": "rfprune --model some/folder --task mrpc --constraint 0.5",
        "model": "some/folder",
        "source": "someone/bert-mrpc",
        "task": "mrpc",
        "method": "curvature",
        "metric": "mac",
        "constraint": 0.5,
        "seed": 3,
        "samples": 2048,
        "settings": {"method": "curvature", "use_labels": False, "tune": True, "seed": 3},
        "device": "cpu",
        "dtype": "float32",
        "stored_dtype": "float16",
        "versions": {"rfprune": "0.1.0", "torch": "2.13.0"},
        "original": costs | {"latency_ms": 200.0},
        "pruned": costs
        | {"score": 78.9, "macs": 2.88e8, "params": 1.5e7, "bytes": 4e7, "latency_ms": 100.0},
        "achieved": {"mac": 0.4985, "params": 0.66, "latency": 0.5},
        "metric_name": "accuracy",
        "scores": {
            "original": {"accuracy": 80.39, "f1": 86.12, "best_f1": 87.0},
            "pruned": {"accuracy": 78.9, "f1": 85.0, "best_f1": 86.0},
        },
        "divergence": 0.01234,
        "evaluated_examples": 408,
        "mean_tokens": 53.2,
        "latency": {"batch_size": 32, "sequence_length": 58, "rounds": 20, "threads": 1},
        "seconds": {
            "load": 1.0,
            "collect": 2.0,
            "search": 0.05,
            "rearrange": 0.0,
            "compact": 0.01,
            "tune": 4.5,
            "evaluate": 3.5,
            "prune_total": 6.56,
        },
        "layers": layers,
        "original_layers": [{"heads": NUM_HEADS, "neurons": NUM_NEURONS}] * NUM_LAYERS,
        "curves": _curves(layers),
        "stages": [
            {"stage": "original", "score": 80.39, "divergence": 0.0},
            {"stage": "selected", "score": 70.5, "divergence": 0.21},
            {"stage": "fitted", "score": 78.9, "divergence": 0.01234},
        ],
        "warnings": ["block layer.0.heads kept its scales"],
        "output_dir": "outputs/it",
    }
    return copy.deepcopy(report) | changes


def make_encoder_decoder_report(**changes: Any) -> Report:
    """The same of an encoder of two layers and a decoder of three."""
    layers = [
        *({"heads": 4, "neurons": 12}, {"heads": 2, "neurons": 9}),
        *({"heads": 0, "cross_heads": kept, "neurons": 5 + kept} for kept in (1, 0, 3)),
    ]
    whole = {"heads": NUM_HEADS, "cross_heads": NUM_HEADS, "neurons": NUM_NEURONS}
    before = [{kind: whole[kind] for kind in layer} for layer in layers]
    sizes = {"layers": layers, "original_layers": before, "curves": _curves(layers)}
    return make_report(**{**sizes, **changes})


@pytest.fixture
def report() -> Callable[..., Report]:
    """`report(**changes)`: see `make_report`."""
    return make_report
