"""Gradients of a large model, layer by layer: one layer's autograd and statistics in memory.

1. Forward without autograd, layer by layer: the input of every layer is kept for all batches.
2. The rest of the model (last norm, head, objective) is differentiated with respect to the kept
   output of the last layer. This gives one gradient state for each objective value of a batch.
3. Backward from the last layer to the first: a layer runs again under autograd from its kept input,
   is differentiated with the gradient at its output, and the gradient at its input replaces it.

States are kept without padding in a `TensorStore`. Where the objective depends on hidden states at
padding (question answering), padding is kept too. What else enters a layer (attention mask,
position bias) is made again by `layer_calls`. Two things differ by family:

- Layers with shared weights (ALBERT) run together under autograd, in all their runs.
- A decoder's layers also give the gradient at the encoder's output. The decoder is swept first;
  these gradients are summed over its layers, and the encoder is swept with the sum.

With several processes, as many consecutive layers as there are processes run under autograd at
once, so that each process can keep the statistics of one of them.

Many calibration tokens are swept in chunks. Statistics of a chunk are added to those of the chunks
before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rfprune import distributed
from rfprune.errors import UserError
from rfprune.model.batch import decoder_token_mask, model_inputs, pack, token_mask, unpack
from rfprune.model.encoder_decoder import decoder_inputs, encoder_inputs
from rfprune.model.layerwise import LayerCalls, layer_calls, layers_bypassed, run_layer
from rfprune.model.layout import Layout
from rfprune.model.residency import resident
from rfprune.stages.calibration import Calibration
from rfprune.stages.output_gradients import Watch
from rfprune.stages.passes import Pass, Step, ValuesOf, check_finite, complete, optional_gradients
from rfprune.stages.tensor_store import KeptTensor, TensorStore, check_scratch_space


@dataclass(frozen=True)
class HeadNeeds:
    """What the objective depends on, apart from the output of the last layer at tokens.

    Attributes:
        num_values: values of the objective per example.
        layers: other hidden states or attentions of the layers, so that no sweep is possible.
        padding: hidden states at padding.
    """

    num_values: int = 1
    layers: bool = False
    padding: bool = False


@dataclass(frozen=True)
class Segment:
    """Consecutive layers that run under autograd together.

    Attributes:
        runs: indices of the layers in execution order; layers with shared weights run several
            times.
        blocks: numbers of the layers' blocks.
    """

    runs: tuple[int, ...]
    blocks: tuple[int, ...]


def segments_of(layout: Layout, size: int, *, decoder: bool) -> list[Segment]:
    """The layers of a stack in segments of `size` layers."""
    indices = layout.layer_indices(decoder=decoder)
    order = layout.execution_order or indices
    segments = []
    for start in range(indices.start, indices.stop, size):
        layers = indices[start - indices.start :][:size]
        blocks = [i for i, block in enumerate(layout.blocks) if block.layer in layers]
        runs = tuple(layer for layer in order if layer in layers)
        segments.append(Segment(runs, tuple(blocks)))
    return segments


def head_needs(calibration: Calibration, values_of: ValuesOf) -> HeadNeeds:
    """What the objective depends on, found out by differentiating it on one batch.

    No layer runs: the embeddings take the place of the output of the last layer, and NaN that of
    the other hidden states. The batch is the first one with padding.

    Raises:
        UserError: the objective is not defined for this model and batch.
    """
    padded = (i for i in range(len(calibration.batches)) if not _tokens(calibration, i).all())
    number = next(padded, 0)
    decodes = calibration.layout.is_encoder_decoder
    with torch.inference_mode(False), torch.enable_grad():
        encoded = _entering(calibration, number, None)[0].detach() if decodes else None
        hidden = _entering(calibration, number, encoded)[0].detach().requires_grad_()
        lower = torch.full_like(hidden, torch.nan, requires_grad=True)
        try:
            outputs = _leave(calibration, number, hidden, encoded, lower)
            values = values_of(outputs, number)
        except UserError:
            raise
        except Exception:
            if not callable(calibration.objective):
                raise
            return HeadNeeds(layers=True)  # such as a user's loss on attentions
        total = torch.stack([value.sum() for value in values]).sum()
        gradient, lower_gradient = optional_gradients([total], [hidden, lower])
    if gradient is None or lower_gradient is not None or not torch.isfinite(total):
        return HeadNeeds(layers=True)
    padding = pack(gradient, ~_tokens(calibration, number))
    return HeadNeeds(len(values), padding=bool(padding.any()))


def layer_passes(
    calibration: Calibration,
    values_of: ValuesOf,
    needs: HeadNeeds,
    bar: Any,
    *,
    max_bytes: int,
    sums_bytes: int,
) -> Iterator[Pass]:
    """Passes from the last layer to the first, for each chunk of the batches.

    Args:
        values_of: of the objective.
        needs: of the head; it must not need `layers`.
        bar: progress bar, in batches; its total is set here.
        max_bytes: of the kept states in memory; beyond it they are on disk.
        sums_bytes: of the statistics of all blocks. States on disk take no more than these, or
            than `max_bytes` if that is more: beyond it, batches are swept in chunks.

    Raises:
        UserError: hidden states are not finite (the layer is named), or the disk is full.
    """
    layout, steps = calibration.layout, distributed.steps(len(calibration.batches))
    stacks = (False, True) if layout.is_encoder_decoder else (False,)
    num_segments = sum(
        len(segments_of(layout, distributed.world_size(), decoder=decoder)) for decoder in stacks
    )
    bar.reset(total=len(steps) * (2 * num_segments + 1))
    boundaries = num_segments + len(stacks) * (1 + needs.num_values)
    sizes = [boundaries * _bytes_of_step(calibration, needs, step) for step in steps]
    chunks = list(_chunks(sizes, max(max_bytes, sums_bytes)))
    largest = max(sum(sizes[i] for i in chunk) for chunk in chunks)
    check_scratch_space(max(0, largest - max_bytes) + (sums_bytes if len(chunks) > 1 else 0))
    for chunk in chunks:
        with TensorStore(max_bytes) as store:
            sweep = _Sweep(calibration, needs, store, [steps[i] for i in chunk], bar)
            yield from sweep.passes(values_of, is_last=chunk is chunks[-1])


def _chunks(sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Consecutive numbers whose sizes add up to at most `limit`, or single ones."""
    chunk: list[int] = []
    for number, size in enumerate(sizes):
        if chunk and sum(sizes[i] for i in chunk) + size > limit:
            yield chunk
            chunk = []
        chunk.append(number)
    yield chunk


