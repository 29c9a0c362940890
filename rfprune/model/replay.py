"""Run a model one layer at a time, and watch what enters and leaves the out-projections.

Hidden states are kept without padding, (tokens, d) a batch, so that a pass over the layers needs
memory for the real tokens alone. The keyword arguments of a layer (attention mask, position bias)
are not kept: they come from the model itself, which is run up to its first layer again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rfprune.model.layout import Block, Layout

Batch = Mapping[str, Tensor]


class _Stop(Exception):
    """Ends a forward pass once everything that was asked for has been seen."""


@dataclass(frozen=True)
class LayerCall:
    """What the first layer of a model is called with, the hidden states apart."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Trace:
    """One sublayer at work on a batch.

    Attributes:
        features: (B, S, U * width), what enters the consumer; None where the block has no units
            left.
        output: (B, S, d), what leaves the consumer.
        total: (B, S, d), output plus residual.
    """

    features: Tensor | None
    output: Tensor
    total: Tensor


def token_mask(batch: Batch) -> Tensor:
    """(B, S) booleans: true where there is a token, false where there is padding."""
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    return torch.ones(batch["input_ids"].shape, dtype=torch.bool, device=batch["input_ids"].device)


def pack(hidden: Tensor, tokens: Tensor) -> Tensor:
    """(B, S, d) -> (tokens, d): padding left out."""
    return hidden[tokens]


def unpack(packed: Tensor, tokens: Tensor) -> Tensor:
    """(tokens, d) -> (B, S, d): zeros at padding, which no real token attends to."""
    hidden = packed.new_zeros(*tokens.shape, packed.shape[-1])
    hidden[tokens] = packed
    return hidden


def first_layer_call(model: nn.Module, layout: Layout, batch: Batch) -> tuple[Tensor, LayerCall]:
    """The hidden states (B, S, d) that enter the first layer, and what else it is called with."""
    seen: list[tuple[Tensor, LayerCall]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            seen.append((args[0], LayerCall(args[1:], kwargs)))
        else:
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            seen.append((kwargs["hidden_states"], LayerCall((), rest)))
        raise _Stop

    layer = model.get_submodule(layout.layers[0])
    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model(**batch)
    except _Stop:
        pass
    finally:
        handle.remove()
    return seen[0]


def run_layer(
    model: nn.Module,
    layer: str,
    hidden: Tensor,
    call: LayerCall,
    trace: Sequence[Block] = (),
    *,
    stop: bool = False,
) -> tuple[Tensor | None, list[Trace]]:
    """Run one layer on hidden states (B, S, d).

    Args:
        trace: blocks of this layer to watch, by their consumers and residual sums.
        stop: end the pass once the last of them has been seen; the layer's output is then None.

    Returns:
        The layer's output (B, S, d) and a trace per watched block.
    """
    watchers = [_Watcher(model, block) for block in trace]
    with ExitStack() as stack:
        for i, watcher in enumerate(watchers):
            last = stop and i == len(watchers) - 1
            for remove in watcher.attach(last):
                stack.callback(remove)
        try:
            output = model.get_submodule(layer)(hidden, *call.args, **call.kwargs)
        except _Stop:
            output = None
    if isinstance(output, tuple):
        output = output[0]
    return output, [watcher.trace() for watcher in watchers]


class _Watcher:
    """The hooks on one block's consumer and residual sum, and what they saw."""

    def __init__(self, model: nn.Module, block: Block) -> None:
        self.consumer = model.get_submodule(block.consumer)
        self.residual_sum = model.get_submodule(block.residual_sum)
        self.seen: dict[str, Tensor] = {}

    def attach(self, stop: bool) -> list[Callable[[], None]]:
        def after_consumer(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if hasattr(module, "in_features"):
                self.seen["features"] = inputs[0]
            self.seen["output"] = output

        def before_sum(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.seen["total"] = inputs[0]
            if stop:
                raise _Stop

        return [
            self.consumer.register_forward_hook(after_consumer).remove,
            self.residual_sum.register_forward_pre_hook(before_sum).remove,
        ]

    def trace(self) -> Trace:
        return Trace(self.seen.get("features"), self.seen["output"], self.seen["total"])
