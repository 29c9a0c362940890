"""Pruned, plain and dense folders of every family load in a process without rfprune.

Without this test a folder could depend on what only this process has: a class that rfprune has
made, a module that it has imported, an attribute that it has set. Or it could load as the original
again, which happens to users of other pruners.
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

from rfprune.families.architectures import ARCHITECTURES
from rfprune.model.checkpoint import save_pruned
from rfprune.model.compact import compact
from rfprune.model.dense import save_dense
from rfprune.model.layout import Layout, layout_of
from rfprune.model.masks import Masks, full_masks
from rfprune.model.plain import plain_sizes, to_plain
from tests.model.test_contract import CASES, auto_class, heads_of, mixed_masks

Tiny = Callable[..., Any]

PROGRAM = """
import json, sys
sys.modules["rfprune"] = None  # importing it is an error, wherever it is installed
import torch, transformers
from safetensors.torch import load_file, save_file
for folder, auto_class, trusted, num_parameters in json.loads(sys.argv[1]):
    auto = getattr(transformers, auto_class)
    model = auto.from_pretrained(folder, trust_remote_code=trusted).eval()
    remote = type(model).__module__.startswith("transformers_modules")
    assert remote == trusted, f"{folder} is a {type(model)}"
    assert model.num_parameters() == num_parameters, f"{folder} has other sizes"
    with torch.no_grad():
        outputs = model(**load_file(folder + "/batch"))
    found = {name: outputs[name] for name in outputs if name.endswith("logits")}
    save_file(found, folder + "/found")
"""


def equal_masks(model: Any, layout: Layout) -> Masks:
    """The same numbers of heads and of neurons in every layer, as `--uniform` keeps them."""
    heads = plain_sizes(model, layout)["head"]
    masks = full_masks(layout)
    for block, mask in zip(layout.blocks, masks, strict=True):
        mask[heads[len(heads) // 2] if block.kind == "head" else 5 :] = 0
    return masks


def test_every_folder_gives_what_was_saved(
    tiny_model: Tiny, tiny_batch: Tiny, tiny_tokenizer: Tiny, tmp_path: Path
) -> None:
    jobs: list[tuple[str, str, bool, int]] = []
    expected: dict[str, dict[str, Tensor]] = {}
    for model_type, head in CASES:
        model, batch = tiny_model(model_type, head), tiny_batch(model_type=model_type)
        if head == "seq2seq-lm" and "input_ids" in batch:  # spectrograms have decoder inputs
            batch |= {"decoder_input_ids": batch["input_ids"].clone()}
        layout = layout_of(model)
        ways: tuple[str, ...] = ("pruned", "dense")
        if ARCHITECTURES[model_type].size_entries and head == heads_of(model_type)[0]:
            ways += ("plain",)
        for how in ways:
            folder = tmp_path / f"{model_type}-{head}-{how}"
            masks = equal_masks(model, layout) if how == "plain" else mixed_masks(layout)
            small = compact(model, layout, masks)
            if how == "plain":
                small = to_plain(small)
            if how == "dense":
                save_dense(small, layout, masks, folder, tiny_tokenizer(model_type))
            else:
                save_pruned(small, layout, masks, folder)
            with torch.no_grad():
                assert not torch.allclose(small(**batch)[0], model(**batch)[0], atol=1e-2)
                outputs = small(**batch)
            save_file(batch, folder / "batch")
            size = (model if how == "dense" else small).num_parameters()
            assert (size < model.num_parameters()) == (how != "dense")
            loader = auto_class(model_type, head)
            if how != "pruned" and model_type == "siglip_text_model":  # no Auto class knows it
                loader = type(model)
            jobs.append((str(folder), loader.__name__, how == "pruned", size))
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
