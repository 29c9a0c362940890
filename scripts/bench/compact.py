"""Compact models beside the original under its masks: equal outputs, speedup, bytes.

python -m scripts.bench.compact --model CHECKPOINT --task sst2 --constraint 0.5 0.3 --method kwon

For every constraint: the largest difference between the logits of the compact model and those of
the original under its masks over many sentences; the times of a forward pass, original and compact
in turn on the same batch; bytes of the saved weights. Exit code 1 if a difference is more than
rounding.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from rfprune.cli.exit_codes import RESUMABLE, script
from scripts.bench import harness
from scripts.bench.harness import Conditions, NotMeasured, machine
from scripts.bench.models import (
    Batch,
    load_checkpoint,
    max_logit_difference,
    num_examples,
    random_batch,
    saved_bytes,
    settings_of,
)

TOLERANCE = 1e-5
"""Rounding: logits of a compact model may differ by this much from those under masks."""

FOREVER = 1e9
"""Seconds: the number of rounds decides when timing ends."""

LONG = 128
"""Tokens of the second batch that is timed; the first is a typical one of the task."""


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 1 a compact model differs from
    the masked one, 2 user error, 130 interrupted."""
    options = _parser().parse_args(argv)
    names = ("model", "task", "method", "seed", "device", "batch_size")
    shared = harness.conditions_of(options, names)
    shared |= {"requested_samples": options.samples, "requested_sentences": options.sentences}
    wanted = [shared | one for one in harness.each_combination(constraint=options.constraint)]
    here = machine(options.device)
    output = options.output or harness.default_output(
        "compact", shared["model"], options.method, f"{here['threads']}thread"
    )
    same = {name: here[name] for name in ("device_name", "threads")}
    return harness.complete(__file__, output, wanted, partial(_measure, options), same=same)


def _parser() -> argparse.ArgumentParser:
    names = "model task data-dir constraint method samples seed batch-size rounds device"
    parser = harness.parser_of(
        __doc__, names, constraint=[harness.REQUIRED], rounds=50, device="cpu"
    )
    parser.add_argument(
        "--sentences",
        type=harness.count("--sentences"),
        default=10_000,
        help="to compare on (default: 10000)",
    )
    return parser


def _measure(options: argparse.Namespace, group: Sequence[Conditions]) -> Iterator[dict[str, Any]]:
    """Prune to every constraint and compare.

    The masks of method kwon hold the tuned scales. Other methods refit weights, which no mask can
    express: their models are compared as they were before the refit.
    """
    from rfprune.cost.constraint import Constraint
    from rfprune.latency.timed_batch import typical_batch
    from rfprune.model.compact import compact
    from rfprune.model.masks import masked
    from rfprune.pruning import prune_family

    with harness.warnings_on_stderr() as warnings:
        checkpoint = load_checkpoint(options)
        model = checkpoint.model
        calibration = checkpoint.batches(options.samples, options.seed)
        sentences = checkpoint.batches(options.sentences, options.seed)
        settings = settings_of(method=options.method, seed=options.seed)
        constraints = [Constraint("mac", one["constraint"]) for one in group]
        results = list(prune_family(model, calibration, constraints, settings))
    positions = model.config.max_position_embeddings - 2  # RoBERTa's offset
    long = random_batch(model, options.batch_size, min(LONG, positions))
    tuned = options.method == "kwon"
    differing = []
    for conditions, result in zip(group, results, strict=True):
        small = result.model if tuned else compact(model, result.layout, result.masks)
        with masked(model, result.layout, result.masks):
            difference = max_logit_difference(small, model, sentences)
        if difference > TOLERANCE:
            differing.append(f"{conditions['constraint']:g} by {difference:.1g}")
        yield {
            **conditions,
            "settings": dataclasses.asdict(settings),
            "samples": num_examples(calibration),
            "sentences": num_examples(sentences),
            "achieved": result.achieved,
            "compared": "after tuning" if tuned else "before the refit",
            "max_difference": difference,
            "original_difference": max_logit_difference(small, model, sentences),
            "bytes": saved_bytes(result.model),
            "original_bytes": saved_bytes(model),
            "layers": list(result.layers),
            "speed": [
                _speed(model, result, batch, options.rounds)
                for batch in (typical_batch(sentences), long)
            ],
            "warnings": list(dict.fromkeys([*warnings, *result.warnings])),
        }
    if differing:
        raise NotMeasured(f"compact differs from masked at {', '.join(differing)} (lines kept)")


def _speed(model: Any, result: Any, batch: Batch, rounds: int) -> dict[str, Any]:
    """Milliseconds of a forward pass, and the speedup as the median of the rounds' ratios."""
    import torch

    from rfprune.cost.macs import mac_costs
    from rfprune.latency.timing import TimingBudget, time_ratio
    from rfprune.model.masks import num_kept

    batch_size, tokens = batch["input_ids"].shape
    costs = mac_costs(result.layout, tokens)
    with torch.inference_mode():
        found = time_ratio(
            partial(model, **batch),
            partial(result.model.eval(), **batch),
            model.device,
            TimingBudget(FOREVER, max_rounds=rounds, tolerance=0),
        )
    return {
        "batch_size": batch_size,
        "tokens": tokens,
        "rounds": rounds,
        "original_ms": found.original.median_ms,
        "ms": found.pruned.median_ms,
        "speedup": 1 / found.ratio,
        "spread": found.spread,
        "ideal": costs.original / costs.total(num_kept(result.masks)),
    }


if __name__ == "__main__":
    sys.exit(main())
