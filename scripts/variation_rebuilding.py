"""What the variations of `scripts/variations.py` rebuild with, beyond the package's stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rfprune.model.layout import Block, Layout
from rfprune.model.replay import Batch, token_mask
from rfprune.stages.least_squares import Moments, solve_weights
from rfprune.stages.reconstruct import (
    _align,
    _align_head,
    _collect,
    _pass,
    _start,
    _Walk,
)

Solve = Callable[[Block, Sequence[Moments], Tensor, Tensor], tuple[Tensor, Tensor]]
"""From a block, its moments on every part of the samples, its weight (d, p) and its bias (d,) to a
new weight and bias."""

Passed = Callable[[Block, _Walk, _Walk], None]
"""Told of a block that teacher and student have just passed."""


def features_of(moments: Moments, chosen: Tensor) -> Moments:
    """The moments as if only the features `chosen` (n,) had been there."""
    return replace(
        moments,
        gram=moments.gram[chosen][:, chosen],
        cross=moments.cross[chosen],
        feature_sum=moments.feature_sum[chosen],
    )


def added(parts: Sequence[Moments]) -> Moments:
    """Moments over the tokens of all parts."""
    return Moments(
        sum((part.gram for part in parts[1:]), parts[0].gram),
        sum((part.cross for part in parts[1:]), parts[0].cross),
        sum((part.feature_sum for part in parts[1:]), parts[0].feature_sum),
        sum((part.target_sum for part in parts[1:]), parts[0].target_sum),
        sum(part.target_energy for part in parts),
        sum(part.count for part in parts),
    )


def divergence_of(
    teacher: PreTrainedModel, student: PreTrainedModel, batches: Sequence[Batch]
) -> float:
    """Mean KL(teacher || student) an example in nats; one output: half the squared difference."""
    total, examples = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            wanted, given = (model(**batch).logits.double() for model in (teacher, student))
            if wanted.shape[1] == 1:
                total += float((wanted - given).square().sum() / 2)
            else:
                p, q = wanted.log_softmax(1), given.log_softmax(1)
                total += float((p.exp() * (p - q)).sum())
            examples += len(wanted)
    return total / examples


def solve_at_best(
    parts: Sequence[Moments], weight: Tensor, bias: Tensor, ridges: Sequence[float]
) -> tuple[Tensor, Tensor, float | None]:
    """Weight and bias fitted to all parts at a ridge, and the ridge.

    Of several ridges the one that, fitted to the first part, has the least error on the second. If
    none lowers that error, the weight and bias come back as they were, with None.
    """
    if len(ridges) == 1:
        return *solve_weights(added(parts), ridges[0], prior=weight), ridges[0]
    fitted, judged = parts
    errors = {ridge: judged.error(*solve_weights(fitted, ridge, prior=weight)) for ridge in ridges}
    best = min(errors, key=lambda ridge: errors[ridge])
    if errors[best] >= judged.error(weight, bias):
        return weight, bias, None
    return *solve_weights(added(parts), best, prior=weight), best


def walk_blocks(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    layout: Layout,
    parts: Sequence[Sequence[Batch]],
    solve: Solve,
    *,
    align: bool,
    passed: Passed | None = None,
) -> None:
    """`rfprune.stages.reconstruct.reconstruct` on several parts of the samples, each with moments
    of its own. On the first part alone readers are aligned (`align`), and `passed` is told when
    teacher and student are past a block."""
    with torch.no_grad():
        walks = [_start(teacher, student, layout, part) for part in parts]
        for block in layout.blocks:
            pairs = list(zip(walks, parts, strict=True))
            if align and walks[0][0].last is not None:
                _align(*walks[0], parts[0], block)
            moments = [_collect(*walk, part, block, False) for walk, part in pairs]
            consumer = student.get_submodule(block.consumer)
            weight, bias = solve(block, moments, consumer.weight, consumer.bias)
            consumer.weight.copy_(weight)
            consumer.bias.copy_(bias)
            for (_, walk), part in pairs:
                _pass(walk, part, block)
            if passed is not None:
                passed(block, *walks[0])
        if align:
            _align_head(*walks[0], parts[0])


def fit_norm(block: Block, teacher: _Walk, student: _Walk) -> None:
    """Scale and shift of the LayerNorm behind a block, so that its channels fit the teacher's."""
    wanted, given = (
        torch.cat([walk.model.get_submodule(block.residual_sum)(state) for state in walk.states])
        for walk in (teacher, student)
    )
    norm = student.model.get_submodule(block.residual_sum)
    assert isinstance(norm, nn.LayerNorm)
    wanted, given = wanted.double(), given.double()
    centred = given - given.mean(0)
    variance = centred.square().mean(0)
    scale = ((centred * wanted).mean(0) + 1e-12) / (variance + 1e-12)  # 1 for constant channels
    norm.weight.copy_(norm.weight * scale)
    norm.bias.copy_(wanted.mean(0) - (given.mean(0) - norm.bias) * scale)


def refit_maps(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    layout: Layout,
    parts: tuple[Sequence[Batch], Sequence[Batch]],
    ridges: Sequence[float],
    last: int | None = None,
) -> dict[str, float | None]:
    """Fit the linear maps behind the layers to the teacher's, in the order in which they run.

    Args:
        parts: batches to fit on and to judge by.
        last: so many from the end alone; all if None.

    Returns:
        The ridge that the judging part chose; None where no fit lowers its error: left alone.
    """
    inside = tuple(f"{path}." for path in layout.layers)
    names = [
        name
        for name, module in teacher.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(inside) and ".embed" not in name
    ]
    chosen: dict[str, float | None] = {}
    with torch.no_grad():
        for name in names[-(last or len(names)) :]:
            moments = [_map_moments(teacher, student, name, part) for part in parts]
            layer = student.get_submodule(name)
            weight, bias, chosen[name] = solve_at_best(moments, layer.weight, layer.bias, ridges)
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    return chosen


def _map_moments(
    teacher: PreTrainedModel, student: PreTrainedModel, name: str, batches: Sequence[Batch]
) -> Moments:
    layer = student.get_submodule(name)
    moments = Moments.zeros(layer.in_features, layer.out_features)
    for batch in batches:
        seen: list[tuple[Tensor, Tensor]] = []
        with ExitStack() as stack:
            for model in (teacher, student):
                hook = _note(seen)
                module = model.get_submodule(name)
                stack.callback(module.register_forward_hook(hook).remove)
                model(**batch)
        (_, wanted), (given, _) = seen
        if given.dim() == 3:
            tokens = token_mask(batch)
            wanted, given = wanted[tokens], given[tokens]
        moments.add(given, wanted)
    return moments


def _note(
    seen: list[tuple[Tensor, Tensor]],
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((inputs[0].detach(), output.detach()))

    return hook
