"""Batches of language models are cut; all others stay as they are.

Deleting this lets the logits of a batch fill the memory, or examples be lost or torn apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rfprune.model import batch as batch_module
from rfprune.model.batch import split_batch

Tiny = Callable[..., Any]


@pytest.mark.parametrize(("most", "sizes"), [(1, [1] * 5), (2.5, [2, 2, 1]), (4, [3, 2]), (5, [5])])
def test_batches_of_language_models_are_cut(
    most: float, sizes: list[int], tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", "causal-lm")
    monkeypatch.setattr(batch_module, "MAX_LOGITS", int(most * 7 * model.config.vocab_size))
    ids = torch.arange(35).view(5, 7) % model.config.vocab_size
    batch = {"input_ids": ids, "attention_mask": ids % 3}
    parts = split_batch(model, batch)
    assert [len(part["input_ids"]) for part in parts] == sizes
    for name, values in batch.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), values)


def test_others_have_few_logits(tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_module, "MAX_LOGITS", 1)
    batch = {"input_ids": torch.ones(5, 7, dtype=torch.long)}
    assert split_batch(tiny_model("bert"), batch) == [batch]
