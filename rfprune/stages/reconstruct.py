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
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from rfprune.model.layout import Block, Layout
from rfprune.model.replay import Batch, first_layer_call, pack, run_layer, token_mask, unpack
from rfprune.stages.least_squares import Moments, NumericalFailure

Fit = Callable[[Block, Moments, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From a block, its moments, weight (d, p) and bias (d,) to a new weight and bias."""


@dataclass
class _States:
    """Hidden states (tokens, d) of every batch, padding left out.

    Attributes:
        student: entering the student's current layer.
        teacher: entering the teacher's next layer.
        totals: output plus residual of the teacher's blocks in the current layer, by consumer.
    """

    student: list[Tensor]
    teacher: list[Tensor]
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
    with torch.no_grad():
        states = _enter(student, layout, batches)
        bar = tqdm(
            total=len(layout.blocks),
            desc="reconstruction",
            unit="block",
            disable=not progress,
            leave=False,
        )
        for layer, path in enumerate(layout.layers):
            blocks = layout.blocks_of_layer(layer)
            for position, block in enumerate(blocks):
                moments = _collect(
                    teacher,
                    student,
                    layout,
                    blocks,
                    position,
                    batches,
                    states,
                    block.consumer in first_token_only,
                )
                if block.consumer not in skip:
                    failures += _apply(fit, student, block, moments)
                bar.update()
            if layer + 1 < len(layout.layers):
                _advance(teacher, student, layout, path, batches, states, teacher_too=not blocks)
        bar.close()
    return failures


def _enter(student: PreTrainedModel, layout: Layout, batches: Sequence[Batch]) -> _States:
    hidden = [
        pack(first_layer_call(student, layout, batch)[0], token_mask(batch)) for batch in batches
    ]
    return _States(hidden, list(hidden), [{} for _ in hidden])


def _collect(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    layout: Layout,
    blocks: Sequence[Block],
    position: int,
    batches: Sequence[Batch],
    states: _States,
    first_token_only: bool,
) -> Moments:
    """Moments of a block's features and targets; the teacher runs with its layer's first block."""
    block = blocks[position]
    path = layout.layers[block.layer]
    consumer = student.get_submodule(block.consumer)
    features_in = getattr(consumer, "in_features", 0)
    moments = Moments.zeros(features_in, layout.hidden_size, _float64_device(consumer.bias.device))
    for i, batch in enumerate(batches):
        tokens = token_mask(batch)
        _, call = first_layer_call(student, layout, batch)
        if position == 0:
            output, traces = run_layer(
                teacher, path, unpack(states.teacher[i], tokens), call, blocks
            )
            assert output is not None
            states.teacher[i] = pack(output, tokens)
            states.totals[i] = {
                b.consumer: pack(t.total, tokens) for b, t in zip(blocks, traces, strict=True)
            }
        _, (trace,) = run_layer(
            student, path, unpack(states.student[i], tokens), call, [block], stop=True
        )
        residual = trace.total - trace.output
        target = states.totals[i].pop(block.consumer) - pack(residual, tokens)
        features = (
            target.new_zeros(len(target), 0)
            if trace.features is None
            else pack(trace.features, tokens)
        )
        if first_token_only:
            first = torch.zeros_like(tokens)
            first[:, 0] = True
            chosen = first[tokens]
            features, target = features[chosen], target[chosen]
        moments.add(features, target)
    return moments


def _float64_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device  # MPS has no float64


def _apply(fit: Fit, student: PreTrainedModel, block: Block, moments: Moments) -> list[str]:
    consumer = student.get_submodule(block.consumer)
    bias = consumer.bias
    weight = getattr(consumer, "weight", bias.new_zeros(len(bias), 0))
    try:
        new_weight, new_bias = fit(block, moments, weight, bias)
        if not (torch.isfinite(new_weight).all() and torch.isfinite(new_bias).all()):
            raise NumericalFailure("the fitted weights are not finite")
    except NumericalFailure as failure:
        return [f"{block.name} was left as it was: {failure}"]
    if weight.numel():
        weight.copy_(new_weight)
    bias.copy_(new_bias)
    return []


def _advance(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    layout: Layout,
    path: str,
    batches: Sequence[Batch],
    states: _States,
    teacher_too: bool,
) -> None:
    """Take the student through a finished layer, and the teacher where no block took it along."""
    models: list[tuple[nn.Module, list[Tensor]]] = [(student, states.student)]
    if teacher_too:
        models.append((teacher, states.teacher))
    for i, batch in enumerate(batches):
        tokens = token_mask(batch)
        _, call = first_layer_call(student, layout, batch)
        for model, hidden in models:
            output, _ = run_layer(model, path, unpack(hidden[i], tokens), call)
            assert output is not None
            hidden[i] = pack(output, tokens)
