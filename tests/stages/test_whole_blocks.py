"""The error without a block, against models in which the block returns nothing.

Without these tests a norm of the output could hide what the removal of an attention costs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rfprune.model.frozen import frozen
from rfprune.model.layout import layout_of
from rfprune.pruning import prune
from rfprune.settings import Settings
from rfprune.stages.objective import divergences
from rfprune.stages.whole_blocks import errors_without


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "olmo2"])
def test_errors_are_those_of_models_in_which_the_block_returns_zeros(
    model_type: str, tiny_model: Any, tiny_batch: Any
) -> None:
    model, batch = tiny_model(model_type), tiny_batch(3, 6)
    layout = layout_of(model)
    with frozen(model), torch.no_grad():
        found = errors_without(model, layout, range(len(layout.blocks)), [batch])
        before = model(**batch)
        for block, error in zip(layout.blocks, found, strict=True):
            consumer = model.get_submodule(block.consumer)
            handle = consumer.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
            after = model(**batch)
            handle.remove()
            expected = float(divergences(before, after, batch, model.config).mean())
            assert error == pytest.approx(expected, rel=1e-4)
            assert error > 1e-3


def test_with_a_loss_of_the_user_it_is_the_increase_of_that_loss(
    tiny_model: Any, tiny_batch: Any
) -> None:
    model, batch = tiny_model("gemma2"), tiny_batch(3, 6)
    layout = layout_of(model)

    def loss(outputs: Any, _: Any) -> Any:
        return outputs.logits.square().mean(1)

    with frozen(model), torch.no_grad():
        (error,) = errors_without(model, layout, [0], [batch], loss)
        before = loss(model(**batch), batch).mean()
        consumer = model.get_submodule(layout.blocks[0].consumer)
        consumer.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
        after = loss(model(**batch), batch).mean()
    assert abs(float(after - before)) > 1e-3
    assert error == pytest.approx(float(after - before), rel=1e-3)


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_the_curve_of_an_attention_whose_output_passes_a_norm_ends_at_the_measured_error(
    model_type: str, tiny_model: Any, tiny_batch: Any
) -> None:
    model, batch = tiny_model(model_type), tiny_batch(3, 6)
    layout = layout_of(model)
    result = prune(model, [batch], 0.9, Settings(round_to=1))
    with frozen(model), torch.no_grad():
        measured = errors_without(model, layout, range(len(layout.blocks)), [batch])
    assert result.curves is not None
    ends = [float(curve.errors[0]) for curve in result.curves]
    higher = 0
    for block, end, error in zip(layout.blocks, ends, measured, strict=True):
        if block.kind == "head":
            assert end >= error * (1 - 1e-4)
            higher += end == pytest.approx(error, rel=1e-4)
    assert higher, "no curve was corrected"
