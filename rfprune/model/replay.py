"""Run a model one layer or one block at a time, and watch what enters and leaves out-projections.

Hidden states are kept without padding, (tokens, d) a batch, so that a pass over the layers needs
memory for the real tokens alone. The keyword arguments of a layer (attention mask, position bias)
are not kept: they come from the model itself, which is run up to its first layer again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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

    Choices (B, C, S) are the rows (B * C, S) that the model makes of them.

    Raises:
        UserError: the batch has no inputs, or an attention mask that does not say what padding is.
    """
    inputs = batch.get("input_ids", batch.get("inputs_embeds"))
    if inputs is None:
        raise UserError(
            f"a batch holds {', '.join(batch) or 'nothing'}, but a model needs input_ids (B, S)"
        )
    mask = batch.get("attention_mask")
    if inputs is batch.get("input_ids") and inputs.dim() == 3:
        inputs = inputs.flatten(0, 1)
        mask = mask.flatten(0, 1) if mask is not None and mask.dim() == 3 else mask
    shape = inputs.shape[:2]
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
    """(B, S, d) -> (tokens, d): padding left out, wherever accelerate has put the layer."""
    return hidden[tokens.to(hidden.device)]


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
    *,
    done: Sequence[Block] = (),
) -> Tensor:
    """The output (B, S, d) of one layer.

    Args:
        hidden: (B, S, d), what enters the layer; if there are `done` blocks, the last one's total.
        done: blocks of this layer, from its first on, that are not to be run again.
    """
    with _skipped(model, done, hidden):
        output = model.get_submodule(layer)(hidden, *call.args, **call.kwargs)
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def trace_block(
    model: nn.Module,
    layer: str,
    hidden: Tensor,
    call: LayerCall,
    block: Block,
    *,
    done: Sequence[Block] = (),
) -> Trace:
    """Run a layer as far as `block`, and no further; see `run_layer`."""
    with _skipped(model, done, hidden), _watched(model, block) as seen, suppress(_Stop):
        model.get_submodule(layer)(hidden, *call.args, **call.kwargs)
    return Trace(seen.get("features"), seen["output"], seen["total"])


def entering(
    model: nn.Module,
    layer: str,
    hidden: Tensor,
    call: LayerCall,
    block: Block,
    *,
    done: Sequence[Block] = (),
) -> Tensor:
    """What the producers of `block` read (B, S, d); nothing is run beyond; see `run_layer`."""
    with _skipped(model, done, hidden):
        return _what_enters(
            model.get_submodule(block.producers[0]),
            lambda: model.get_submodule(layer)(hidden, *call.args, **call.kwargs),
        )


def _what_enters(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    seen: list[Tensor] = []

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise _Stop

    handle = module.register_forward_pre_hook(hook)
    try:
        with suppress(_Stop):
            run()
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def _skipped(model: nn.Module, done: Sequence[Block], total: Tensor) -> Iterator[None]:
    """Compute nothing in the blocks `done`; `total` (B, S, d) comes after the last one."""
    with ExitStack() as stack:
        for block in done:
            inside = block.consumer.startswith(block.inner + ".")
            features = total if inside else total[:1, :1, :1]  # masks of the consumer may multiply
            inner = (features, None) if block.inner_returns_tuple else features
            stack.enter_context(_returning(model, block.inner, inner))
            stack.enter_context(_returning(model, block.consumer, total))
        if done:
            residual_sum = model.get_submodule(done[-1].residual_sum)
            handle = residual_sum.register_forward_pre_hook(lambda *_: (total,))
            stack.callback(handle.remove)
        yield


@contextmanager
def _returning(model: nn.Module, path: str, value: Any) -> Iterator[None]:
    """Have a module return a value instead of computing anything."""
    module: Any = model.get_submodule(path)
    own = vars(module).get("forward")  # where a library has wrapped it
    module.forward = lambda *_, **__: value
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def _watched(model: nn.Module, block: Block) -> Iterator[dict[str, Tensor]]:
    """Note what enters and leaves a block's consumer and its residual sum; stop there."""
    seen: dict[str, Tensor] = {}

    def after_consumer(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Linear):  # else no unit is left, and what enters means nothing
            seen["features"] = inputs[0]
        seen["output"] = output

    def before_sum(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen["total"] = inputs[0]
        raise _Stop

    with ExitStack() as stack:
        consumer = model.get_submodule(block.consumer)
        stack.callback(consumer.register_forward_hook(after_consumer).remove)
        residual_sum = model.get_submodule(block.residual_sum)
        stack.callback(residual_sum.register_forward_pre_hook(before_sum).remove)
        yield seen
