"""Fit the out-projections of a pruned student to a teacher, bottom up, one block at a time.

Teacher and student hidden states advance together through the layers. A block's target is what its
out-projection should give so that output plus residual match the teacher's: teacher output +
teacher residual - student residual (Kwon et al. 2022, section 4.3; K-prune, ICLR 2024). A block
therefore also repairs what went wrong below it.
Cost: one teacher forward pass, and on the small student three passes through attention and two
through the FFN.
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


@dataclass(frozen=True)
class _Run:
    """Teacher and student on their way up, side by side.

    Attributes:
        student_states: hidden states (tokens, d) of every batch that enter the student's layer.
        teacher_states: those that enter the teacher's next layer.
        totals: output plus residual (tokens, d) of the teacher's blocks in the current layer, by
            consumer, for every batch.
    """

    teacher: PreTrainedModel
    student: PreTrainedModel
    layout: Layout
    batches: Sequence[Batch]
    student_states: list[Tensor]
    teacher_states: list[Tensor]
    totals: list[dict[str, Tensor]]


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
    bar = tqdm(
        total=len(tried), desc="reconstruction", unit="block", disable=not progress, leave=False
    )
    with bar, torch.no_grad():
        run = _start(teacher, student, layout, batches)
        for layer in range(len(layout.layers)):
            blocks = [block for block in tried if block.layer == layer]
            _advance_teacher(run, layer, blocks)
            for block in blocks:
                moments = _collect(run, block, block.consumer in first_token_only)
                failures += _apply(fit, student, block, moments)
                bar.update()
            if layer + 1 < len(layout.layers):
                _advance_student(run, layer)
    return failures


def _start(
    teacher: PreTrainedModel, student: PreTrainedModel, layout: Layout, batches: Sequence[Batch]
) -> _Run:
    hidden = [
        pack(first_layer_call(student, layout, batch)[0], token_mask(batch)) for batch in batches
    ]
    return _Run(teacher, student, layout, batches, hidden, list(hidden), [{} for _ in hidden])


def _advance_teacher(run: _Run, layer: int, blocks: Sequence[Block]) -> None:
    """Take the teacher through a layer; what `blocks` give there, plus residual, is kept."""
    for i, batch in enumerate(run.batches):
        tokens = token_mask(batch)
        _, call = first_layer_call(run.student, run.layout, batch)
        hidden = unpack(run.teacher_states[i], tokens)
        output, traces = run_layer(run.teacher, run.layout.layers[layer], hidden, call, blocks)
        run.teacher_states[i] = pack(output, tokens)
        for block, trace in zip(blocks, traces, strict=True):
            run.totals[i][block.consumer] = pack(trace.total, tokens)


def _advance_student(run: _Run, layer: int) -> None:
    for i, batch in enumerate(run.batches):
        tokens = token_mask(batch)
        _, call = first_layer_call(run.student, run.layout, batch)
        hidden = unpack(run.student_states[i], tokens)
        output, _ = run_layer(run.student, run.layout.layers[layer], hidden, call)
        run.student_states[i] = pack(output, tokens)


def _collect(run: _Run, block: Block, first_token_only: bool) -> Moments:
    """Moments of the features that enter a block's consumer and of what it should give."""
    consumer = run.student.get_submodule(block.consumer)
    num_outputs, num_features = consumer.weight.shape
    moments = Moments.zeros(num_features, num_outputs, _float64_device(consumer.weight.device))
    path = run.layout.layers[block.layer]
    for i, batch in enumerate(run.batches):
        tokens = token_mask(batch)
        _, call = first_layer_call(run.student, run.layout, batch)
        hidden = unpack(run.student_states[i], tokens)
        trace = trace_block(run.student, path, hidden, call, block)
        total = run.totals[i].pop(block.consumer)
        chosen = first_tokens(tokens) if first_token_only else tokens
        residual = pack(trace.total, chosen) - pack(trace.output, chosen)
        target = total[chosen[tokens]] - residual
        if trace.features is None:
            moments.add(target.new_zeros(len(target), 0), target)
        else:
            moments.add(pack(trace.features, chosen), target)
    return moments


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