def _bytes_of_step(calibration: Calibration, needs: HeadNeeds, step: Step) -> int:
    """Bytes of one hidden state of the largest batch of a step."""
    itemsize: int = calibration.model.dtype.itemsize
    tokens = [int(_kept_tokens(calibration, needs, i).sum()) for i in step if i is not None]
    return max(tokens) * calibration.layout.hidden_size * itemsize


def _tokens(calibration: Calibration, number: int, *, decoder: bool | None = None) -> Tensor:
    """Token mask (B, S) of the last stack, or of the one that is asked for."""
    batch, layout = calibration.batches[number], calibration.layout
    in_decoder = layout.is_encoder_decoder if decoder is None else decoder
    return decoder_token_mask(batch) if in_decoder else token_mask(batch)


def _kept_tokens(
    calibration: Calibration, needs: HeadNeeds, number: int, *, decoder: bool | None = None
) -> Tensor:
    """(B, S) booleans: true where states are kept."""
    tokens = _tokens(calibration, number, decoder=decoder)
    return torch.ones_like(tokens) if needs.padding else tokens


def _entering(
    calibration: Calibration, number: int, encoded: Tensor | None
) -> tuple[Tensor, LayerCalls]:
    """The input (B, S, d) of a stack and the arguments of its layers.

    Args:
        encoded: the encoder's output (B, S, d) for the decoder, None for another stack.
    """
    model, layout, batch = calibration.model, calibration.layout, calibration.batches[number]
    inputs = None if encoded is None else decoder_inputs(batch, encoded)
    return layer_calls(model, layout, batch, decoder_inputs=inputs)


def _leave(
    calibration: Calibration,
    number: int,
    hidden: Tensor,
    encoded: Tensor | None = None,
    lower: Tensor | None = None,
) -> Any:
    """The model's outputs for an output (B, S, d) of its last layer.

    Args:
        encoded: the encoder's output (B, S, d), if there is one.
        lower: what all other layers return; NaN if not given.
    """
    model, layout, batch = calibration.model, calibration.layout, calibration.batches[number]
    before = torch.full_like(hidden, torch.nan, requires_grad=False) if lower is None else lower
    inputs: Any = model_inputs(batch) if encoded is None else decoder_inputs(batch, encoded)
    with layers_bypassed(model, layout, hidden, before, decoder=encoded is not None):
        return model(**inputs, return_dict=True)


@dataclass
class _Stack:
    """The kept states of one stack. States are by number of the batch.

    Attributes:
        decoder: whether it is the decoder of an encoder-decoder.
        segments: its layers.
        states: the inputs of every segment, and the output of the last layer.
        gradients: one per objective value: at the output of the stack, then at the input of the
            last segment that was swept.
    """

    decoder: bool
    segments: list[Segment]
    states: list[dict[int, KeptTensor]]
    gradients: dict[int, list[KeptTensor]] = field(default_factory=dict)


