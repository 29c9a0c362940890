"""Measure variations of `--method curvature` against the method as it is, on one model and task.

python scripts/explore.py --model CHECKPOINT --task mrpc --data-dir data --constraint 0.3 --seed 0 1

Every measurement is one line of JSON in the output file, written as soon as it is there; what the
file holds is not measured again. The variations are in `scripts/variations.py`; those of one model
and seed share what is collected.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import one another

from rfprune.errors import UserError
from rfprune.tasks.registry import TASKS, get_task
from scripts.entry import GOES_ON, script
from scripts.sweep import append_line, default_output, model_name, read_lines

if TYPE_CHECKING:
    from rfprune.loading import Loaded
    from rfprune.tasks.evaluation import Evaluation, EvaluationSet
    from scripts.variation_study import Study

CONDITIONS = (
    *("model", "task", "variation", "metric", "constraint", "seed", "requested_samples"),
    *("eval_limit", "batch_size", "max_length"),
)
"""Two lines that agree in all of these are the same measurement."""


@script(GOES_ON)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130 stopped."""
    options = _parser().parse_args(argv)
    output: Path = options.output or _output(options)
    wanted = list(measurements(options))
    measured = {key_of(line) for line in read_lines(output)}
    missing = [conditions for conditions in wanted if key_of(conditions) not in measured]
    _say(f"{output}: {len(missing)} of {len(wanted)} measurements to make")
    if missing:
        _explore(options, missing, output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="a folder, hub id, alias, or demo")
    add("--task", required=True, help=", ".join(TASKS))
    add("--data-dir", type=Path, help="local data, DIR/TASK/...; else the hub")
    add("--constraint", nargs="+", type=float, default=[0.3], help="MACs to keep (default: 0.3)")
    add("--seed", nargs="+", type=int, default=[0], help="draw the samples (default: 0)")
    add("--variation", nargs="+", help="of those in scripts/variations.py (default: all)")
    add("--samples", type=int, default=512, help="to calibrate on (default: 512)")
    add("--batch-size", type=int, default=32, help="examples a batch (default: 32)")
    add("--max-length", type=int, help="tokens an example (default: the task's)")
    add("--eval-limit", type=int, help="score so many validation examples, not all")
    add("--output", type=Path, help="default: results/exploration_MODEL_TASK_Nsamples.jsonl")
    return parser


def _output(options: argparse.Namespace) -> Path:
    """As `scripts/sweep.py` names its files."""
    path = default_output(argparse.Namespace(**vars(options), metric="mac"))
    return path.with_name(path.name.replace("quality_", "exploration_").replace("_mac_", "_"))


def measurements(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All that the flags ask for: by seed, then constraint, then variation; nothing twice.

    Raises:
        UserError: an unknown task, or one that is not about whole examples; an unknown variation.
    """
    from scripts.variations import VARIATIONS

    if get_task(options.task).kind == "question-answering":
        raise UserError("question answering cannot be explored; choose a task of one output a row.")
    variations = options.variation or list(VARIATIONS)
    for name in variations:
        if name not in VARIATIONS:
            raise UserError(f"--variation {name} is unknown; choose of {', '.join(VARIATIONS)}.")
    names = ("task", "eval_limit", "batch_size", "max_length")
    shared = {name: getattr(options, name) for name in names} | {"metric": "mac"}
    shared |= {"model": model_name(options.model), "requested_samples": options.samples}
    wanted = product(options.seed, options.constraint, variations)
    for seed, constraint, variation in dict.fromkeys(wanted):
        yield shared | {"seed": seed, "constraint": constraint, "variation": variation}


def key_of(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """The conditions of a line, or of what is to become one."""
    return tuple(line.get(name) for name in CONDITIONS)


def _explore(options: argparse.Namespace, missing: Sequence[dict[str, Any]], output: Path) -> None:
    from rfprune.loading import data_folder, length_limit
    from rfprune.tasks.evaluation import evaluate_model, prepare_evaluation

    task, loaded = get_task(options.task), _loaded(options)
    data_dir = data_folder(options.model, options.data_dir)
    max_length = length_limit(loaded, task, options.max_length)
    evaluation_set = prepare_evaluation(
        task,
        loaded.tokenizer,
        data_dir,
        batch_size=options.batch_size,
        max_length=max_length,
        limit=options.eval_limit,
    )
    original = evaluate_model(loaded.model, evaluation_set)
    _say(f"original: {original.score:.2f} on {original.num_examples} examples")
    append_line(output, None)
    studies: dict[int, Study] = {}
    for conditions in missing:
        seed = conditions["seed"]
        if seed not in studies:
            studies = {seed: _study(options, loaded, data_dir, max_length, seed)}
        line = measure(conditions, studies[seed], evaluation_set, original)
        append_line(output, line)
        _say(
            f"seed {seed} {line['constraint']} {line['variation']}: {line['score']:.2f} points, "
            f"divergence {line['divergence']:.4f}, MACs {line['achieved']['mac']:.4f}, "
            f"{line['seconds']['prune']:.0f} s {line['details']}"
        )


def _loaded(options: argparse.Namespace) -> Loaded:
    import torch

    from rfprune.loading import load

    device = torch.device("cpu")
    return load(options.model, get_task(options.task), device=device, dtype=torch.float32)


def _study(
    options: argparse.Namespace,
    loaded: Loaded,
    data_dir: Path | None,
    max_length: int,
    seed: int,
) -> Study:
    from rfprune.calibration import calibration_batches
    from scripts.variation_study import Study

    batches = calibration_batches(
        get_task(options.task),
        loaded.tokenizer,
        data_dir,
        num_samples=options.samples,
        batch_size=options.batch_size,
        max_length=max_length,
        seed=seed,
        with_labels=False,
    )
    return Study(loaded.model, batches, seed)


def measure(
    conditions: Mapping[str, Any],
    study: Study,
    evaluation_set: EvaluationSet,
    original: Evaluation,
) -> dict[str, Any]:
    """Prune as the conditions say and score the model: a line of the file.

    Scores are in points of 100; the seconds are without what the variations of a seed share,
    unless this one was the first to need it.
    """
    from rfprune.report.report_json import versions
    from rfprune.tasks.evaluation import divergence, evaluate_model
    from scripts.variations import VARIATIONS

    started = time.perf_counter()
    outcome = VARIATIONS[conditions["variation"]](study, conditions["constraint"])
    seconds = time.perf_counter() - started
    pruned = evaluate_model(outcome.model, evaluation_set)
    layers = [{"heads": 0, "neurons": 0} for _ in study.layout.layers]
    for block, count in zip(study.layout.blocks, outcome.kept, strict=True):
        layers[block.layer][f"{block.kind}s"] = count
    return {
        **conditions,
        "samples": sum(len(batch["input_ids"]) for batch in study.batches),
        "metric_name": original.metric_name,
        "original_score": original.score,
        "score": pruned.score,
        "divergence": divergence(original, pruned),
        "evaluated_examples": original.num_examples,
        "achieved": {"mac": outcome.achieved(study)},
        "mean_tokens": study.mean_tokens,
        "layers": layers,
        "details": dict(outcome.details),
        "seconds": {"prune": seconds, "evaluate": pruned.seconds},
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
    }


def _say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


if __name__ == "__main__":
    sys.exit(main())
