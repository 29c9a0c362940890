"""Fit the out-projections of a pruned student to a teacher, bottom up, one block at a time.

Teacher and student hidden states advance together through the layers. A block's target is what its
out-projection should give so that output plus residual match the teacher's: teacher output +
teacher residual - student residual (Kwon et al. 2022, section 4.3; K-prune, ICLR 2024). A block
therefore also repairs what went wrong below it.
Cost: one forward pass of the teacher and two of the small student; memory: one hidden state of
each a token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from rfprune.model.layout import Block, Layout
from rfprune.model.replay import (
    Batch,
    LayerCall,
    Trace,
    first_layer_call,
    first_tokens,
    pack,
    run_layer,
    token_mask,
    trace_block,
    unpack,
)
from rfprune.stages.least_squares import Moments, NumericalFailure

Fit = Callable[[Block, Moments, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From a block, its moments, weight (d, p) and bias (d,) to a new weight and bias."""


@dataclass
class _Walk:
    """A model on its way up, block by block.

    Attributes:
        states: for every batch the total of the last block that was passed, its output plus the
            residual (tokens, d); before the first one what enters the first layer. All are parts
            of one tensor, since tensors that come and go between others leave holes in memory.
        last: that block.
    """

    model: PreTrainedModel
    layout: Layout
    states: Sequence[Tensor]
    last: Block | None = None

    def trace(self, i: int, tokens: Tensor, call: LayerCall, block: Block) -> Trace:
        """Batch i at `block`, on its way from the last one."""
        hidden = unpack(self.states[i], tokens)
        layer, done = 0, list[Block]()
        if self.last is not None:
            layer, blocks = self.last.layer, self.layout.blocks_of_layer(self.last.layer)
            done = [*blocks[: blocks.index(self.last)], self.last]
        for path in self.layout.layers[layer : block.layer]:
            hidden, done = run_layer(self.model, path, hidden, call, done=done), []
        path = self.layout.layers[block.layer]
        return trace_block(self.model, path, hidden, call, block, done=done)


def reconstruct(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    fit: Fit,
    *,
    skip: Collection[str] = (),
    first_token_only: Collection[str] = (),
    progress: bool = False,
) -> list[str]:
    """Give every block of `student` the weight and bias that `fit` finds, in place.

    Args:
        teacher: the model to match, frozen; hooks on it (masks) act.
        student: a compact copy of the model that `layout` describes.
        skip: consumers that stay as they are.
        first_token_only: consumers whose moments are taken from the first token of every example.

    Returns:
        One sentence for every block whose fit failed; these blocks stay as they were.
    """
    failures = []
    tried = [block for block in layout.blocks if block.consumer not in skip]
    bar = tqdm(tried, desc="reconstruction", unit="block", disable=not progress, leave=False)
    with torch.no_grad():
        walks = _start(teacher, student, layout, batches)
        for block in bar:
            moments = _collect(*walks, batches, block, block.consumer in first_token_only)
            failures += _apply(fit, student, block, moments)
            if block is not tried[-1]:
                _pass(walks[1], batches, block)
    return failures


def _start(
    teacher: PreTrainedModel, student: PreTrainedModel, layout: Layout, batches: Sequence[Batch]
) -> tuple[_Walk, _Walk]:
    sizes = [int(token_mask(batch).sum()) for batch in batches]
    hidden, _ = first_layer_call(student, layout, batches[0])
    together = hidden.new_empty(sum(sizes), hidden.shape[-1])
    for state, batch in zip(together.split(sizes), batches, strict=True):
        state.copy_(pack(first_layer_call(student, layout, batch)[0], token_mask(batch)))
    return (
        _Walk(teacher, layout, together.clone().split(sizes)),
        _Walk(student, layout, together.split(sizes)),
    )


def _collect(
    teacher: _Walk,
    student: _Walk,
    batches: Sequence[Batch],
    block: Block,
    first_token_only: bool,
) -> Moments:
    """Moments of the features that enter the student's consumer and of what it should give.

    The teacher passes the block; the student does so when it has been fitted.
    """
    consumer = student.model.get_submodule(block.consumer)
    num_outputs, num_features = consumer.weight.shape
    moments = Moments.zeros(num_features, num_outputs, _float64_device(consumer.weight.device))
    for i, batch in enumerate(batches):
        tokens = token_mask(batch)
        _, call = first_layer_call(student.model, student.layout, batch)
        wanted = teacher.trace(i, tokens, call, block).total
        teacher.states[i].copy_(pack(wanted, tokens))
        trace = student.trace(i, tokens, call, block)
        chosen = first_tokens(tokens) if first_token_only else tokens
        residual = pack(trace.total, chosen) - pack(trace.output, chosen)
        target = pack(wanted, chosen) - residual
        if trace.features is None:
            moments.add(target.new_zeros(len(target), 0), target)
        else:
            moments.add(pack(trace.features, chosen), target)
    teacher.last = block
    return moments


def _pass(walk: _Walk, batches: Sequence[Batch], block: Block) -> None:
    for i, batch in enumerate(batches):
        tokens = token_mask(batch)
        _, call = first_layer_call(walk.model, walk.layout, batch)
        walk.states[i].copy_(pack(walk.trace(i, tokens, call, block).total, tokens))
    walk.last = block


def _float64_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device  # MPS has no float64


def _apply(fit: Fit, student: PreTrainedModel, block: Block, moments: Moments) -> list[str]:
    consumer = student.get_submodule(block.consumer)
    try:
        new_weight, new_bias = fit(block, moments, consumer.weight, consumer.bias)
        if not (torch.isfinite(new_weight).all() and torch.isfinite(new_bias).all()):
            raise NumericalFailure("the fitted weights are not finite")
    except NumericalFailure as failure:
        return [f"{block.name} was left as it was: {failure}"]
    consumer.weight.copy_(new_weight)
    consumer.bias.copy_(new_bias)
    return []
