"""Pruning and quantisation, apart and together: score, divergence, bytes and milliseconds.

OMP_NUM_THREADS=1 python -m scripts.bench.exports --model CHECKPOINT --task sst2 --clock cpu
OMP_NUM_THREADS=1 python -m scripts.bench.exports --model smollm2-135m --task language-modeling \\
    --data-dir text --samples 64 --max-length 128 --formats gguf --clock cpu

The original and the models pruned to every constraint, each by PyTorch and in every format, with
float32 and with quantised weights, are scored by one evaluation and timed in turn on the same
batches.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.cli.validation import check_exports
from rfprune.errors import UserError, check_installed
from rfprune.settings import GGUF_TYPES
from scripts.bench import harness
from scripts.bench.harness import Conditions, machine
from scripts.bench.models import Batch, load_checkpoint, num_examples, settings_of

if TYPE_CHECKING:
    from torch import nn

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
FOREVER = 1e9
"""Seconds: the number of rounds decides when timing ends."""

LONG = 128
"""Tokens of the last shape that is timed."""


@dataclass(frozen=True)
class Source:
    """What files are made from besides the model."""

    tokenizer: Any
    batches: Sequence[Batch]


Variants = dict[str, tuple["nn.Module", int]]
"""What runs a model in one format, and the bytes of its weights, by the suffix of its name."""


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    options = _parser().parse_args(argv)
    check_exports(options.formats, quantize=True)
    if "gguf" in options.formats:
        check_installed("llama.cpp", ["llama-cpp-python"], extra="llamacpp")
    here = machine("cpu")
    if options.clock == "cpu" and here["threads"] > 1:
        raise UserError(
            "--clock cpu adds up the time of all threads: set OMP_NUM_THREADS=1, or use wall."
        )
    names = ["model", "task", "method", "seed", "eval_limit", "batch_size", "clock"]
    names += ["max_length"] * (options.max_length is not None)
    wanted = harness.conditions_of(options, names) | {
        "requested_samples": options.samples,
        "constraints": " ".join(f"{ratio:g}" for ratio in options.constraint),
        "formats": " ".join(options.formats),
    }
    output = options.output or harness.default_output(
        "exports", wanted["model"], options.method, f"{here['threads']}thread"
    )
    same = {name: here[name] for name in ("device_name", "threads")}
    return harness.complete(__file__, output, [wanted], partial(_measure, options), same=same)


def _parser() -> argparse.ArgumentParser:
    names = "model task data-dir constraint method samples seed eval-limit batch-size max-length"
    parser = harness.parser_of(__doc__, f"{names} rounds", constraint=[0.7, 0.5], rounds=20)
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=WRITERS,
        default=["onnx", "openvino"],
        help="default: onnx openvino",
    )
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: the time of the process, for a machine that others use; one thread only",
    )
    return parser


def _measure(options: argparse.Namespace, group: Sequence[Conditions]) -> Iterator[dict[str, Any]]:
    """Prune, export, score and time."""
    from rfprune.checkpoints.loading import quiet_transformers
    from rfprune.export.contract import time_on_cpu
    from rfprune.latency.timing import TimingBudget
    from rfprune.pruning import prune_family

    budget = TimingBudget(FOREVER, max_rounds=options.rounds, tolerance=0)
    for conditions in group:
        with harness.warnings_on_stderr() as warnings:
            checkpoint = load_checkpoint(options)
            batches = checkpoint.batches(options.samples, options.seed)
            data = checkpoint.evaluation_set(options.eval_limit)
            settings = settings_of(method=options.method, seed=options.seed)
            pruned = prune_family(checkpoint.model, batches, options.constraint, settings)
            names = [f"{ratio:g}" for ratio in options.constraint]
            results = dict(zip(names, pruned, strict=True))
            given = {"original": checkpoint.model}
            given |= {name: result.model for name, result in results.items()}
            with tempfile.TemporaryDirectory() as folder, quiet_transformers():
                source = Source(checkpoint.loaded.tokenizer, batches)
                variants = _variants(given, options.formats, source, Path(folder))
                models = {name: model for name, (model, _) in variants.items()}
                rows = _score(models, data)
                speed = []
                for batch in _shapes(checkpoint.model, batches):
                    milliseconds, shape = time_on_cpu(
                        models, batch, budget=budget, timer=CLOCKS[options.clock]
                    )
                    speed.append(shape | {"ms": milliseconds})
        yield {
            **conditions,
            "settings": dataclasses.asdict(settings),
            "achieved": {name: result.achieved for name, result in results.items()},
            "samples": num_examples(batches),
            "evaluated_examples": data.num_examples,
            "models": {name: row | {"bytes": variants[name][1]} for name, row in rows.items()},
            "speed": speed,
            "warnings": list(
                dict.fromkeys(
                    [*warnings, *(one for result in results.values() for one in result.warnings)]
                )
            ),
        }


def _variants(
    given: Mapping[str, Any], formats: Sequence[str], source: Source, folder: Path
) -> Variants:
    """Every model by PyTorch and in every format: "original", "original-onnx", "0.7-onnx-int8"."""
    found: Variants = {}
    for name, model in given.items():
        found[name] = model, sum(value.nbytes for value in model.state_dict().values())
        for one in WRITERS:
            if one in formats:
                path = folder / f"{name}-{one}"
                path.mkdir()
                written = WRITERS[one](model, source, path)
                found |= {f"{name}-{suffix}": variant for suffix, variant in written.items()}
    return found


def _write_onnx(model: Any, source: Source, folder: Path) -> Variants:
    """float32, and int8 weights with activations quantised at run time."""
    from rfprune.export.contract import file_bytes
    from rfprune.export.onnx import OnnxModel, export_onnx, quantize_onnx
    from rfprune.latency.timed_batch import typical_batch

    paths = {"onnx": folder / "model.onnx", "onnx-int8": folder / "int8.onnx"}
    export_onnx(model, typical_batch(source.batches), paths["onnx"])
    quantize_onnx(*paths.values())
    return {
        suffix: (OnnxModel(path, model.config), file_bytes(folder, f"{path.name}*"))
        for suffix, path in paths.items()
    }


def _write_openvino(model: Any, source: Source, folder: Path) -> Variants:
    """float32, and int8 weights; activations are quantised at run time where that is fast."""
    from rfprune.export.contract import file_bytes
    from rfprune.export.onnx import export_onnx
    from rfprune.export.openvino import OpenvinoModel, compress_weights, convert_onnx
    from rfprune.latency.timed_batch import typical_batch

    paths = {"openvino": folder / "model.xml", "openvino-int8": folder / "int8.xml"}
    export_onnx(model, typical_batch(source.batches), folder / "model.onnx")
    convert_onnx(folder / "model.onnx", paths["openvino"])
    compress_weights(*paths.values())
    return {
        suffix: (OpenvinoModel(path, model.config), file_bytes(folder, f"{path.stem}.bin"))
        for suffix, path in paths.items()
    }


def _write_gguf(model: Any, source: Source, folder: Path) -> Variants:
    """float16, and the quantised types; by llama.cpp."""
    from rfprune.export.gguf import export_gguf
    from rfprune.export.llama_cpp import LlamaCppModel

    found: Variants = {}
    for kind in GGUF_TYPES:
        path = folder / f"{kind}.gguf"
        export_gguf(model, source.tokenizer, path, kind)
        found[f"gguf-{kind}"] = LlamaCppModel(path, model.config), path.stat().st_size
    return found


WRITERS: Mapping[str, Callable[[Any, Source, Path], Variants]] = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "gguf": _write_gguf,
}
"""Format -> function that writes a model in all its variants to a folder."""


def _score(models: Mapping[str, nn.Module], data: Any) -> dict[str, dict[str, Any]]:
    """Score and divergence from the original, by model."""
    from rfprune.tasks.evaluation import divergence, evaluate_model

    original = models["original"]
    reference = evaluate_model(original, data)
    rows = {}
    for name, model in models.items():
        evaluation = reference
        if model is not original:
            evaluation = evaluate_model(model, data, reference=original)
        rows[name] = {
            "score": evaluation.score,
            "metric_name": evaluation.metric_name,
            "divergence": divergence(reference, evaluation),
        }
        harness.say(f"{name}: {evaluation.metric_name} {evaluation.score:.2f}")
    return rows


def _shapes(model: Any, batches: Sequence[Batch]) -> list[Batch]:
    """A single typical example, a typical batch, and a longer one, whose tokens change no time."""
    import torch

    from rfprune.latency.timed_batch import typical_batch

    typical = typical_batch(batches)
    positions = model.config.max_position_embeddings - 2  # RoBERTa's offset
    ids = torch.randint(model.config.vocab_size, (len(typical["input_ids"]), min(LONG, positions)))
    single = {name: values[:1] for name, values in typical.items()}
    if typical["input_ids"].shape[1] >= LONG:  # blocks of running text
        return [single, typical]
    long = {name: torch.ones_like(ids) for name in typical} | {"input_ids": ids}
    if "token_type_ids" in typical:
        long["token_type_ids"] = torch.zeros_like(ids)
    return [single, typical, long]


if __name__ == "__main__":
    sys.exit(main())
