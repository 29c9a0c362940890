"""Score and divergence of pruned models: variants of the method x constraints x seeds.

python -m scripts.bench.quality --model CHECKPOINT --task mrpc --data-dir data \\
    --constraint 0.7 0.5 0.3 --seed 0 1 2 --variant kwon-scheduled curvature
python -m scripts.bench.quality --suite ablation --model CHECKPOINT --task sst2 --constraint 0.5 0.3
python -m scripts.bench.quality --suite decoder --model CHECKPOINT --data-dir text --constraint 0.8

A suite is a set of variants: `quality` compares the methods, the stages of the published one and a
peer, `ablation` the classical criteria without and with the least-squares fit, `decoder` methods
and peers on a language model, with the text that it generates, and `study` the default method by
numbers of examples and rounds, with the seconds of each.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rfprune.cache import default_folder
from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.errors import UserError
from rfprune.settings import ALLOCATIONS, CRITERIA
from rfprune.tasks.registry import LANGUAGE_MODELING
from scripts.bench import harness
from scripts.bench.harness import Conditions, NotMeasured, say
from scripts.bench.models import Checkpoint, load_checkpoint, num_examples

if TYPE_CHECKING:
    from rfprune.tasks.evaluation import Evaluation, EvaluationSet

Variants = Mapping[str, Mapping[str, Any]]
"""By name; see `scripts.bench.peers.peer.Variant`."""

SELECT = "-select"
"""Ends the name of a variant that fits nothing after it has pruned."""

PUBLISHED, REFITTED = "-published", "-refitted"
"""End the names of peers: as their papers have them, and with the package's least-squares fit."""

STAGES: Variants = {
    "kwon-search": {"method": "kwon", "rearrange": False, "tune": False},
    "kwon-rearrange": {"method": "kwon", "tune": False},
    "kwon-scheduled": {"method": "kwon", "teacher": "scheduled"},
    "kwon-dense": {"method": "kwon", "teacher": "dense"},
    "kwon-authors": {
        "method": "kwon",
        "use_labels": True,
        "gradients": "per-batch",
        "teacher": "scheduled",
    },
    "curvature-select": {"method": "curvature", "tune": False},
    "curvature": {"method": "curvature"},
    "depth-layers": {"method": "curvature", "depth": "layers"},
    "depth-joint": {"method": "curvature", "depth": "joint"},
}

BY_ROUNDS: Variants = {
    "curvature": STAGES["curvature"],
    **{f"curvature-rounds-{n}": {**STAGES["curvature"], "rounds": n} for n in (2, 3)},
}

IN_ROUNDS = ("taylor", "fisher")
"""Criteria that are also measured in three rounds, with the global allocation."""


def _criteria() -> Variants:
    found: dict[str, dict[str, Any]] = {
        f"{criterion}-{allocation}": {
            "method": "importance",
            "importance": criterion,
            "allocation": allocation,
        }
        for criterion in CRITERIA
        for allocation in ALLOCATIONS
    }
    found |= {
        f"{name}-global-rounds-3": found[f"{name}-global"] | {"rounds": 3} for name in IN_ROUNDS
    }
    found |= {method: {"method": method} for method in ("kwon", "curvature")}
    return {
        name: settings
        for own, fitted in found.items()
        for name, settings in ((f"{own}{SELECT}", fitted | {"tune": False}), (own, fitted))
    }


@dataclass(frozen=True)
class Suite:
    """A set of variants.

    Attributes:
        defaults: of the flags, where they differ from the others' defaults.
        repeated: seeds after the first are for variants whose name starts so.
        timed: every variant collects anew, so that its seconds are its own; else it takes from the
            cache what another has collected.
    """

    variants: Variants
    defaults: Mapping[str, Any] = field(default_factory=dict)
    repeated: str = ""
    timed: bool = False


def _peer(name: str) -> Variants:
    """A peer as published, and its units with the package's fit."""
    return {
        f"{name}{PUBLISHED}": {"peer": name},
        f"{name}{REFITTED}": {"peer": name, "refitted": True},
    }


