"""Fit the out-projections of a pruned student to a teacher, bottom up, one block at a time.

Teacher and student hidden states advance together through the layers. A block's target is what its
out-projection should give so that output plus residual match the teacher's: teacher output +
teacher residual - student residual (Kwon et al. 2022, section 4.3; K-prune, ICLR 2024). A block
therefore also repairs what went wrong below it.
Cost: one forward pass of the teacher and two of the small student; memory: one hidden state of
each a token.

A block that runs several times (ALBERT's) is fitted once, to the teacher's outputs of all its runs.
What enters it in a run depends on the fit itself through the runs before, so both models are given
the teacher's hidden states at every run: there is nothing to repair, and nothing to align. Cost:
one forward pass of the teacher, and of the student, a block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from rfprune import distributed
from rfprune.model.batch import Batch, decoder_token_mask, first_tokens, pack, token_mask, unpack
from rfprune.model.encoder_decoder import (
    block_token_mask,
    encoder_output,
    inputs_with_encoder_output,
)
from rfprune.model.layerwise import (
    LayerCalls,
    Trace,
    block_input,
    layer_calls,
    layer_scale,
    run_layer,
    trace_block,
)
from rfprune.model.layout import Block, Layout
from rfprune.model.linear import is_empty, linear, weight_of
from rfprune.stages.align import apply_regression_map, fit_regression_map
from rfprune.stages.float64 import float64_device
from rfprune.stages.least_squares import Moments, NumericalFailure

Fit = Callable[[Block, Moments, Moments, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""From a block, the moments of most batches and those of the held-out ones, the weight (d, p) and
bias (d,) or None as they are, to a new weight and bias. Where a family scales what leaves the
out-projection, weight and bias are scaled so."""

HELD_OUT_EVERY = 8
"""Every so many batches one is held out from a fit, to judge it."""


@dataclass
class _Walk:
    """A model on its way up, block by block.

    Attributes:
        states: for every batch the total of the last block that was passed, its output plus the
            residual (tokens, d); before the first one what enters the first layer. All are parts
            of one tensor, since tensors that come and go between others leave holes in memory.
        last: that block.
        memory: of a decoder, for every batch what comes out of the encoder (tokens, d); else none.
    """

    model: PreTrainedModel
    layout: Layout
    states: Sequence[Tensor]
    last: Block | None = None
    memory: Sequence[Tensor] = ()

    def calls(self, i: int, batch: Batch) -> LayerCalls:
        """What the layers are called with on batch i."""
        given = inputs_with_encoder_output(batch, self.memory[i]) if self.memory else None
        return layer_calls(self.model, self.layout, batch, decoder_inputs=given)[1]

    def trace(self, i: int, tokens: Tensor, calls: LayerCalls, block: Block) -> Trace:
        """Batch i at `block`, on its way from the last one."""
        hidden, done = self._reach(i, tokens, calls, block.layer)
        path = self.layout.layers[block.layer]
        return trace_block(self.model, path, hidden, calls, block, skip=done)

    def block_input(self, i: int, tokens: Tensor, calls: LayerCalls, block: Block) -> Tensor:
        """What the producers of `block` read of batch i, (B, S, d)."""
        hidden, done = self._reach(i, tokens, calls, block.layer)
        path = self.layout.layers[block.layer]
        return block_input(self.model, path, hidden, calls, block, skip=done)

    def _reach(
        self, i: int, tokens: Tensor, calls: LayerCalls, until: int
    ) -> tuple[Tensor, list[Block]]:
        """Hidden states (B, S, d) of batch i in layer `until`, and its blocks that are done."""
        hidden = unpack(self.states[i], tokens)
        layer, done = self.layout.layer_indices(decoder=bool(self.memory))[0], list[Block]()
        if self.last is not None:
            layer, blocks = self.last.layer, self.layout.blocks_of_layer(self.last.layer)
            done = [*blocks[: blocks.index(self.last)], self.last]
        for path in self.layout.layers[layer:until]:
            hidden, done = run_layer(self.model, path, hidden, calls, skip=done), []
        return hidden, done


