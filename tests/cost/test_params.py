"""Parameters by the formula are those of real compact models.

Without these tests, models could exceed their parameter budget.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rfprune.cost.params import param_costs, total_params
from rfprune.model.compact import compact
from rfprune.model.layout import layout_of
from rfprune.model.masks import full_masks, num_kept
from tests.conftest import ALL_TYPES

Tiny = Callable[..., Any]


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_costs_are_the_sizes_of_compact_models(model_type: str, tiny_model: Tiny) -> None:
    model = tiny_model(model_type, num_attention_heads=2)
    layout = layout_of(model)
    costs = param_costs(model, layout)
    assert costs.original == total_params(model)
    assert bool(costs.added_by_pruning) == (
        model_type in ("t5", "mt5")
    )  # tables of position biases
    generator = torch.Generator().manual_seed(0)
    sizes = set()
    for chance in (0.0, 0.3, 0.6, 1.0):
        masks = full_masks(layout)
        for mask in masks:
            mask[torch.rand(len(mask), generator=generator) < chance] = 0
        small = compact(model, layout, masks)
        assert total_params(small) == costs.total(num_kept(masks))
        again = param_costs(small, layout_of(small))
        assert again.original == total_params(small)
        sizes.add(total_params(small))
    assert len(sizes) == 4


def test_shared_parameters_count_once() -> None:
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    apart = total_params(nn.Sequential(first, second))
    second.weight = first.weight
    assert (apart, total_params(nn.Sequential(first, second))) == (18, 9)
