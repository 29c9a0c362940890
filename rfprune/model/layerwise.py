"""Run a model one layer or one block at a time, and watch what enters and leaves out-projections.

Hidden states are kept without padding, (tokens, d) a batch, so that a pass over the layers needs
memory for the real tokens alone. The keyword arguments of a layer (attention mask, position bias)
are not kept: they come from the model itself, which is run up to its first layer again.

Of an encoder-decoder the two stacks are run one after the other; see
`rfprune.model.encoder_decoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from rfprune.families.schema import LINEAR_MAPS
from rfprune.model.batch import TOKEN_MASK, Batch, model_inputs
from rfprune.model.layout import Block, Layout


class _Stop(Exception):
    """Ends a forward pass once everything that was asked for has been seen."""


@dataclass(frozen=True)
class LayerCall:
    """What a layer is called with, the hidden states apart."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Calls = Mapping[str, LayerCall]
"""What each layer of a model is called with on a batch, by the layer's path."""


@dataclass(frozen=True)
class Trace:
    """One sublayer at work on a batch.

    Attributes:
        features: (B, S, U * width), what enters the consumer; None where the block has no units
            left.
        output: (B, S, d), what the sublayer adds to the residual: what leaves the consumer, scaled
            where the family scales it.
        total: (B, S, d), output plus residual.
    """

    features: Tensor | None
    output: Tensor
    total: Tensor


def add_image_token_mask(model: PreTrainedModel, layout: Layout, batch: Batch) -> Batch:
    """The batch, and for images which of their tokens are real: all.

    How many tokens an image becomes, only the model knows; it is run up to its first layer.
    """
    if TOKEN_MASK in batch or "pixel_values" not in batch or "input_ids" in batch:
        return batch
    with torch.no_grad():
        there = {name: values.to(model.device) for name, values in batch.items()}
        hidden, _ = layer_calls(model, layout, there)
    where = batch["pixel_values"].device
    return {**batch, TOKEN_MASK: torch.ones(hidden.shape[:2], dtype=torch.bool, device=where)}


