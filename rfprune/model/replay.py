"""Run a model one layer at a time, and watch what enters and leaves the out-projections.

Hidden states are kept without padding, (tokens, d) a batch, so that a pass over the layers needs
memory for the real tokens alone. The keyword arguments of a layer (attention mask, position bias)
are not kept: they come from the model itself, which is run up to its first layer again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rfprune.errors import UserError
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
    """(B, S) booleans: true where there is a token, false where there is padding.

    Raises:
        UserError: the batch has no inputs, or an attention mask that does not say what padding is.
    """
    inputs = batch.get("input_ids", batch.get("inputs_embeds"))
    if inputs is None:
        raise UserError(
            f"a batch holds {', '.join(batch) or 'nothing'}, but a model needs input_ids (B, S)"
        )
    shape = inputs.shape[:2]
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=inputs.device)
    if mask.shape != shape:
        raise UserError(
            f"an attention_mask of shape {tuple(mask.shape)} does not fit {tuple(shape)} tokens; "
            "give one number per token: 1, or 0 for padding"
        )
    return mask.bool()


def first_tokens(tokens: Tensor) -> Tensor:
    """(B, S) booleans, true at the first token of every example, wherever the padding is."""
    return tokens & (tokens.cumsum(1) == 1)


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
        with suppress(_Stop):
            model(**batch)
    finally:
        handle.remove()
    return seen[0]


def run_layer(
    model: nn.Module,
    layer: str,
    hidden: Tensor,
    call: LayerCall,
    trace: Sequence[Block] = (),
) -> tuple[Tensor, list[Trace]]:
    """Run one layer on hidden states (B, S, d).

    Args:
        trace: blocks of this layer to watch at work.

    Returns:
        The layer's output (B, S, d) and a trace per watched block.
    """
    with ExitStack() as stack:
        seen = [stack.enter_context(_watched(model, block)) for block in trace]
        output = model.get_submodule(layer)(hidden, *call.args, **call.kwargs)
    if isinstance(output, tuple):
        output = output[0]
    return output, [_trace(one) for one in seen]


def trace_block(
    model: nn.Module, layer: str, hidden: Tensor, call: LayerCall, block: Block
) -> Trace:
    """Run a layer on hidden states (B, S, d) as far as `block`, and no further."""
    with _watched(model, block, stop=True) as seen, suppress(_Stop):
        model.get_submodule(layer)(hidden, *call.args, **call.kwargs)
    return _trace(seen)


@contextmanager
def _watched(model: nn.Module, block: Block, *, stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """Note what enters and leaves a block's consumer and its residual sum."""
    seen: dict[str, Tensor] = {}

    def after_consumer(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Linear):  # else no unit is left, and what enters means nothing
            seen["features"] = inputs[0]
        seen["output"] = output

    def before_sum(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen["total"] = inputs[0]
        if stop:
            raise _Stop

    with ExitStack() as stack:
        consumer = model.get_submodule(block.consumer)
        stack.callback(consumer.register_forward_hook(after_consumer).remove)
        residual_sum = model.get_submodule(block.residual_sum)
        stack.callback(residual_sum.register_forward_pre_hook(before_sum).remove)
        yield seen


def _trace(seen: Mapping[str, Tensor]) -> Trace:
    return Trace(seen.get("features"), seen["output"], seen["total"])
