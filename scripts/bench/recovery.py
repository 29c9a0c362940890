"""What recovery by distillation adds after pruning: score and divergence against minutes.

python -m scripts.bench.recovery --model CHECKPOINT --task sst2 --constraint 0.2 --steps 500

The model is pruned, and the pruned model is trained by scripts/finetune.py --teacher CHECKPOINT on
unlabelled texts of the training split.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.errors import UserError
from scripts import finetune
from scripts.bench import harness
from scripts.bench.harness import Conditions, machine
from scripts.bench.models import load_checkpoint, num_examples, settings_of

CONDITIONS = (
    *("model", "task", "seed", "samples", "train_samples", "train_batch_size", "max_length"),
    *("learning_rate", "temperature", "hidden_states", "eval_limit"),
)

FROM_REPORT = (
    *("metric_name", "scores", "divergence", "evaluated_examples", "training_examples"),
    *("steps", "seconds"),
)


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    options = _parser().parse_args(argv)
    here = machine("cpu")
    shared = harness.conditions_of(options, CONDITIONS) | {"max_steps": options.steps}
    wanted = [shared | one for one in harness.each_combination(constraint=options.constraint)]
    output = options.output or harness.default_output("recovery", shared["model"], shared["task"])
    same = {name: here[name] for name in ("device_name", "threads")}
    return harness.complete(__file__, output, wanted, partial(_measure, options), same=same)


def _parser() -> argparse.ArgumentParser:
    names = "model task data-dir constraint samples seed batch-size max-length eval-limit"
    parser = harness.parser_of(__doc__, names, constraint=[0.2])
    add = partial(parser.add_argument, metavar="N")
    add("--steps", type=harness.count("--steps"), required=True, help="of training")
    add("--train-samples", type=harness.count("--train-samples"), help="texts (default: all)")
    size = harness.count("--train-batch-size")
    add("--train-batch-size", type=size, default=32, help="texts a step (default: 32)")
    add("--learning-rate", type=float, default=3e-5, help="default: 3e-5")
    temperature = finetune.TEMPERATURE
    add("--temperature", type=float, default=temperature, help=f"default: {temperature:g}")
    add("--hidden-states", type=float, help="weight of the hidden states (default: none)")
    return parser


def _measure(options: argparse.Namespace, group: Sequence[Conditions]) -> Iterator[dict[str, Any]]:
    """Prune, train and score."""
    from rfprune.cost.constraint import Constraint
    from rfprune.pruning import prune

    for conditions in group:
        with harness.warnings_on_stderr() as warnings:
            checkpoint = load_checkpoint(options)
            batches = checkpoint.batches(options.samples, options.seed)
            settings = settings_of(seed=options.seed)
            constraint = Constraint("mac", conditions["constraint"])
            result = prune(checkpoint.model, batches, constraint, settings)
            with tempfile.TemporaryDirectory() as folder:
                result.save(Path(folder, "pruned"), checkpoint.loaded.tokenizer)
                if finetune.main(_flags(options, Path(folder))) != 0:
                    raise UserError("The training of the pruned model failed.")
                report = json.loads(
                    Path(folder, "recovered", finetune.RECOVERY_FILE).read_text(encoding="utf-8")
                )
        yield {
            **conditions,
            "settings": dataclasses.asdict(settings),
            "achieved": result.achieved,
            "calibration_examples": num_examples(batches),
            **{name: report[name] for name in FROM_REPORT},
            "prune_seconds": result.seconds["prune_total"],
            "warnings": list(dict.fromkeys([*warnings, *result.warnings])),
        }


def _flags(options: argparse.Namespace, folder: Path) -> list[str]:
    """Those of scripts/finetune.py."""
    given = {
        "model": folder / "pruned",
        "teacher": options.model,
        "task": options.task,
        "output-dir": folder / "recovered",
        "data-dir": options.data_dir,
        "max-steps": options.steps,
        "max-train-samples": options.train_samples,
        "batch-size": options.train_batch_size,
        "max-length": options.max_length,
        "eval-limit": options.eval_limit,
        "learning-rate": options.learning_rate,
        "temperature": options.temperature,
        "hidden-states": options.hidden_states,
        "seed": options.seed,
    }
    return [
        part
        for name, value in given.items()
        if value is not None
        for part in (f"--{name}", str(value))
    ]


if __name__ == "__main__":
    sys.exit(main())
