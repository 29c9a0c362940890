"""Running a model layer by layer: what is captured is what the model computes.

Deleting this lets reconstruction fit wrong targets (padding, residuals, order) unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rfprune.errors import UserError
from rfprune.model.architectures import ARCHITECTURES
from rfprune.model.compact import compact
from rfprune.model.layout import layout_of
from rfprune.model.masks import full_masks, masked
from rfprune.model.replay import (
    first_tokens,
    layer_calls,
    pack,
    run_layer,
    token_mask,
    trace_block,
    unpack,
)

Tiny = Callable[..., Any]


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_packing_loses_nothing_but_padding(rows: list[list[bool]]) -> None:
    tokens = torch.tensor(rows)
    hidden = torch.randn(*tokens.shape, 3)
    packed = pack(hidden, tokens)
    assert packed.shape == (int(tokens.sum()), 3)
    restored = unpack(packed, tokens)
    assert torch.equal(restored, hidden * tokens[:, :, None])


def test_tokens_are_what_the_attention_mask_says(tiny_batch: Tiny) -> None:
    batch = tiny_batch(padding="left")
    assert torch.equal(token_mask(batch).long(), batch["attention_mask"])
    assert not token_mask(batch).all()


def test_without_an_attention_mask_all_are_tokens() -> None:
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert token_mask({"input_ids": ids}).tolist() == [[True] * 3] * 2
    assert token_mask({"inputs_embeds": torch.zeros(2, 3, 16)}).shape == (2, 3)


def test_a_batch_that_cannot_be_read_is_named() -> None:
    with pytest.raises(UserError, match="a batch holds labels, but"):
        token_mask({"labels": torch.zeros(2)})
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(UserError, match=r"shape \(2, 1, 3, 3\) does not fit \(2, 3\)"):
        token_mask({"input_ids": ids, "attention_mask": torch.zeros(2, 1, 3, 3)})


def test_the_first_token_is_found_behind_padding() -> None:
    tokens = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 0], [0, 0, 1]]).bool()
    assert first_tokens(tokens).nonzero().tolist() == [[0, 0], [1, 1], [2, 0], [3, 2]]


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


def test_no_hook_stays_when_the_model_fails(tiny_model: Tiny) -> None:
    model = tiny_model()
    layout = layout_of(model)
    with pytest.raises(IndexError):
        layer_calls(model, layout, {"input_ids": torch.full((1, 2), 10**6)})
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_a_trace_is_consistent_with_the_block(
    model_type: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model, batch = tiny_model(model_type), tiny_batch()
    layout = layout_of(model)
    with torch.no_grad():
        hidden, call = layer_calls(model, layout, batch)
        path, blocks = layout.layers[0], layout.blocks_of_layer(0)
        heads, neurons = (trace_block(model, path, hidden, call, block) for block in blocks)
        for block, trace in zip(blocks, (heads, neurons), strict=True):
            assert trace.features is not None
            assert trace.features.shape[-1] == block.num_units * block.unit_width
            consumer = model.get_submodule(block.consumer)
            assert torch.equal(consumer(trace.features), trace.output)
        torch.testing.assert_close(heads.total - heads.output, hidden)  # the residual of attention
        between = model.get_submodule(blocks[0].residual_sum)(heads.total)
        torch.testing.assert_close(neurons.total - neurons.output, between)
        after = model.get_submodule(blocks[1].residual_sum)(neurons.total)
        torch.testing.assert_close(after, run_layer(model, path, hidden, call))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("emptied", [False, True])
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_a_layer_goes_on_after_what_is_done(
    model_type: str, emptied: bool, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    """From any block's total, whatever else the layer is given, and without running it again."""
    model, batch = tiny_model(model_type), tiny_batch()
    layout = layout_of(model)
    if emptied:
        masks = full_masks(layout)
        masks[0][:] = 0
        model = compact(model, layout, masks)
    path, (heads, neurons) = layout.layers[0], layout.blocks_of_layer(0)
    ran: list[str] = []
    with torch.no_grad():
        hidden, call = layer_calls(model, layout, batch)
        between = trace_block(model, path, hidden, call, heads).total
        expected = trace_block(model, path, hidden, call, neurons)
        output = run_layer(model, path, hidden, call)
        for block in (heads, neurons):
            for producer in block.producers if not emptied or block is neurons else ():
                module = model.get_submodule(producer.path)
                module.register_forward_hook(lambda *_, name=block.kind: ran.append(name))
        found = trace_block(model, path, between, call, neurons, done=[heads])
        assert ran == ["neuron"]
        assert torch.equal(found.total, expected.total)
        assert torch.equal(found.output, expected.output)
        assert torch.equal(run_layer(model, path, between, call, done=[heads]), output)
        ran.clear()
        end = run_layer(model, path, expected.total, call, done=[heads, neurons])
        assert torch.equal(end, output)
        assert ran == []
        assert not torch.equal(run_layer(model, path, hidden, call, done=[heads]), output)
    assert all("forward" not in vars(module) for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.get_submodule(path).children())


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet"])
def test_masks_of_what_is_done_do_no_harm(
    model_type: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model, batch = tiny_model(model_type), tiny_batch()
    layout = layout_of(model)
    path, blocks = layout.layers[0], layout.blocks_of_layer(0)
    masks = full_masks(layout)
    masks[0][0], masks[1][:4] = 0, 0.5
    with torch.no_grad():
        hidden, call = layer_calls(model, layout, batch)
        plain = run_layer(model, path, hidden, call)
        with masked(model, layout, masks):
            output = run_layer(model, path, hidden, call)
            total = trace_block(model, path, hidden, call, blocks[1]).total
            assert torch.equal(run_layer(model, path, total, call, done=blocks), output)
    assert (output - plain).abs().max() > 0.1


def test_what_others_have_wrapped_stays_wrapped(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    """Libraries replace a module's forward too; ours must go away, also after an error."""
    model = tiny_model()
    layout = layout_of(model)
    heads, neurons = layout.blocks_of_layer(0)
    consumer = model.get_submodule(heads.consumer)
    plain = consumer.forward
    consumer.forward = wrapped = lambda features: plain(features)
    hidden, call = layer_calls(model, layout, tiny_batch())
    run_layer(model, layout.layers[0], hidden, call, done=[heads, neurons])
    assert consumer.forward is wrapped
    with pytest.raises(RuntimeError):
        run_layer(model, layout.layers[0], hidden[..., :3], call, done=[heads])
    assert consumer.forward is wrapped
    assert "forward" not in vars(model.get_submodule(heads.inner))


def test_a_traced_pass_goes_no_further_than_its_block(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    model = tiny_model()
    layout = layout_of(model)
    hidden, call = layer_calls(model, layout, tiny_batch())
    ran: list[str] = []
    ffn: nn.Module = model.bert.encoder.layer[0].intermediate
    ffn.register_forward_hook(lambda *_: ran.append("ffn"))
    heads, neurons = layout.blocks_of_layer(0)
    trace_block(model, layout.layers[0], hidden, call, heads)
    assert ran == []
    trace_block(model, layout.layers[0], hidden, call, neurons)
    assert ran == ["ffn"]