_BLOCK_INFLUENCE = {"method": "importance", "importance": "magnitude-l2", "depth": "layers"}
_MAGNITUDE = {"method": "importance", "importance": "magnitude-l2"}
SUITES: Mapping[str, Suite] = {
    "quality": Suite({**STAGES, **_peer("kprune")}),
    "ablation": Suite(_criteria(), {"samples": [512]}, repeated="random"),
    "decoder": Suite(
        {
            "curvature": {"method": "curvature"},
            "curvature-select": {"method": "curvature", "tune": False},
            "kwon-dense": {"method": "kwon"},
            "kwon-rearrange": {"method": "kwon", "tune": False},
            "magnitude-l2": _MAGNITUDE,
            "magnitude-l2-select": {**_MAGNITUDE, "tune": False},
            "depth-layers": {"method": "curvature", "depth": "layers"},
            "depth-joint": {"method": "curvature", "depth": "joint"},
            "block-influence": _BLOCK_INFLUENCE,
            "block-influence-select": {**_BLOCK_INFLUENCE, "tune": False},
            **_peer("wanda-sp"),
            "flap-select": {"peer": "flap", "tune": False},
            **_peer("flap"),
        },
        {"task": LANGUAGE_MODELING, "samples": [64], "batch_size": 8},
    ),
    "study": Suite(BY_ROUNDS, timed=True),
}

PROMPTS = ("The capital of France is", "Photosynthesis is the process by which")
"""Continued by language models, original and pruned."""

