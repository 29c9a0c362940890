"""A model on the bench: with its data and its own score, pruned in variants, each one scored.

What `scripts/sweep.py` and `scripts/ablate.py` share; what they measure, and where it goes, is
theirs.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rfprune.errors import UserError

if TYPE_CHECKING:
    from rfprune.checkpoints.loading import LoadedCheckpoint
    from rfprune.tasks.evaluation import Evaluation, EvaluationSet

Conditions = dict[str, Any]
"""A measurement to make: a value for each of `scripts.sweep.CONDITIONS`."""

Variants = Mapping[str, Mapping[str, Any]]
"""What each variant asks of `rfprune.Settings`."""


@dataclass(frozen=True)
class Bench:
    """What all measurements share: the model, its data and its own score; `warnings` from both,
    what each variant asks of `rfprune.Settings`, and a folder where variants find what others of
    them have collected. `written`: how a language model goes on after each prompt."""

    variants: Variants
    cache: Path | None
    loaded: LoadedCheckpoint
    max_length: int
    evaluation_set: EvaluationSet
    original: Evaluation
    warnings: tuple[str, ...]
    written: Mapping[str, str]


class NotMeasured(Exception):
    """A variant does not work here; the others go on."""


def prepare(options: argparse.Namespace, variants: Variants, cache: Path | None = None) -> Bench:
    """Load what the flags name, and score the model as it is."""
    import torch

    from rfprune.checkpoints.device import pick_device
    from rfprune.checkpoints.loading import load, resolve_data_dir, resolve_max_length, resolve_task
    from rfprune.tasks.evaluation import evaluate_model, prepare_evaluation

    task = resolve_task(
        options.task,
        options.model,
        data_dir=options.data_dir,
        text_columns=None,
        label_column=None,
    )
    with _collected_warnings() as heard:
        device = pick_device(options.device)
        loaded = load(options.model, task, device=device, dtype=getattr(torch, options.dtype))
        max_length = resolve_max_length(loaded, task, options.max_length)
        evaluation_set = prepare_evaluation(
            task,
            loaded.tokenizer,
            resolve_data_dir(options.model, options.data_dir),
            batch_size=options.batch_size,
            max_length=max_length,
            limit=options.eval_limit,
        )
        original = evaluate_model(loaded.model, evaluation_set)
    say(f"original: {original.score:.2f} on {original.num_examples} examples")
    return Bench(
        variants,
        cache,
        loaded,
        max_length,
        evaluation_set,
        original,
        tuple(heard),
        written={
            prompt: continued(loaded.model, loaded.tokenizer, prompt)
            for prompt in getattr(options, "prompt", ())
        },
    )


def calibrate(
    options: argparse.Namespace, bench: Bench, group: Sequence[Conditions]
) -> tuple[list[dict[str, Any]], list[str]]:
    """A seed's batches and the warnings so far; with labels only where a variant needs them,
    since they change nothing for the others."""
    from rfprune.checkpoints.loading import resolve_data_dir
    from rfprune.tasks.calibration import calibration_batches

    with _collected_warnings() as heard:
        batches = calibration_batches(
            bench.evaluation_set.task,
            bench.loaded.tokenizer,
            resolve_data_dir(options.model, options.data_dir),
            num_samples=options.samples,
            batch_size=options.batch_size,
            max_length=bench.max_length,
            seed=group[0]["seed"],
            with_labels=any(
                bench.variants[one["variant"]].get("use_labels", False) for one in group
            ),
        )
    return batches, [*bench.warnings, *heard]


def measure(
    bench: Bench,
    family: Sequence[Conditions],
    batches: Sequence[Mapping[str, Any]],
    warnings: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """Prune to the constraints of one variant and seed, and score each model: lines of the file.

    Scores are in points of 100; the seconds of collecting are those of the whole family.
    """
    from rfprune.cost.constraint import Constraint
    from rfprune.pruning import prune_family
    from rfprune.report.report_json import versions
    from rfprune.settings import Settings
    from rfprune.tasks.evaluation import divergence, evaluate_model

    # Any number of neurons, as in the published comparisons.
    settings = Settings(
        **{"round_to": None, **bench.variants[family[0]["variant"]]}, seed=family[0]["seed"]
    )
    constraints = [Constraint(one["metric"], one["constraint"]) for one in family]
    original = bench.original
    with _collected_warnings() as heard:
        results = prune_family(
            bench.loaded.model, batches, constraints, settings, cache=bench.cache
        )
        for conditions in family:
            try:
                result = next(results)
                pruned = evaluate_model(
                    result.model, bench.evaluation_set, reference=bench.loaded.model
                )
            except UserError as error:
                raise NotMeasured(str(error)) from error
            yield {
                **conditions,
                "samples": sum(len(batch["input_ids"]) for batch in batches),
                "settings": dataclasses.asdict(settings),
                "device": bench.loaded.model.device.type,
                "metric_name": original.metric_name,
                "original_score": original.score,
                "score": pruned.score,
                "scores": {"original": dict(original.scores), "pruned": dict(pruned.scores)},
                "divergence": divergence(original, pruned),
                **_written(bench, result.model),
                "evaluated_examples": original.num_examples,
                "achieved": result.achieved,
                "mean_tokens": result.mean_tokens,
                "seconds": {**result.seconds, "evaluate": pruned.seconds},
                "layers": list(result.layers),
                "warnings": list(dict.fromkeys([*warnings, *heard, *result.warnings])),
                "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "versions": versions(),
            }


def _written(bench: Bench, pruned: Any) -> dict[str, Any]:
    """What language models write, before and after, and the memory that it took to get there."""
    if bench.original.kind != "language-modeling":
        return {}
    tokenizer = bench.loaded.tokenizer
    return {
        "written": {prompt: continued(pruned, tokenizer, prompt) for prompt in bench.written},
        "written_by_original": bench.written,
        "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def continued(model: Any, tokenizer: Any, prompt: str, new_tokens: int = 30) -> str:
    """What a language model finds likeliest after a prompt, token by token."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    written = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    text: str = tokenizer.decode(
        written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return text


def _collected_warnings() -> AbstractContextManager[list[str]]:
    from rich.console import Console

    from rfprune.cli.console import collected_warnings

    return collected_warnings(Console(stderr=True, highlight=False), verbose=False)


def say(text: str) -> None:
    """Tell what is going on, and when."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