class _Sweep:
    """One sweep of all stacks, for one chunk of the batches.

    Args:
        store: of the kept states.
        steps: the batches of the chunk.
        bar: progress bar, in batches.
    """

    def __init__(
        self,
        calibration: Calibration,
        needs: HeadNeeds,
        store: TensorStore,
        steps: Sequence[Step],
        bar: Any,
    ) -> None:
        self.calibration, self.needs, self.store = calibration, needs, store
        self.steps, self.bar = steps, bar
        own = [step[distributed.rank()] for step in steps]
        self.numbers = [number for number in own if number is not None]
        self.encoded: dict[int, KeptTensor] = {}  # the encoder's output, by number of the batch

    def passes(self, values_of: ValuesOf, *, is_last: bool) -> Iterator[Pass]:
        """Forward, then one pass per segment from the last to the first."""
        decodes = self.calibration.layout.is_encoder_decoder
        encoder: _Stack | None = None
        if decodes:
            encoder = self._forward(decoder=False)
            self._keep_encoded(encoder)
        stack = self._forward(decoder=decodes)
        self._differentiate_head(stack, encoder, values_of)
        yield from self._backward(stack, encoder, is_last)
        if encoder is not None:
            self._differentiate_encoded(encoder)
            yield from self._backward(encoder, None, is_last)

    def _forward(self, *, decoder: bool) -> _Stack:
        """Run a stack without autograd."""
        layout = self.calibration.layout
        segments = segments_of(layout, distributed.world_size(), decoder=decoder)
        with torch.no_grad():
            states = [
                {i: self._keep(self._entering(i, decoder)[0], i, decoder) for i in self.numbers}
            ]
            for segment in segments:
                with self._resident(segment):
                    states.append(
                        {i: self._run(segment, states[-1][i], i, decoder) for i in self.numbers}
                    )
        return _Stack(decoder, segments, states)

    def _run(self, segment: Segment, kept: KeptTensor, i: int, decoder: bool) -> KeptTensor:
        """Run a segment on batch i without autograd, from its kept input to its kept output."""
        hidden, calls = self._load(kept, i, decoder), self._entering(i, decoder)[1]
        for layer in segment.runs:
            path = self.calibration.layout.layers[layer]
            hidden = run_layer(self.calibration.model, path, hidden, calls)
            check_finite(pack(hidden, self._tokens(i, decoder)), layer)
        self.bar.update()
        return self._keep(hidden, i, decoder)

    def _differentiate_head(
        self, stack: _Stack, encoder: _Stack | None, values_of: ValuesOf
    ) -> None:
        """Make the gradients at the output of the last stack, and at that of its encoder."""
        for i in self.numbers:
            kept = [(stack, stack.states[-1][i])]
            if encoder is not None:
                kept.append((encoder, self.encoded[i]))
            with torch.inference_mode(False), torch.enable_grad():
                leaves = [self._load(one, i, of.decoder).requires_grad_() for of, one in kept]
                predictions = _leave(self.calibration, i, leaves[0], *leaves[1:])
                totals = [value.sum() for value in values_of(predictions, i)]
                del predictions
                while totals:
                    total, retain = totals.pop(0), bool(totals)
                    found = optional_gradients([total], leaves, retain_graph=retain)
                    complete(found[:1])
                    for (of, _), leaf, one in zip(kept, leaves, found, strict=True):
                        gradient = torch.zeros_like(leaf) if one is None else one
                        of.gradients.setdefault(i, []).append(self._keep(gradient, i, of.decoder))
            self.store.release(stack.states[-1][i])
            self.bar.update()

    def _backward(self, stack: _Stack, encoder: _Stack | None, is_last: bool) -> Iterator[Pass]:
        """One pass per segment of a stack."""
        for number in reversed(range(len(stack.segments))):
            gradients = partial(self._gradients, stack, number, encoder)
            segment = stack.segments[number]
            with self._resident(segment):
                layers = tuple(sorted(set(segment.runs)))
                yield Pass(layers, segment.blocks, self.steps, is_last, gradients)
            for kept in stack.states[number].values():
                self.store.release(kept)
        for kept_gradients in stack.gradients.values():
            for kept in kept_gradients:
                self.store.release(kept)

    def _gradients(
        self, stack: _Stack, number: int, encoder: _Stack | None, i: int, watch: Watch
    ) -> Iterator[tuple[Tensor, ...]]:
        """Gradients on batch i in a segment; see `Pass`."""
        decoder, layout, model = stack.decoder, self.calibration.layout, self.calibration.model
        with torch.inference_mode(False), torch.enable_grad():
            hidden = self._load(stack.states[number][i], i, decoder)
            leaves = [(stack, hidden.requires_grad_())] if number else []
            outputs, encoded = [hidden], None
            if encoder is not None:
                encoded = self._load(self.encoded[i], i, decoder=False).requires_grad_()
                leaves.append((encoder, encoded))
            calls = self._entering(i, decoder, encoded)[1]
            with watch.attached():
                for layer in stack.segments[number].runs:
                    outputs = [run_layer(model, layout.layers[layer], outputs[0], calls)]
            if encoded is not None:
                # Its gradient so far: autograd adds those of this segment, in the order of a
                # backward pass through the whole model.
                outputs.append(encoded.view_as(encoded))
        watched = list(watch.tensors)
        inputs = [*watched, *(leaf for _, leaf in leaves)]
        num_values = len(stack.gradients[i])
        for v in range(num_values):
            with torch.inference_mode(False):
                arriving = [self._load(stack.gradients[i][v], i, decoder)]
                if encoder is not None:
                    arriving.append(self._load(encoder.gradients[i][v], i, decoder=False))
                found: tuple[Tensor, ...] = ()
                if inputs:
                    ends = [n for n, output in enumerate(outputs) if output.requires_grad]
                    found = complete(
                        optional_gradients(
                            [outputs[n] for n in ends],  # not that of a first layer without blocks
                            inputs,
                            [arriving[n] for n in ends],
                            retain_graph=v + 1 < num_values,
                        )
                    )
                for (of, _), gradient in zip(leaves, found[len(watched) :], strict=True):
                    packed = pack(gradient, self._mask(i, of.decoder))
                    self.store.replace(of.gradients[i][v], packed)
            yield found[: len(watched)]
        self.bar.update()

    def _keep_encoded(self, encoder: _Stack) -> None:
        """Keep the encoder's output: that of its last layer and what follows, such as a norm."""
        with torch.no_grad():
            for i in self.numbers:
                hidden = self._load(encoder.states[-1][i], i, decoder=False)
                self.encoded[i] = self._keep(self._encode(i, hidden), i, decoder=False)

    def _differentiate_encoded(self, encoder: _Stack) -> None:
        """Replace the gradients at the encoder's output by those at its last layer's output."""
        for i in self.numbers:
            with torch.inference_mode(False), torch.enable_grad():
                hidden = self._load(encoder.states[-1][i], i, decoder=False).requires_grad_()
                encoded = self._encode(i, hidden)
                for kept in encoder.gradients[i]:
                    arriving = self._load(kept, i, decoder=False)
                    found = torch.autograd.grad(encoded, hidden, arriving, retain_graph=True)
                    self.store.replace(kept, pack(found[0], self._mask(i, decoder=False)))
            self.store.release(encoder.states[-1][i])
            self.store.release(self.encoded[i])

    def _encode(self, i: int, hidden: Tensor) -> Tensor:
        """The encoder's output (B, S, d) for an output of its last layer."""
        model, layout = self.calibration.model, self.calibration.layout
        inputs = encoder_inputs(self.calibration.batches[i])
        before = torch.full_like(hidden, torch.nan, requires_grad=False)
        with layers_bypassed(model, layout, hidden, before):
            encoded: Tensor = model.get_encoder()(**inputs, return_dict=True).last_hidden_state
        return encoded

    @contextmanager
    def _resident(self, segment: Segment) -> Iterator[None]:
        """A context in which the weights of a segment are loaded, if they are offloaded."""
        with ExitStack() as stack:
            for layer in sorted(set(segment.runs)):
                path = self.calibration.layout.layers[layer]
                stack.enter_context(resident(self.calibration.model.get_submodule(path)))
            yield

    def _entering(
        self, i: int, decoder: bool, encoded: Tensor | None = None
    ) -> tuple[Tensor, LayerCalls]:
        if decoder and encoded is None:
            encoded = self._load(self.encoded[i], i, decoder=False)
        return _entering(self.calibration, i, encoded)

    def _tokens(self, i: int, decoder: bool) -> Tensor:
        return _tokens(self.calibration, i, decoder=decoder)

    def _mask(self, i: int, decoder: bool) -> Tensor:
        return _kept_tokens(self.calibration, self.needs, i, decoder=decoder)

    def _keep(self, hidden: Tensor, i: int, decoder: bool) -> KeptTensor:
        return self.store.keep(pack(hidden, self._mask(i, decoder)))

    def _load(self, kept: KeptTensor, i: int, decoder: bool) -> Tensor:
        return unpack(self.store.load(kept), self._mask(i, decoder))
