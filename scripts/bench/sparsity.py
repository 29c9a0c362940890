"""What each granularity costs: units, N:M and unstructured zeros at equal numbers of non-zeros.

python -m scripts.bench.sparsity --model CHECKPOINT --task sst2 --data-dir data --nonzeros 0.5 0.25
python -m scripts.bench.sparsity --model CHECKPOINT --task language-modeling --data-dir text \\
    --samples 64 --batch-size 8 --eval-limit 48

`--nonzeros` is the fraction of the weights of the linear maps within the layers that stay. Heads
and neurons (units) are removed to the same number of parameters. `torch-local` and `torch-global`
are `torch.nn.utils.prune.l1_unstructured` and `global_unstructured`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.errors import UserError
from rfprune.settings import SPARSITY_CRITERIA
from scripts.bench import harness
from scripts.bench.harness import Conditions, say
from scripts.bench.models import Checkpoint, load_checkpoint, num_examples, settings_of

if TYPE_CHECKING:
    from rfprune.tasks.evaluation import Evaluation, EvaluationSet

LEVELS = (0.5, 0.25)
PATTERNS = {0.5: "2:4", 0.25: "1:4"}
UNITS, UNITS_AND_ZEROS = "units", "units, then 2:4"
LIBRARY = ("torch-local", "torch-global")


def variants(level: float) -> dict[str, dict[str, Any]]:
    """Arguments of `rfprune.Settings` by name of the variant, at a fraction of non-zeros."""
    zeros = f"{1 - level:g}"
    found: dict[str, dict[str, Any]] = {UNITS: {}}
    for criterion in SPARSITY_CRITERIA:
        found[f"{PATTERNS[level]}, {criterion}"] = {
            "sparsity": PATTERNS[level],
            "sparsity_criterion": criterion,
        }
        found[f"anywhere, {criterion}"] = {"sparsity": zeros, "sparsity_criterion": criterion}
        if level < PATTERNS_OF_UNITS:
            found[f"{UNITS_AND_ZEROS}, {criterion}"] = {
                "sparsity": "2:4",
                "sparsity_criterion": criterion,
            }
    found["anywhere, obs, global"] = {"sparsity": zeros, "sparsity_scope": "global"}
    return found | {name: {} for name in LIBRARY}


PATTERNS_OF_UNITS = 0.5
"""Below this level, units are also removed to twice the level and half of the rest by 2:4."""


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    options = _parser().parse_args(argv)
    names = ("task", "eval_limit", "batch_size", "max_length", "model")
    shared = harness.conditions_of(options, names)
    shared |= {"requested_samples": options.samples, "seed": options.seed}
    wanted = [
        shared | {"nonzeros": level, "variant": name}
        for level in options.nonzeros
        for name in variants(level)
        if options.variant is None or any(name.startswith(each) for each in options.variant)
    ]
    if not wanted:
        raise UserError(f"--variant {' '.join(options.variant)} is the beginning of no variant.")
    output = options.output or harness.default_output(
        "sparsity",
        shared["model"],
        options.task,
        f"{options.samples}samples",
        options.eval_limit and f"{options.eval_limit}evaluated",
    )
    bench = Bench(options)
    return harness.complete(
        __file__, output, wanted, bench.measure, group_by=("nonzeros", "variant")
    )


def _parser() -> argparse.ArgumentParser:
    names = "model task data-dir seed samples batch-size max-length eval-limit device dtype"
    parser = harness.parser_of(__doc__, names, samples=512)
    parser.add_argument(
        "--nonzeros",
        nargs="+",
        type=float,
        choices=LEVELS,
        default=list(LEVELS),
        help="fraction of the weights within the layers that stay (default: 0.5 0.25)",
    )
    parser.add_argument(
        "--variant", nargs="+", metavar="NAME", help="variants that begin so (default: all)"
    )
    return parser


class Bench:
    """A model with its data and its own score; loaded when the first measurement asks for it."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Nothing is loaded yet."""
        self.options = options

    @cached_property
    def _prepared(self) -> tuple[Checkpoint, EvaluationSet, Evaluation, Any]:
        from rfprune.tasks.evaluation import evaluate_model

        checkpoint = load_checkpoint(self.options)
        data = checkpoint.evaluation_set(self.options.eval_limit)
        original = evaluate_model(checkpoint.model, data)
        say(f"original: {original.score:.2f} on {original.num_examples} examples")
        batches = checkpoint.batches(self.options.samples, self.options.seed)
        return checkpoint, data, original, batches

    def measure(self, group: Sequence[Conditions]) -> Iterator[dict[str, Any]]:
        """Prune and score one model."""
        from rfprune.cost.params import total_params
        from rfprune.tasks.evaluation import divergence, evaluate_model

        checkpoint, data, original, batches = self._prepared
        for one in group:
            settings = settings_of(**variants(one["nonzeros"])[one["variant"]], seed=one["seed"])
            model, seconds, warnings = _made(checkpoint, batches, one, settings)
            pruned = evaluate_model(model, data, reference=checkpoint.model)
            yield {
                **one,
                "samples": num_examples(batches),
                "settings": dataclasses.asdict(settings),
                "metric_name": original.metric_name,
                "original_score": original.score,
                "score": pruned.score,
                "divergence": divergence(original, pruned),
                "evaluated_examples": original.num_examples,
                "original_params": total_params(checkpoint.model),
                **sizes_of(model),
                "original_bytes": 2 * total_params(checkpoint.model),
                "seconds": seconds,
                "warnings": list(warnings),
            }


