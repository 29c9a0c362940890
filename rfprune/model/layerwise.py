"""Run a model one layer or one block at a time, and record what its blocks compute.

Between calls hidden states are kept without padding (see `rfprune.model.batch.pack`), so that a
pass over the layers needs memory for the tokens alone. The other arguments of a layer (attention
mask, position bias) are not kept: `layer_calls` runs the model up to its first layer again.

The two stacks of an encoder-decoder run one after the other; see `rfprune.model.encoder_decoder`.
Shapes: `B` examples, `S` tokens, `d` hidden size, `U` units of a block.
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
from rfprune.model.batch import SIGNALS, TOKEN_MASK, Batch, model_inputs
from rfprune.model.layout import Block, Layout
from rfprune.model.linear import weight_of
from rfprune.model.residency import execution_device, resident


class _Stop(Exception):
    """Ends a forward pass that has gone far enough."""


@dataclass(frozen=True)
class ModuleCall:
    """The arguments of a module's call; for a layer without its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


LayerCalls = Mapping[str, ModuleCall]
"""The arguments of each layer on a batch, by the layer's path."""


@dataclass(frozen=True)
class Trace:
    """What one block computes on a batch.

    Attributes:
        features: (B, S, U * width), the consumer's input; None if the block has no units left.
        output: (B, S, d), the consumer's output, normalised or scaled where the family does so.
        residual_sum: (B, S, d), output plus residual.
        output_rms: (B, S, 1), by which the output was divided; None in families without a norm of
            the output.
    """

    features: Tensor | None
    output: Tensor
    residual_sum: Tensor
    output_rms: Tensor | None = None


def first_call(module: nn.Module, run: Callable[[], Any]) -> ModuleCall | None:
    """The arguments of a module's first call in `run`, which ends there; None without a call."""
    calls: list[ModuleCall] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(ModuleCall(args, kwargs))
        raise _Stop

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with suppress(_Stop):
            run()
    finally:
        handle.remove()
    return calls[0] if calls else None


def module_inputs(module: nn.Module, run: Callable[[], Any], num_calls: int) -> list[Tensor]:
    """The first arguments of a module's first calls in `run`, which ends after the last of them."""
    inputs: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])
        if len(inputs) == num_calls:
            raise _Stop

    handle = module.register_forward_pre_hook(hook)
    try:
        with suppress(_Stop):
            run()
    finally:
        handle.remove()
    return inputs


def add_signal_token_mask(model: PreTrainedModel, layout: Layout, batch: Batch) -> Batch:
    """Add the token mask to a batch of images or audio; other batches are returned as they are.

    The model itself decides how many tokens a signal becomes, so it runs up to its first layer. It
    also turns the attention mask of samples into one of tokens.
    """
    signal = next((name for name in SIGNALS if name in batch), None)
    if TOKEN_MASK in batch or signal is None or "input_ids" in batch:
        return batch
    with torch.no_grad():
        on_device = {name: values.to(execution_device(model)) for name, values in batch.items()}
        hidden, _ = layer_calls(model, layout, on_device)
    device = batch[signal].device
    tokens = torch.ones(hidden.shape[:2], dtype=torch.bool, device=device)
    shorten: Any = getattr(model, "_get_feature_vector_attention_mask", None)
    if shorten is not None and "attention_mask" in batch:
        tokens = shorten(hidden.shape[1], batch["attention_mask"])
    return {**batch, TOKEN_MASK: tokens}