def layer_calls(
    model: nn.Module,
    layout: Layout,
    batch: Batch,
    *,
    decoder_inputs: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Calls]:
    """The hidden states (B, S, d) that enter the first layer, and what each layer is called with;
    of an encoder-decoder those of the encoder, or, given its `decoder_inputs` (see
    `rfprune.model.encoder_decoder.inputs_with_encoder_output`), those of the decoder.

    Layers may differ in their attention mask and in their positions. None of them is run: each
    passes on what it gets, and the position bias where the first one makes that of all. Caches of
    keys and values are left out.
    """
    hidden: list[Tensor] = []
    calls: dict[str, LayerCall] = {}
    handed_on: list[Tensor | None] = []
    paths = [layout.layers[i] for i in layout.layer_indices(decoder=decoder_inputs is not None)]

    def stand_in(path: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            states: Tensor = args[0] if args else kwargs.pop("hidden_states")
            hidden.append(states)
            named = {name: _no_cache(value) for name, value in kwargs.items()}
            calls[path] = LayerCall(tuple(_no_cache(value) for value in args[1:]), named)
            if path == paths[-1]:
                raise _Stop
            if layout.layer_output_length is None:
                return states
            if path == paths[0]:
                handed_on.append(_first_bias(model.get_submodule(path), states.shape[1]))
            return (states, *handed_on, *[None] * (layout.layer_output_length - 2))[
                : layout.layer_output_length
            ]

        return forward

    with ExitStack() as stack, suppress(_Stop):
        for path in paths:
            stack.enter_context(_forward_replaced(model, path, stand_in(path)))
        model(**(decoder_inputs or model_inputs(batch)))
    return hidden[0], calls


def _first_bias(layer: nn.Module, num_tokens: int) -> Tensor | None:
    """The position bias (1, H, S, S) of a layer that makes that of all layers; else None."""
    for module in layer.modules():
        if getattr(module, "has_relative_attention_bias", False):
            bias: Tensor = module.compute_bias(num_tokens, num_tokens)  # type: ignore[operator]
            return bias
    return None


def _no_cache(value: Any) -> Any:
    return None if isinstance(value, Cache) else value


def run_layer(
    model: nn.Module,
    layer: str,
    hidden: Tensor,
    calls: Calls,
    *,
    done: Sequence[Block] = (),
) -> Tensor:
    """The output (B, S, d) of one layer.

    Args:
        hidden: (B, S, d), what enters the layer; if there are `done` blocks, the last one's total.
        done: blocks of this layer, from its first on, that are not to be run again.
    """
    with _skipped(model, done, hidden):
        return _output_of(model, layer, hidden, calls)


def _output_of(model: nn.Module, layer: str, hidden: Tensor, calls: Calls) -> Tensor:
    output = model.get_submodule(layer)(hidden, *calls[layer].args, **calls[layer].kwargs)
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def trace_block(
    model: nn.Module,
    layer: str,
    hidden: Tensor,
    calls: Calls,
    block: Block,
    *,
    done: Sequence[Block] = (),
) -> Trace:
    """Run a layer as far as the residual sum of `block`; see `run_layer`."""
    with _skipped(model, done, hidden), _watched(model, block) as seen, suppress(_Stop):
        seen["total"] = _output_of(model, layer, hidden, calls)
    scale = layer_scale(model, block)
    output = seen["output"] if scale is None else scale * seen["output"]
    return Trace(seen.get("features"), output.view(hidden.shape), seen["total"].view(hidden.shape))


def layer_scale(model: nn.Module, block: Block) -> Tensor | None:
    """What multiplies what leaves the consumer before the residual is added, (d,)."""
    if block.sublayer.layer_scale is None:
        return None
    parent, _, name = block.sublayer.layer_scale.rpartition(".")
    scale = getattr(model.get_submodule(parent), name)
    return scale if isinstance(scale, Tensor) else None  # BEiT has 1.0 where it does not scale


def block_input(
    model: nn.Module,
    layer: str,
    hidden: Tensor,
    calls: Calls,
    block: Block,
    *,
    done: Sequence[Block] = (),
) -> Tensor:
    """What the producers of `block` read (B, S, d); nothing is run beyond; see `run_layer`."""
    with _skipped(model, done, hidden):
        return _what_enters(
            model.get_submodule(block.input_projections[0]),
            lambda: _output_of(model, layer, hidden, calls),
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
    """Compute nothing in the blocks `done`; `total` (B, S, d) comes after the last one.

    Where norms come first, the layer is given the total, to which the blocks add zeros. Where they
    come after, it goes into the last block's norm.
    """
    with ExitStack() as stack:
        for block in done:
            inside = block.consumer.startswith(block.sublayer.module + ".")
            output = total.new_zeros(1) if block.pre_norm else total
            # masks of the consumer may multiply what enters it
            features = output if inside else total.new_zeros(1, 1, 1)
            if block.sublayer.includes_residual:
                features = model.get_submodule(block.sublayer.next_norm or "")(total)
            inner = (
                (features, *[None] * block.sublayer.num_extra_outputs)
                if block.sublayer.num_extra_outputs
                else features
            )
            stack.enter_context(_returning(model, block.sublayer.module, inner))
            stack.enter_context(_returning(model, block.consumer, output))
        if done and not done[-1].pre_norm:
            residual_sum = model.get_submodule(done[-1].sublayer.next_norm or "")
            handle = residual_sum.register_forward_pre_hook(lambda *_: (total,))
            stack.callback(handle.remove)
        yield


def _returning(model: nn.Module, path: str, value: Any) -> AbstractContextManager[None]:
    """Have a module return a value instead of computing anything."""
    return _forward_replaced(model, path, lambda *_, **__: value)


@contextmanager
def _forward_replaced(model: nn.Module, path: str, forward: Callable[..., Any]) -> Iterator[None]:
    module: Any = model.get_submodule(path)
    own = vars(module).get("forward")  # where a library has wrapped it
    module.forward = forward
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
        if isinstance(module, LINEAR_MAPS):  # else no unit is left, and what enters means nothing
            seen["features"] = inputs[0]
        seen["output"] = output

    def before_sum(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen["total"] = inputs[0]
        raise _Stop

    with ExitStack() as stack:
        consumer = model.get_submodule(block.consumer)
        stack.callback(consumer.register_forward_hook(after_consumer).remove)
        if block.sublayer.next_norm is not None:
            residual_sum = model.get_submodule(block.sublayer.next_norm)
            stack.callback(residual_sum.register_forward_pre_hook(before_sum).remove)
        yield seen