def _made(
    checkpoint: Checkpoint, batches: Any, conditions: Conditions, settings: Any
) -> tuple[Any, Mapping[str, float], Sequence[str]]:
    """The pruned model, the seconds by stage, and the warnings."""
    from rfprune.cost.constraint import Constraint
    from rfprune.pruning import prune

    name, level = conditions["variant"], conditions["nonzeros"]
    if name in LIBRARY:
        return pruned_by_torch(checkpoint.model, level, everywhere=name == LIBRARY[1]), {}, ()
    constraint = None
    if name.startswith(UNITS):
        left = 2 * level if name.startswith(UNITS_AND_ZEROS) else level
        constraint = Constraint("params", params_ratio(checkpoint.model, left))
    result = prune(checkpoint.model, batches, constraint, settings)
    return result.model, result.seconds, result.warnings


def params_ratio(model: Any, level: float) -> float:
    """The fraction of all parameters that is left where only this fraction of the weights of the
    linear maps within the layers is."""
    from rfprune.cost.params import total_params

    weights: int = sum(weight.numel() for weight in _weights(model))
    return float(1 - (1 - level) * weights / total_params(model))


def pruned_by_torch(model: Any, level: float, *, everywhere: bool) -> Any:
    """A copy pruned by magnitude by PyTorch itself: each map to a level, or all together."""
    from torch.nn.utils import prune

    pruned = copy.deepcopy(model)
    modules = [(module, "weight") for module in _modules(pruned)]
    if everywhere:
        prune.global_unstructured(modules, prune.L1Unstructured, amount=1 - level)
    else:
        for module, name in modules:
            prune.l1_unstructured(module, name, amount=1 - level)
    for module, name in modules:
        prune.remove(module, name)
    return pruned


def sizes_of(model: Any) -> dict[str, int]:
    """Parameters, those that are not zero, and bytes in float16 when zeros are compressed."""
    from rfprune.cost.params import total_params
    from rfprune.cost.sparsity import MapSparsity, num_zeros, saved_bytes

    maps = [
        MapSparsity("", 0, weight.numel(), int(weight.count_nonzero()), 0.0)
        for weight in _weights(model)
    ]
    params = total_params(model)
    return {
        "params": params,
        "nonzero_params": params - num_zeros(maps),
        "compressed_bytes": 2 * params - saved_bytes(maps, item_size=2),
    }


def _weights(model: Any) -> list[Any]:
    return [module.weight for module in _modules(model)]


def _modules(model: Any) -> list[Any]:
    """The linear maps within the layers."""
    from rfprune.model.layout import layout_of
    from rfprune.stages.map_inputs import maps_of_layers

    return [model.get_submodule(path) for path in maps_of_layers(model, layout_of(model))]


if __name__ == "__main__":
    sys.exit(main())
