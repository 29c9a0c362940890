"""Layers that run one at a time compute what the whole model computes.

Without these tests reconstruction could fit wrong targets (padding, residuals, order) unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from rfprune.errors import UserError
from rfprune.model.batch import pack, token_mask
from rfprune.model.compact import compact
from rfprune.model.layerwise import (
    add_signal_token_mask,
    layer_calls,
    layer_scale,
    run_layer,
    trace_block,
)
from rfprune.model.layout import Block, layout_of
from rfprune.model.masks import full_masks, masked
from rfprune.model.validation import check_layer_outputs
from tests.conftest import ALL_TYPES

Tiny = Callable[..., Any]


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "llama"])
def test_running_a_decoder_layer_fills_no_cache(
    model_type: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model, batch = tiny_model(model_type, "causal-lm"), tiny_batch(padding="none")
    assert model.config.use_cache
    layout = layout_of(model)
    hidden, calls = layer_calls(model, layout, batch)
    with torch.no_grad():
        once, twice = (run_layer(model, layout.layers[0], hidden, calls) for _ in range(2))
    assert torch.equal(once, twice)


def test_nothing_runs_inside_the_layers(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    model = tiny_model()
    layout = layout_of(model)
    ran: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    hidden, calls = layer_calls(model, layout, tiny_batch())
    assert hidden.shape == (4, 7, 16)
    assert list(calls) == list(layout.layers)
    assert "bert.embeddings" in ran
    assert not [name for name in ran if name.startswith(("bert.encoder.layer.0.", "bert.pooler"))]
    assert all("forward" not in vars(module) for module in model.modules())
    with pytest.raises(IndexError):
        layer_calls(model, layout, {"input_ids": torch.full((1, 2), 10**6)})
    assert all("forward" not in vars(module) for module in model.modules()), "also after an error"


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_a_trace_is_consistent_with_the_block(
    model_type: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model, batch = tiny_model(model_type), tiny_batch(model_type=model_type)
    layout = layout_of(model)
    with torch.no_grad():
        model(**batch)  # some models keep hooks of transformers' own
        own = [len(module._forward_hooks) for module in model.modules()]
        hidden, calls = layer_calls(model, layout, batch)
        path, blocks = layout.layers[0], layout.blocks_of_layer(0)
        heads, neurons = (trace_block(model, path, hidden, calls, block) for block in blocks)
        for block, trace in zip(blocks, (heads, neurons), strict=True):
            assert trace.features is not None
            assert trace.features.shape[-1] == block.num_units * block.unit_width
            output = model.get_submodule(block.consumer)(trace.features)
            scale = layer_scale(model, block)
            scaled = model_type.startswith(
                ("beit", "dinov2", "granite", "gemma2", "gemma3", "olmo")
            )
            assert (scale is not None) == scaled
            norm = block.sublayer.output_norm
            if norm is not None:
                output = model.get_submodule(norm)(output)
            elif scale is not None:
                output = scale * output
            assert torch.equal(output.view(hidden.shape), trace.output)
        close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
        close(heads.residual_sum - heads.output, hidden)  # the residual of attention
        close(
            neurons.residual_sum - neurons.output, after_norm(model, blocks[0], heads.residual_sum)
        )
        after = after_norm(model, blocks[1], neurons.residual_sum)
        close(after, run_layer(model, path, hidden, calls))
    assert [len(module._forward_hooks) for module in model.modules()] == own


def after_norm(model: Any, block: Block, total: torch.Tensor) -> torch.Tensor:
    """What the next block gets of a residual sum."""
    norm = None if block.pre_norm else model.get_submodule(block.sublayer.next_norm)
    return total if norm is None else norm(total)


def note_run(ran: list[str], kind: str, module: nn.Module, *_: Any) -> None:
    if "forward" not in vars(module):  # else it is replaced
        ran.append(kind)


@pytest.mark.parametrize("emptied", [False, True])
@pytest.mark.parametrize("model_type", [each for each in ALL_TYPES if each != "gpt_neox"])
def test_a_layer_goes_on_after_the_blocks_that_are_skipped(
    model_type: str, emptied: bool, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    """From the residual sum of any block, without running the block again.

    The FFN of GPT-NeoX does not depend on that sum.
    """
    model, batch = tiny_model(model_type), tiny_batch(model_type=model_type)
    layout = layout_of(model)
    if emptied:
        masks = full_masks(layout)
        masks[0][:] = 0
        model = compact(model, layout, masks)
    path, (heads, neurons) = layout.layers[0], layout.blocks_of_layer(0)
    ran: list[str] = []
    with torch.no_grad():
        hidden, calls = layer_calls(model, layout, batch)
        between = trace_block(model, path, hidden, calls, heads).residual_sum
        expected = trace_block(model, path, hidden, calls, neurons)
        output = run_layer(model, path, hidden, calls)
        for block in (heads, neurons):
            for producer in block.producers if not emptied or block is neurons else ():
                module = model.get_submodule(producer.path)
                note = partial(note_run, ran, block.kind)
                module.register_forward_hook(note)
        found = trace_block(model, path, between, calls, neurons, skip=[heads])
        assert ran == ["neuron"] * len(neurons.producers)
        assert torch.equal(found.residual_sum, expected.residual_sum)
        assert torch.equal(found.output, expected.output)
        assert torch.equal(run_layer(model, path, between, calls, skip=[heads]), output)
        ran.clear()
        end = run_layer(model, path, expected.residual_sum, calls, skip=[heads, neurons])
        assert torch.equal(end, output)
        assert ran == []
        if not emptied or model.get_submodule(heads.consumer).bias is not None:
            assert not torch.equal(run_layer(model, path, hidden, calls, skip=[heads]), output)
    assert all("forward" not in vars(module) for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.get_submodule(path).children())


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet", "gpt2", "opt", "llama"])
def test_masks_on_skipped_blocks_do_no_harm(
    model_type: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model, batch = tiny_model(model_type), tiny_batch()
    layout = layout_of(model)
    path, blocks = layout.layers[0], layout.blocks_of_layer(0)
    masks = full_masks(layout)
    masks[0][0], masks[1][:4] = 0, 0.5
    with torch.no_grad():
        hidden, calls = layer_calls(model, layout, batch)
        plain = run_layer(model, path, hidden, calls)
        with masked(model, layout, masks):
            output = run_layer(model, path, hidden, calls)
            total = trace_block(model, path, hidden, calls, blocks[1]).residual_sum
            assert torch.equal(run_layer(model, path, total, calls, skip=blocks), output)
    assert (output - plain).abs().max() > 0.1


def test_a_forward_that_another_library_has_wrapped_stays_wrapped(
    tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    """As accelerate does; our own replacement must go away, also after an error."""
    model = tiny_model()
    layout = layout_of(model)
    heads, neurons = layout.blocks_of_layer(0)
    consumer = model.get_submodule(heads.consumer)
    plain = consumer.forward
    consumer.forward = wrapped = lambda features: plain(features)
    hidden, calls = layer_calls(model, layout, tiny_batch())
    run_layer(model, layout.layers[0], hidden, calls, skip=[heads, neurons])
    assert consumer.forward is wrapped
    with pytest.raises(RuntimeError):
        run_layer(model, layout.layers[0], hidden[..., :3], calls, skip=[heads])
    assert consumer.forward is wrapped
    assert "forward" not in vars(model.get_submodule(heads.sublayer.module))


def test_a_trace_runs_no_further_than_its_block(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    model = tiny_model()
    layout = layout_of(model)
    hidden, calls = layer_calls(model, layout, tiny_batch())
    ran: list[str] = []
    ffn: nn.Module = model.bert.encoder.layer[0].intermediate
    ffn.register_forward_hook(lambda *_: ran.append("ffn"))
    heads, neurons = layout.blocks_of_layer(0)
    trace_block(model, layout.layers[0], hidden, calls, heads)
    assert ran == []
    trace_block(model, layout.layers[0], hidden, calls, neurons)
    assert ran == ["ffn"]


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_layers_beyond_the_second_are_called_as_in_a_full_pass(
    model_type: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    """With two layers a stand-in that returns the wrong kind of value goes unnoticed."""
    model, batch = tiny_model(model_type, num_hidden_layers=6), tiny_batch(model_type=model_type)
    layout = layout_of(model)
    order = layout.execution_order or layout.layer_indices()
    last = layout.layers[layout.layer_indices()[-1]]
    leaving: list[Any] = []
    handle = model.get_submodule(last).register_forward_hook(lambda *args: leaving.append(args[2]))
    with torch.no_grad():
        model(**batch)
        handle.remove()
        batch = add_signal_token_mask(model, layout, batch)
        hidden, calls = layer_calls(model, layout, batch)
        for number in order:
            hidden = run_layer(model, layout.layers[number], hidden, calls)
    assert len(layout.layer_indices()) == 6
    expected = leaving[-1][0] if isinstance(leaving[-1], tuple) else leaving[-1]
    tokens = token_mask(batch)
    torch.testing.assert_close(pack(hidden, tokens), pack(expected, tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", [None, 3])
def test_a_row_with_a_wrong_layer_output_length_is_refused(
    wrong: int | None, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model, batch = tiny_model("mpnet", num_hidden_layers=6), tiny_batch(model_type="mpnet")
    layout = layout_of(model)
    check_layer_outputs(model, layout, batch)
    with pytest.raises(
        UserError, match=r"return a tuple of 1, .* says a t.*; correct `layer_output_length`"
    ):
        check_layer_outputs(model, replace(layout, layer_output_length=wrong), batch)