NEW_TOKENS = 30


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 1 something could not be
    measured, 2 user error, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = _add_suite(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
    suite = SUITES[first.parse_known_args(arguments)[0].suite]
    options = parser_for(suite).parse_args(arguments)
    measurements = list(wanted(options, suite))
    output = options.output or default_output(options)
    bench = Bench(options, suite)
    return harness.complete(
        __file__,
        output,
        measurements,
        bench.measure,
        group_by=("seed", "requested_samples", "variant"),
    )


def _add_suite(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--suite", choices=SUITES, default="quality", help="default: quality")
    return parser


def parser_for(suite: Suite) -> argparse.ArgumentParser:
    """The flags, with the variants and the defaults of a suite."""
    names = "model task data-dir constraint metric seed samples batch-size max-length eval-limit"
    defaults = {"constraint": [harness.REQUIRED], "seed": [0], "samples": [2048]}
    parser = harness.parser_of(__doc__, f"{names} device dtype", **{**defaults, **suite.defaults})
    _add_suite(parser).add_argument(
        "--variant",
        nargs="+",
        choices=suite.variants,
        default=list(suite.variants),
        help="default: all of the suite",
    )
    return parser


def wanted(options: argparse.Namespace, suite: Suite) -> Iterator[Conditions]:
    """The conditions that the flags ask for: by seed, then samples, variant and constraint."""
    names = ("task", "metric", "eval_limit", "batch_size", "max_length", "dtype", "model")
    shared = harness.conditions_of(options, names)
    for one in harness.each_combination(
        seed=options.seed,
        requested_samples=options.samples,
        variant=options.variant,
        constraint=options.constraint,
    ):
        if one["seed"] == options.seed[0] or one["variant"].startswith(suite.repeated):
            yield shared | one


def default_output(options: argparse.Namespace) -> Any:
    """results/SUITE_MODEL_TASK_METRIC_Nsamples[_Mevaluated].jsonl."""
    if len(options.samples) > 1:
        raise UserError(
            f"--samples {' '.join(map(str, options.samples))} has no default file, which is named "
            f"by one number: give --output, such as results/study_samples_MODEL_TASK_mac.jsonl."
        )
    return harness.default_output(
        options.suite,
        harness.model_name(options),
        options.task,
        options.metric,
        f"{options.samples[0]}samples",
        options.eval_limit and f"{options.eval_limit}evaluated",
    )


class Bench:
    """A model with its data and its own score; loaded when the first measurement asks for it."""

    def __init__(self, options: argparse.Namespace, suite: Suite) -> None:
        """Nothing is loaded yet."""
        self.options, self.suite = options, suite
        self._calibration: dict[tuple[int, int, bool], tuple[Any, list[str]]] = {}

    @cached_property
    def _prepared(self) -> tuple[Checkpoint, EvaluationSet, Evaluation, list[str], dict[str, str]]:
        from rfprune.tasks.evaluation import evaluate_model

        with harness.warnings_on_stderr() as warnings:
            checkpoint = load_checkpoint(self.options)
            data = checkpoint.evaluation_set(self.options.eval_limit)
            original = evaluate_model(checkpoint.model, data)
        say(f"original: {original.score:.2f} on {original.num_examples} examples")
        return checkpoint, data, original, warnings, _continued(checkpoint, checkpoint.model)

    def _batches(self, samples: int, seed: int, labels: bool) -> tuple[Any, list[str]]:
        """Calibration batches and the warnings about them; the last ones are kept."""
        key = samples, seed, labels
        if key not in self._calibration:
            self._calibration.clear()
            with harness.warnings_on_stderr() as warnings:
                batches = self._prepared[0].batches(samples, seed, labels=labels)
            self._calibration[key] = batches, warnings
        return self._calibration[key]

    def measure(self, group: Sequence[Conditions]) -> Iterator[dict[str, Any]]:
        """Prune to the constraints of one variant and seed, and score each model.

        Scores are in points of 100; the constraints share one collection, and its seconds.
        """
        from rfprune.cost.constraint import Constraint
        from rfprune.methods.problem import prepare_problem
        from rfprune.pruning import prune_to_each
        from rfprune.tasks.evaluation import divergence, evaluate_model
        from scripts.bench.peers.peer import collector, settings_of_variant

        checkpoint, data, original, early, continued = self._prepared
        first = group[0]
        asked = self.suite.variants[first["variant"]]
        settings = settings_of_variant(asked, first["seed"])
        batches, later = self._batches(
            first["requested_samples"], first["seed"], asked.get("use_labels", False)
        )
        constraints = [Constraint(one["metric"], one["constraint"]) for one in group]
        cache = None if self.suite.timed else default_folder()
        with harness.warnings_on_stderr() as warnings:
            problem = prepare_problem(checkpoint.model, batches, settings, cache=cache)
            results = prune_to_each(problem, constraints, collect=collector(asked))
            for conditions in group:
                try:
                    result = next(results)
                    pruned = evaluate_model(result.model, data, reference=checkpoint.model)
                except UserError as error:
                    name = f"seed {first['seed']} {first['variant']}"
                    raise NotMeasured(f"{name}: {error}") from error
                yield {
                    **conditions,
                    "samples": num_examples(batches),
                    "settings": dataclasses.asdict(settings)
                    | {"method": asked.get("peer", settings.method)},
                    "device": checkpoint.model.device.type,
                    "metric_name": original.metric_name,
                    "original_score": original.score,
                    "score": pruned.score,
                    "scores": {"original": dict(original.scores), "pruned": dict(pruned.scores)},
                    "divergence": divergence(original, pruned),
                    **_drop_error(data, original, pruned),
                    **_of_language_model(checkpoint, result.model, continued, original, pruned),
                    "evaluated_examples": original.num_examples,
                    "achieved": result.achieved,
                    "mean_tokens": result.mean_tokens,
                    "seconds": {**result.seconds, "evaluate": pruned.seconds},
                    "layers": list(result.layers),
                    "warnings": list(dict.fromkeys([*early, *later, *warnings, *result.warnings])),
                }


def _drop_error(data: EvaluationSet, original: Evaluation, pruned: Evaluation) -> dict[str, float]:
    """The standard error of the drop in score, in points; language models have that of blocks."""
    from rfprune.tasks.bootstrap import paired_drop

    if data.task.name == LANGUAGE_MODELING:
        return {}
    return {"drop_error": paired_drop(data, original, pruned, allowed=0.0).standard_error}


def _of_language_model(
    checkpoint: Checkpoint,
    pruned_model: Any,
    by_original: Mapping[str, str],
    original: Evaluation,
    pruned: Evaluation,
) -> dict[str, Any]:
    """Language models: the text that they generate, nats of every block, and peak memory."""
    if checkpoint.task.name != LANGUAGE_MODELING:
        return {}
    return {
        "nats": {"original": _nats_per_block(original), "pruned": _nats_per_block(pruned)},
        "written": _continued(checkpoint, pruned_model),
        "written_by_original": by_original,
        "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def _nats_per_block(evaluation: Evaluation) -> list[float]:
    """Mean negative log-likelihood of every block: standard errors are those of blocks, and models
    are compared block by block."""
    return [round(-float(block.mean()), 5) for block in evaluation.logits[0]]


def _continued(checkpoint: Checkpoint, model: Any) -> dict[str, str]:
    """The likeliest next tokens after each prompt; of language models only."""
    if checkpoint.task.name != LANGUAGE_MODELING:
        return {}
    tokenizer, found = checkpoint.loaded.tokenizer, {}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        tokens = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        new = tokens[0, inputs["input_ids"].shape[1] :]
        found[prompt] = tokenizer.decode(new, skip_special_tokens=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