def layer_calls(
    model: nn.Module,
    layout: Layout,
    batch: Batch,
    *,
    decoder_inputs: Mapping[str, Any] | None = None,
) -> tuple[Tensor, LayerCalls]:
    """The hidden states (B, S, d) that enter the first layer, and the arguments of every layer.

    No layer runs: each passes on its input, and the position bias where the first layer computes
    it for all. Layers may differ in attention mask and positions. Key-value caches are left out.

    Args:
        decoder_inputs: see `rfprune.model.encoder_decoder.inputs_with_encoder_output`; if given,
            the layers are those of the decoder, otherwise those of the encoder or the only stack.
    """
    hidden: list[Tensor] = []
    calls: dict[str, ModuleCall] = {}
    position_bias: list[Tensor | None] = []
    paths = [layout.layers[i] for i in layout.layer_indices(decoder=decoder_inputs is not None)]
    output_length = layout.layer_output_length

    def stand_in(path: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            states: Tensor = args[0] if args else kwargs.pop("hidden_states")
            hidden.append(states)
            without_cache = {name: _none_if_cache(value) for name, value in kwargs.items()}
            calls[path] = ModuleCall(tuple(map(_none_if_cache, args[1:])), without_cache)
            if path == paths[-1]:
                raise _Stop
            if path == paths[0] and output_length is not None:
                position_bias.append(_position_bias(model.get_submodule(path), states.shape[1]))
            return _as_layer_output(layout, states, *position_bias)

        return forward

    with ExitStack() as stack, suppress(_Stop):
        for path in paths:
            stack.enter_context(_forward_replaced(model, path, stand_in(path)))
        model(**(decoder_inputs or model_inputs(batch)))
    return hidden[0], calls


def _as_layer_output(layout: Layout, states: Tensor, *position_bias: Tensor | None) -> Any:
    """What a layer returns for these hidden states."""
    length = layout.layer_output_length
    if length is None:
        return states
    return (states, *position_bias, *[None] * length)[:length]


@contextmanager
def layers_bypassed(
    model: nn.Module, layout: Layout, output: Tensor, before: Tensor, *, decoder: bool = False
) -> Iterator[None]:
    """A context in which no layer of a stack runs: the last one returns a given output.

    The model then computes what follows its layers: the last norm and the head.

    Args:
        output: (B, S, d), of the last layer.
        before: (B, S, d), returned by all other layers.
        decoder: the stack is the decoder, otherwise the encoder or the only one.
    """
    indices = layout.layer_indices(decoder=decoder)
    left = len(layout.execution_order or indices)

    def forward(*_: Any, **__: Any) -> Any:
        nonlocal left
        left -= 1
        return _as_layer_output(layout, before if left else output)

    with ExitStack() as stack:
        for index in indices:
            stack.enter_context(_forward_replaced(model, layout.layers[index], forward))
        yield


def _position_bias(layer: nn.Module, num_tokens: int) -> Tensor | None:
    """The position bias (1, H, S, S) of a layer that computes it for all layers; else None."""
    for module in layer.modules():
        if getattr(module, "has_relative_attention_bias", False):
            with resident(module):
                bias: Tensor = module.compute_bias(num_tokens, num_tokens)  # type: ignore[operator]
            return bias
    return None


def _none_if_cache(value: Any) -> Any:
    return None if isinstance(value, Cache) else value


def run_layer(
    model: nn.Module,
    layer: str,
    hidden: Tensor,
    calls: LayerCalls,
    *,
    skip: Sequence[Block] = (),
) -> Tensor:
    """Run one layer.

    Args:
        layer: its path.
        hidden: (B, S, d), the layer's input; with `skip`, the residual sum of the last block in it.
        calls: from `layer_calls`.
        skip: blocks of this layer, from the first on, that have run already.

    Returns:
        The layer's output (B, S, d).
    """
    with _skipped(model, skip, hidden):
        return _layer_output(model, layer, hidden, calls)


def _layer_output(model: nn.Module, layer: str, hidden: Tensor, calls: LayerCalls) -> Tensor:
    output = model.get_submodule(layer)(hidden, *calls[layer].args, **calls[layer].kwargs)
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def trace_block(
    model: nn.Module,
    layer: str,
    hidden: Tensor,
    calls: LayerCalls,
    block: Block,
    *,
    skip: Sequence[Block] = (),
) -> Trace:
    """Run a layer up to the residual sum of `block`; for the arguments see `run_layer`."""
    with _skipped(model, skip, hidden), _recorded(model, block) as seen, suppress(_Stop):
        seen["residual_sum"] = _layer_output(model, layer, hidden, calls)
    output = seen["output"].view(hidden.shape)
    rms = output_rms(model, block, output)
    if block.sublayer.output_norm is not None:
        output = model.get_submodule(block.sublayer.output_norm)(output)
    elif (scale := layer_scale(model, block)) is not None:
        output = scale * output
    if block.sublayer.parallel:
        return Trace(seen.get("features"), output, hidden + output, rms)
    return Trace(seen.get("features"), output, seen["residual_sum"].view(hidden.shape), rms)


def output_rms(model: nn.Module, block: Block, output: Tensor) -> Tensor | None:
    """The root mean square (..., 1) by which the norm of a block divides the consumer's output
    (..., d), its epsilon included; None where there is no such norm."""
    path = block.sublayer.output_norm
    if path is None:
        return None
    norm: Any = model.get_submodule(path)
    epsilon: float = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return (output.float().square().mean(-1, keepdim=True) + epsilon).sqrt()


def layer_scale(model: nn.Module, block: Block) -> Tensor | None:
    """What multiplies the consumer's output, (d,) or (1,): a LayerScale, or the weight of a norm
    of the output; None where there is none."""
    row, weight = block.sublayer, weight_of(model.get_submodule(block.consumer))
    if row.output_norm is not None:
        gain: Tensor = model.get_submodule(row.output_norm)(weight.new_ones(len(weight)))
        return gain
    if row.layer_scale is None:
        return None
    parent, _, name = row.layer_scale.rpartition(".")
    scale = getattr(model.get_submodule(parent), name)
    if isinstance(scale, Tensor):
        return scale
    return None if scale == 1 else weight.new_tensor([scale])


def block_input(
    model: nn.Module,
    layer: str,
    hidden: Tensor,
    calls: LayerCalls,
    block: Block,
    *,
    skip: Sequence[Block] = (),
) -> Tensor:
    """The input (B, S, d) of a block's producers; for the arguments see `run_layer`."""
    projection = model.get_submodule(block.input_projections[0])
    with _skipped(model, skip, hidden):
        call = first_call(projection, lambda: _layer_output(model, layer, hidden, calls))
    assert call is not None, "a layer calls all its projections"
    states: Tensor = call.args[0]
    return states


@contextmanager
def _skipped(model: nn.Module, blocks: Sequence[Block], residual_sum: Tensor) -> Iterator[None]:
    """Bypass `blocks`; the last one's residual sum becomes `residual_sum` (B, S, d).

    In pre-norm layers the layer's input is the residual sum, to which the blocks add zeros. In
    post-norm layers it replaces the input of the last block's norm.
    """
    with ExitStack() as stack:
        for block in blocks:
            row = block.sublayer
            output = residual_sum.new_zeros(1) if block.pre_norm else residual_sum
            # a consumer that is outside of the module takes its output, which masks may multiply
            inside = block.consumer.startswith(row.module + ".")
            states = output if inside else residual_sum.new_zeros(1, 1, 1)
            if row.includes_residual:
                states = model.get_submodule(row.next_norm or "")(residual_sum)
            others = [None] * row.num_extra_outputs
            stack.enter_context(
                _returns(model, row.module, (states, *others) if others else states)
            )
            stack.enter_context(_returns(model, block.consumer, output))
        if blocks and not blocks[-1].pre_norm:
            norm = model.get_submodule(blocks[-1].sublayer.next_norm or "")
            handle = norm.register_forward_pre_hook(lambda *_: (residual_sum,))
            stack.callback(handle.remove)
        yield


def _returns(model: nn.Module, path: str, value: Any) -> AbstractContextManager[None]:
    """Let a module return a value instead of computing one."""
    return _forward_replaced(model, path, lambda *_, **__: value)


@contextmanager
def _forward_replaced(model: nn.Module, path: str, forward: Callable[..., Any]) -> Iterator[None]:
    module: Any = model.get_submodule(path)
    own = vars(module).get("forward")  # set by libraries that wrap it, such as accelerate
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def _recorded(model: nn.Module, block: Block) -> Iterator[dict[str, Tensor]]:
    """Record the input and output of a block's consumer and its residual sum; stop there."""
    seen: dict[str, Tensor] = {}

    def after_consumer(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, LINEAR_MAPS):  # else no unit is left, and there are no features
            seen["features"] = inputs[0]
        seen["output"] = output
        if block.sublayer.parallel:
            raise _Stop

    def before_norm(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen["residual_sum"] = inputs[0]
        raise _Stop

    with ExitStack() as stack:
        consumer = model.get_submodule(block.consumer)
        stack.callback(consumer.register_forward_hook(after_consumer).remove)
        if block.sublayer.next_norm is not None:
            norm = model.get_submodule(block.sublayer.next_norm)
            stack.callback(norm.register_forward_pre_hook(before_norm).remove)
        yield seen