def reconstruct(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    fit: Fit,
    *,
    skip: Collection[str] = (),
    first_token_only: Collection[str] = (),
    align: bool = False,
    progress: bool = False,
) -> list[str]:
    """Give every block of `student` the weight and bias that `fit` finds, in place.

    Args:
        teacher: the model to match, frozen; hooks on it (masks) act.
        student: a compact copy of the model that `layout` describes.
        skip: consumers that stay as they are.
        first_token_only: consumers whose moments are taken from the first token of every example.
        align: also fit what reads the student's hidden states; see `rfprune.stages.align`.

    Returns:
        One sentence for every block whose fit failed; these blocks stay as they were.
    """
    failures = []
    tried = [block for block in layout.blocks if block.consumer not in skip]
    bar = tqdm(tried, desc="reconstruction", unit="block", disable=not progress, leave=False)
    with torch.no_grad():
        batches = distributed.shard(batches)
        if layout.execution_order:
            for block in bar:
                moments = _collect_runs(teacher, student, layout, batches, block)
                failures += _apply(fit, student, block, *moments)
            return failures
        walks = _start(teacher, student, layout, batches, in_decoder=False)
        for block in bar:
            if layout.in_decoder(block) and not walks[0].memory:
                walks = _start(teacher, student, layout, batches, in_decoder=True)
            if align and walks[0].last is not None:
                failures += _align(*walks, batches, block)
            moments = _collect(*walks, batches, block, block.consumer in first_token_only)
            failures += _apply(fit, student, block, *moments)
            if block is not tried[-1]:
                _pass(walks[1], batches, block)
    return failures


def _start(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    *,
    in_decoder: bool,
) -> tuple[_Walk, _Walk]:
    """At the first layer; of a decoder when the encoder is done."""
    models = (teacher, student)
    memories: list[list[Tensor]] = [[], []]
    if in_decoder:
        memories = [[encoder_output(model, batch) for batch in batches] for model in models]
    tokens = [decoder_token_mask(batch) if in_decoder else token_mask(batch) for batch in batches]
    sizes = [int(mask.sum()) for mask in tokens]

    def first(i: int) -> Tensor:
        given = inputs_with_encoder_output(batches[i], memories[1][i]) if in_decoder else None
        return layer_calls(student, layout, batches[i], decoder_inputs=given)[0]

    hidden = first(0)
    together = hidden.new_empty(sum(sizes), hidden.shape[-1])
    for i, state in enumerate(together.split(sizes)):
        state.copy_(pack(first(i), tokens[i]))
    return (
        _Walk(teacher, layout, together.clone().split(sizes), memory=memories[0]),
        _Walk(student, layout, together.split(sizes), memory=memories[1]),
    )


def _collect(
    teacher: _Walk,
    student: _Walk,
    batches: Sequence[Batch],
    block: Block,
    first_token_only: bool,
) -> tuple[Moments, Moments]:
    """Moments of the features that enter the student's consumer and of what it should give, and
    the same of the held-out batches.

    The teacher passes the block; the student does so when it has been fitted.
    """
    consumer = student.model.get_submodule(block.consumer)
    num_outputs, num_features = weight_of(consumer).shape
    parts = _parts(num_features, num_outputs, consumer.weight.device)
    for i, batch in enumerate(batches):
        tokens = block_token_mask(student.layout, block, batch)
        theirs, calls = _calls(teacher, student, i, batch)
        wanted = teacher.trace(i, tokens, theirs, block).residual_sum
        teacher.states[i].copy_(pack(wanted, tokens))
        trace = student.trace(i, tokens, calls, block)
        chosen = first_tokens(tokens) if first_token_only else tokens
        residual = pack(trace.residual_sum, chosen) - pack(trace.output, chosen)
        target = pack(wanted, chosen) - residual
        if trace.features is None:
            _part(parts, i).add(target.new_zeros(len(target), 0), target)
        else:
            _part(parts, i).add(pack(trace.features, chosen), target)
    teacher.last = block
    return _everyones(parts[0]), _everyones(parts[1])


def _calls(teacher: _Walk, student: _Walk, i: int, batch: Batch) -> tuple[LayerCalls, LayerCalls]:
    """What the layers of both are called with on batch i: the same, unless they read encoders.

    A student can be called as its teacher is, but not the other way round: a position bias may have
    a slice for each of the caller's heads.
    """
    theirs = teacher.calls(i, batch)
    return theirs, student.calls(i, batch) if student.memory else theirs


