"""Bytes by the formula are those of real compact models.

Without these tests, models could exceed their memory budget.
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


def as_transformers_loads_t5(model: Any) -> Any:
    """The output projections of the FFNs in float32, all else in float16."""
    model.half()
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.float()
    return model


@pytest.mark.parametrize(
    ("model_type", "convert", "bytes_per_param"),
    [
        ("bert", lambda model: model, (4, 4)),
        ("distilbert", lambda model: model.bfloat16(), (2, 2)),
        ("t5", as_transformers_loads_t5, (2.01, 3.99)),
        ("mt5", as_transformers_loads_t5, (2.01, 3.99)),
    ],
)
def test_bytes_are_those_of_a_compact_model(
    model_type: str,
    convert: Callable[[Any], Any],
    bytes_per_param: tuple[float, float],
    tiny_model: Tiny,
) -> None:
    model = convert(tiny_model(model_type))
    layout = layout_of(model)
    masks = full_masks(layout)
    masks[0][1:], masks[1][3:], masks[2][:1] = 0, 0, 0
    costs, small = memory_costs(model, layout), compact(model, layout, masks)
    low, high = bytes_per_param
    assert low * total_params(model) <= total_bytes(model) <= high * total_params(model)
    assert costs.original == total_bytes(model)
    assert costs.total(num_kept(masks)) == total_bytes(small) < total_bytes(model)


def test_shared_weights_count_once(tiny_model: Tiny) -> None:
    model = tiny_model()
    before = total_bytes(model)
    embeddings = model.base_model.embeddings.word_embeddings
    model.tied = torch.nn.Linear(16, len(embeddings.weight), bias=False)
    assert total_bytes(model) > before, "an untied one counts"
    model.tied.weight = embeddings.weight
    assert total_bytes(model) == before
