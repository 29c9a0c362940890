"""Compact models beside the original under its masks: equal outputs, fewer bytes.

python -m scripts.bench.compact --model CHECKPOINT --task sst2 --constraint 0.5 0.3 --method kwon

For every constraint: the largest difference between the logits of the compact model and those of
the original under its masks over many sentences, and the bytes of the saved weights. Exit code 1 if
a difference is more than rounding.
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
from scripts.bench.harness import Conditions, NotMeasured
from scripts.bench.models import (
    load_checkpoint,
    max_logit_difference,
    num_examples,
    saved_bytes,
    settings_of,
)

TOLERANCE = 1e-5
"""Rounding: logits of a compact model may differ by this much from those under masks."""


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 1 a compact model differs from
    the masked one, 2 user error, 130 interrupted."""
    options = _parser().parse_args(argv)
    names = ("model", "task", "method", "seed", "device", "batch_size")
    shared = harness.conditions_of(options, names)
    shared |= {"requested_samples": options.samples, "requested_sentences": options.sentences}
    wanted = [shared | one for one in harness.each_combination(constraint=options.constraint)]
    output = options.output or harness.default_output("compact", shared["model"], options.method)
    return harness.complete(__file__, output, wanted, partial(_measure, options))


def _parser() -> argparse.ArgumentParser:
    names = "model task data-dir constraint method samples seed batch-size device"
    parser = harness.parser_of(__doc__, names, constraint=[harness.REQUIRED], device="cpu")
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
            "warnings": list(dict.fromkeys([*warnings, *result.warnings])),
        }
    if differing:
        raise NotMeasured(f"compact differs from masked at {', '.join(differing)} (lines kept)")


if __name__ == "__main__":
    sys.exit(main())