def _collect_runs(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    block: Block,
) -> tuple[Moments, Moments]:
    """As `_collect`, over all runs of a block, from the teacher's hidden states at each."""
    consumer = student.get_submodule(block.consumer)
    num_outputs, num_features = weight_of(consumer).shape
    parts = _parts(num_features, num_outputs, consumer.weight.device)
    blocks = layout.blocks_of_layer(block.layer)
    before = blocks[: blocks.index(block)]
    for i, batch in enumerate(batches):
        tokens = token_mask(batch)
        hidden, calls = layer_calls(teacher, layout, batch)
        for layer in layout.execution_order:
            path, block_input = layout.layers[layer], hidden
            if layer == block.layer:
                if before:
                    block_input = trace_block(teacher, path, hidden, calls, before[-1]).residual_sum
                wanted = trace_block(teacher, path, block_input, calls, block, skip=before)
                found = trace_block(student, path, block_input, calls, block, skip=before)
                target = pack(wanted.output, tokens)
                features = target.new_zeros(len(target), 0)
                if found.features is not None:
                    features = pack(found.features, tokens)
                _part(parts, i).add(features, target)
            hidden = run_layer(teacher, path, hidden, calls)
    return _everyones(parts[0]), _everyones(parts[1])


def _parts(num_features: int, num_outputs: int, device: torch.device) -> tuple[Moments, Moments]:
    """Empty moments to fit on, and others to judge by."""
    where = float64_device(device)
    seen, held_out = (Moments.zeros(num_features, num_outputs, where) for _ in range(2))
    return seen, held_out


def _part(parts: tuple[Moments, Moments], i: int) -> Moments:
    """Where batch i of this process belongs."""
    return parts[distributed.batch_number(i) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1]


def _everyones(moments: Moments) -> Moments:
    """The sums over the batches of all processes."""
    numbers = moments.gram.new_tensor([moments.target_energy, moments.count])
    distributed.all_reduce(
        moments.gram, moments.cross, moments.feature_sum, moments.target_sum, numbers
    )
    moments.target_energy, moments.count = float(numbers[0]), int(numbers[1])
    return moments


def _align(teacher: _Walk, student: _Walk, batches: Sequence[Batch], block: Block) -> list[str]:
    """Let the student's producers read the teacher's hidden states, as far as they can tell."""
    if is_empty(student.model, block.consumer):
        return []
    readers = [linear(student.model, path) for path in block.input_projections]
    size = weight_of(readers[0]).shape[1]
    parts = _parts(size, size, student.states[0].device)
    for i, batch in enumerate(batches):
        tokens = block_token_mask(student.layout, block, batch)
        theirs, calls = _calls(teacher, student, i, batch)
        seen = student.block_input(i, tokens, calls, block)
        wanted = teacher.block_input(i, tokens, theirs, block)
        _part(parts, i).add(pack(seen, tokens), pack(wanted, tokens))
    try:
        moments = _everyones(parts[0]), _everyones(parts[1])
        found = {
            shift: fit_regression_map(*moments, shift=shift) for shift in {*map(_has_bias, readers)}
        }
        for reader in readers:
            apply_regression_map(reader, *found[_has_bias(reader)])
    except NumericalFailure as failure:
        return [f"what {block.name} reads was left as it was: {failure}"]
    return []


def _has_bias(reader: Any) -> bool:
    return reader.bias is not None


def _pass(walk: _Walk, batches: Sequence[Batch], block: Block) -> None:
    for i, batch in enumerate(batches):
        tokens = block_token_mask(walk.layout, block, batch)
        total = walk.trace(i, tokens, walk.calls(i, batch), block).residual_sum
        walk.states[i].copy_(pack(total, tokens))
    walk.last = block


def _apply(
    fit: Fit, student: PreTrainedModel, block: Block, seen: Moments, held_out: Moments
) -> list[str]:
    consumer = student.get_submodule(block.consumer)
    weight, bias, scale = weight_of(consumer), consumer.bias, layer_scale(student, block)
    try:
        if scale is None:
            new_weight, new_bias = fit(block, seen, held_out, weight, bias)
        else:
            scaled = None if bias is None else scale * bias
            new_weight, new_bias = fit(block, seen, held_out, scale[:, None] * weight, scaled)
            new_weight = _unscaled(new_weight, scale[:, None], weight)
            new_bias = None if new_bias is None else _unscaled(new_bias, scale, bias)
        if not all(torch.isfinite(new).all() for new in (new_weight, new_bias) if new is not None):
            raise NumericalFailure("the fitted weights are not finite")
    except NumericalFailure as failure:
        return [f"{block.name} was left as it was: {failure}"]
    weight.copy_(new_weight)
    if new_bias is not None:
        bias.copy_(new_bias)
    return []


def _unscaled(fitted: Tensor, scale: Tensor, before: Tensor) -> Tensor:
    """What times the scale is `fitted`; where the scale is zero, what it was before."""
    return torch.where(scale == 0, before, fitted.to(before) / scale)
