"""Decoder classifiers find the last token by the pad token of their tokenizer.

Without this a run ends in a traceback, or reads padding as the last token.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from rfprune import Constraint, load_pruned, prune
from rfprune.checkpoints.loading import load
from rfprune.checkpoints.padding import align_pad_token
from rfprune.errors import RfpruneWarning, UserError
from rfprune.main import main
from rfprune.tasks.registry import get_task

Tiny = Callable[..., Any]
TYPES = pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt"])


@TYPES
@pytest.mark.parametrize("in_tokenizer", [True, False])
def test_the_command_uses_the_pad_token_of_the_tokenizer(
    model_type: str,
    in_tokenizer: bool,
    tiny_model: Tiny,
    tiny_tokenizer: Tiny,
    tiny_data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rfprune.latency.speedup.MAX_ROUNDS", 1)
    monkeypatch.setattr("rfprune.report.plots.RUN_FIGURES", ())
    model, tokenizer = tiny_model(model_type), tiny_tokenizer("bert")
    model.config.pad_token_id = None
    tokenizer.eos_token = "[SEP]"
    pad = tokenizer.pad_token_id if in_tokenizer else tokenizer.eos_token_id
    if not in_tokenizer:
        tokenizer.pad_token = None
    folder, out = tmp_path / "model", tmp_path / "out"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert AutoConfig.from_pretrained(folder).pad_token_id is None
    flags = f"--model {folder} --task mrpc --data-dir {tiny_data_dir} --constraint 0.6 --samples 16"
    assert main([*flags.split(), "--no-cache", "--output-dir", str(out)]) == 0
    assert load_pruned(out).config.pad_token_id == pad
    assert AutoTokenizer.from_pretrained(out).pad_token_id == pad
    loaded = load(str(out), get_task("mrpc"), device=torch.device("cpu"), dtype=torch.float32)
    assert loaded.model.config.pad_token_id == pad


@TYPES
def test_the_tokenizer_decides_if_the_model_has_another_one(
    model_type: str, tiny_model: Tiny, tiny_tokenizer: Tiny
) -> None:
    model, tokenizer = tiny_model(model_type), tiny_tokenizer("bert")
    model.config.pad_token_id = 5
    with pytest.warns(RfpruneWarning, match=r"pad_token_id 5, .* pads with 0 \('\[PAD\]'\)"):
        align_pad_token(model, tokenizer, "folder")
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0


def test_the_model_decides_if_the_tokenizer_has_none(
    tiny_model: Tiny, tiny_tokenizer: Tiny
) -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer("bert")
    model.config.pad_token_id, tokenizer.pad_token = 5, None
    align_pad_token(model, tokenizer, "folder")
    assert model.config.pad_token_id == tokenizer.pad_token_id == 5
    model.config.pad_token_id, tokenizer.pad_token, tokenizer.eos_token = None, None, None
    with pytest.raises(UserError, match="'folder' has no pad token.*tokenizer.pad_token"):
        align_pad_token(model, tokenizer, "folder")


@TYPES
def test_prune_says_what_is_missing_before_the_work(model_type: str, tiny_model: Tiny) -> None:
    model = tiny_model(model_type)
    mask = torch.ones(4, 9, dtype=torch.int64)
    mask[:, 6:] = 0
    batch = {"input_ids": torch.randint(6, 20, (4, 9)) * mask, "attention_mask": mask}
    for pad, says in ((None, "pad_token_id is None"), (5, "is 5, but .* padded with 0")):
        model.config.pad_token_id = pad
        with pytest.raises(UserError, match=f"{says}.*= tokenizer.pad_token_id"):
            prune(model, [batch] * 2, Constraint("mac", 0.5))
    model.config.pad_token_id = 0
    assert prune(model, [batch] * 2, Constraint("mac", 0.5)).achieved["mac"] <= 0.5
