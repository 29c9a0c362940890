"""Calibration batches that cannot represent a model's data are noticed, and others are not.

Without this a model fitted to one text, or to nothing but cut texts, passes for a good one.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rfprune import Constraint, prune
from rfprune.methods.sample import sample_warnings
from rfprune.model.layout import layout_of
from tests.conftest import make_tiny_model

Batch = dict[str, torch.Tensor]
POSITIONS = 40


def batches(number: int = 8, length: int = 9, *, same: int = 1, padded: int = 0) -> list[Batch]:
    """Batches of two examples; `same` of them in a row are equal but for their padding."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(number // 2):
        if index % same == 0:
            tokens = torch.randint(6, 20, (2, length), generator=generator)
        mask = torch.ones(2, length + padded * (index % same), dtype=torch.int64)
        mask[:, length:] = 0
        full = torch.zeros_like(mask)
        full[:, :length] = tokens
        made.append({"input_ids": full, "attention_mask": mask})
    return made


def warnings_of(data: list[Batch], **config: Any) -> list[str]:
    model = make_tiny_model(max_position_embeddings=POSITIONS, **config)
    return sample_warnings(model, layout_of(model), data)


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ([{"input_ids": torch.randint(6, 20, (1, 30))}], ["1 calibration example", "hundreds"]),
        (batches(16, same=4), ["4 of the 16", "different"]),
        (batches(16, same=4, padded=3), ["4 of the 16", "different"]),
        (batches(length=POSITIONS), [f"All 8 .* {POSITIONS} positions", "truncated"]),
        (batches(2, 4), ["8 tokens", "neurons", "more examples"]),
    ],
)
def test_no_sample_is_a_warning_with_the_figure(data: list[Batch], parts: list[str]) -> None:
    import re

    (warning,) = warnings_of(data)
    assert all(re.search(part, warning) for part in parts), warning


@pytest.mark.parametrize(
    "data", [batches(), batches(same=1, padded=2), batches(length=POSITIONS - 3)]
)
def test_a_sample_is_none(data: list[Batch]) -> None:
    assert warnings_of(data) == []


def test_blocks_of_a_language_model_may_fill_its_positions() -> None:
    data = batches(length=POSITIONS)
    assert warnings_of(data, model_type="gpt2", head="causal-lm", n_positions=POSITIONS) == []


def test_images_are_compared_by_their_pixels(tiny_model: Callable[..., Any]) -> None:
    from rfprune.methods.problem import prepare_problem
    from rfprune.settings import Settings

    model = tiny_model("vit")
    size = model.config.image_size
    different = [{"pixel_values": torch.randn(2, 3, size, size)} for _ in range(3)]
    assert prepare_problem(model, different, Settings()).warnings == ()
    (warning,) = prepare_problem(model, [different[0]] * 3, Settings()).warnings
    assert "2 of the 6" in warning


def test_prune_returns_the_warnings(tiny_model: Callable[..., Any]) -> None:
    (found, *_) = prune(tiny_model("bert"), batches(2, 4), Constraint("mac", 0.5)).warnings
    assert "8 tokens" in found
