"""Pruned and dense folders of every family and head load in a process without rfprune.

Without this test a folder could depend on what only this process has: a class that rfprune has
made, a module that it has imported, an attribute that it has set.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rfprune.model.checkpoint import save_pruned
from rfprune.model.compact import compact
from rfprune.model.dense import save_dense
from rfprune.model.layout import layout_of
from tests.model.test_contract import CASES, HEADS, mixed_masks

Tiny = Callable[..., Any]

PROGRAM = """
import json, sys
sys.modules["rfprune"] = None  # importing it is an error, wherever it is installed
import torch, transformers
from safetensors.torch import load_file, save_file
for folder, auto_class, trusted in json.loads(sys.argv[1]):
    auto = getattr(transformers, auto_class)
    model = auto.from_pretrained(folder, trust_remote_code=trusted).eval()
    remote = type(model).__module__.startswith("transformers_modules")
    assert remote == trusted, f"{folder} is a {type(model)}"
    with torch.no_grad():
        outputs = model(**load_file(folder + "/batch"))
    found = {name: outputs[name] for name in outputs if name.endswith("logits")}
    save_file(found, folder + "/found")
"""


def test_every_folder_gives_what_was_saved(
    tiny_model: Tiny, tiny_batch: Tiny, tiny_tokenizer: Tiny, tmp_path: Path
) -> None:
    jobs: list[tuple[str, str, bool]] = []
    expected: dict[str, dict[str, Tensor]] = {}
    for model_type, head in CASES:
        model, batch = tiny_model(model_type, head), tiny_batch(model_type=model_type)
        if head == "seq2seq-lm":
            batch |= {"decoder_input_ids": batch["input_ids"].clone()}
        layout = layout_of(model)
        masks = mixed_masks(layout)
        small = compact(model, layout, masks)
        with torch.no_grad():
            assert not torch.allclose(small(**batch)[0], model(**batch)[0], atol=1e-2)
            outputs = small(**batch)
        for how in ("pruned", "dense"):
            folder = tmp_path / f"{model_type}-{head}-{how}"
            if how == "pruned":
                save_pruned(small, layout, masks, folder)
            else:
                save_dense(small, layout, masks, folder, tiny_tokenizer(model_type))
            save_file(batch, folder / "batch")
            jobs.append((str(folder), HEADS[head].__name__, how == "pruned"))
            expected[str(folder)] = {n: outputs[n] for n in outputs if n.endswith("logits")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(jobs)],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name, logits in expected.items():
        found = load_file(Path(name) / "found")
        assert found.keys() == logits.keys()
        for key, values in logits.items():
            assert torch.allclose(found[key], values, rtol=1e-4, atol=1e-4), f"{key} of {name}"
