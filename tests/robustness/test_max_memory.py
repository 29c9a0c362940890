"""--max-memory is kept, by the operating system's own accounting of a fresh process, or refused.

Deleting this lets a run take more than it promises, or fail hours after it could have been refused.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rfprune.checkpoints.offload import without_weights
from rfprune.cost.params import total_params
from rfprune.methods.memory_plan import Load, MemoryPlan, plan_memory
from rfprune.settings import num_bytes

ROOT = Path(__file__).resolve().parents[2]
Flags = list[str]

RUN = """
import re, sys
from rfprune.main import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("size", "expected"),
    [("4GB", 4 * 10**9), ("1.5GiB", 3 * 2**29), ("800 MB", 8 * 10**8), ("64B", 64), ("4", None)],
)
def test_sizes_are_read(size: str, expected: int | None) -> None:
    assert num_bytes(size) == expected


@pytest.fixture
def flags(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Callable[..., Any],
    tiny_data_dir: Path,
    tmp_path: Path,
) -> Flags:
    """Of a run with a model of 48 small layers and 0.3 GB."""
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 512}
    model = tiny_model(num_hidden_layers=48, initializer_range=0.1, **sizes)
    model.save_pretrained(tmp_path / "model", max_shard_size="50MB")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    run = ["--model", str(tmp_path / "model"), "--task", "mrpc", "--data-dir", str(tiny_data_dir)]
    run += ["--constraint", "0.5", "--samples", "16", "--batch-size", "8", "--eval-limit", "8"]
    return [*run, "--max-length", "32", "--device", "cpu", "--no-cache", "--quiet"]


def peak(flags: Flags, output: Path, code: int = 0) -> tuple[int, str]:
    """The most bytes that a fresh process had with these flags, and what it said."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *flags, "--output-dir", str(output)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == code, done.stderr
    return 1024 * int(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the accounting of Linux")
def test_the_limit_is_kept_or_refused(flags: Flags, tmp_path: Path) -> None:
    cheap = ["--importance", "magnitude-l1", "--skip-tune"]  # a lower bound of the same without
    unlimited, _ = peak([*flags, *cheap], tmp_path / "unlimited")
    before, refusal = peak([*flags, "--max-memory", "100MB"], tmp_path / "refused", code=2)
    assert "--max-memory 100MB is too little: with its layers offloaded" in refusal
    assert not (tmp_path / "refused").exists()
    (least,) = re.findall(r"give --max-memory ([\d.]+)GB", refusal)
    limit = float(least) * 10**9
    assert before < limit
    limited, _ = peak([*flags, "--max-memory", f"{least}GB"], tmp_path / "limited")
    assert limited <= limit
    # Not limit < unlimited: the system may drop pages of the weights' file, and then counts fewer.
    assert limited < 0.9 * unlimited, "the limit matters"
    assert (tmp_path / "limited" / "model.safetensors.index.json").exists()


def test_a_plan_counts_the_layers_that_are_in_memory(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama", "causal-lm", num_hidden_layers=6)
    layer = 4 * sum(weight.numel() for weight in model.model.layers[0].parameters())
    others = 4 * total_params(model) - 6 * layer
    offloaded, whole = (plan(model, offloaded).parts for offloaded in (True, False))
    assert (offloaded["layers"], whole["layers"]) == (2 * layer, 12 * layer)
    assert whole["embeddings and head"] == 2 * others == 2 * offloaded["embeddings and head"]


def test_a_decoder_of_a_billion_parameters_takes_less_than_its_weights() -> None:
    """4.15 GB; a run takes 3 of them."""
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8
    )
    model = without_weights(AutoModelForCausalLM, config)
    total = plan(model, offloaded=True, process_bytes=4 * 10**8).total
    assert total < 2.8e9
    largest = "moments of the largest block"
    on_gpu = plan(model, offloaded=True, device="cuda").parts[largest]
    assert plan(model, offloaded=True).parts[largest] < 0.7 * on_gpu


def plan(model: Any, offloaded: bool, *, device: str = "cpu", process_bytes: int = 0) -> MemoryPlan:
    load = Load(examples=8, batch_size=2, length=16)
    where = torch.device(device)
    return plan_memory(
        model, torch.float32, load, where, process_bytes=process_bytes, offloaded=offloaded
    )
