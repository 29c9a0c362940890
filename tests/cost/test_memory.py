"""Bytes by the formula are those of real compact models.

Deleting this lets a memory budget be missed by the models that are made for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rfprune.cost.memory import memory_costs, total_bytes
from rfprune.cost.params import total_params
from rfprune.model.compact import compact
from rfprune.model.layout import layout_of
from rfprune.model.masks import full_masks, num_kept

Tiny = Callable[..., Any]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_bytes_are_those_of_a_compact_model(
    model_type: str, dtype: torch.dtype, tiny_model: Tiny
) -> None:
    model = tiny_model(model_type).to(dtype)
    layout = layout_of(model)
    masks = full_masks(layout)
    masks[0][1:], masks[1][3:], masks[2][:1] = 0, 0, 0
    small = compact(model, layout, masks)
    costs = memory_costs(model, layout)
    assert costs.original == total_bytes(model) == dtype.itemsize * total_params(model)
    assert costs.total(num_kept(masks)) == total_bytes(small) < total_bytes(model)


@pytest.mark.parametrize("model_type", ["t5", "mt5"])
def test_weights_may_be_of_several_precisions(model_type: str, tiny_model: Tiny) -> None:
    """T5 keeps the FFNs' out-projections in float32 where all else is in float16."""
    model = tiny_model(model_type, "seq2seq-lm").half()
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.float()
    layout = layout_of(model)
    masks = full_masks(layout)
    masks[0][1:], masks[1][3:], masks[2][:1] = 0, 0, 0
    costs, small = memory_costs(model, layout), compact(model, layout, masks)
    assert 2 * total_params(model) < total_bytes(model) < 4 * total_params(model)
    assert costs.total(num_kept(masks)) == total_bytes(small) < total_bytes(model)


def test_shared_weights_count_once(tiny_model: Tiny) -> None:
    model = tiny_model()
    before = total_bytes(model)
    embeddings = model.base_model.embeddings.word_embeddings
    model.tied = torch.nn.Linear(16, len(embeddings.weight), bias=False)
    model.tied.weight = embeddings.weight
    assert total_bytes(model) == before
