"""What the variations of `scripts/variations.py` rebuild with, beyond the package's stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rfprune.model.layout import Block, Layout
from rfprune.model.replay import (
    Batch,
    Calls,
    Trace,
    layer_calls,
    pack,
    run_layer,
    token_mask,
    trace_block,
    unpack,
)
from rfprune.stages.least_squares import Moments, solve_weights

Solve = Callable[[Block, Sequence[Moments], Tensor, Tensor], tuple[Tensor, Tensor]]
"""From a block, its moments on every part of the samples, its weight (d, p) and its bias (d,) to a
new weight and bias."""


@dataclass
class Walk:
    """A model on its way up: the totals (tokens, d) of the last block passed, batch by batch."""

    model: PreTrainedModel
    layout: Layout
    batches: Sequence[Batch]
    states: list[Tensor]
    last: Block | None = None

    def trace(self, i: int, block: Block) -> Trace:
        """Batch i at `block`, on its way from the last one."""
        tokens, call = token_mask(self.batches[i]), self._call(i)
        hidden, layer, done = unpack(self.states[i], tokens), 0, list[Block]()
        if self.last is not None:
            layer, blocks = self.last.layer, self.layout.blocks_of_layer(self.last.layer)
            done = list(blocks[: blocks.index(self.last) + 1])
        for path in self.layout.layers[layer : block.layer]:
            hidden, done = run_layer(self.model, path, hidden, call, done=done), []
        path = self.layout.layers[block.layer]
        return trace_block(self.model, path, hidden, call, block, done=done)

    def go(self, block: Block) -> None:
        """Pass `block`."""
        for i, batch in enumerate(self.batches):
            self.states[i] = pack(self.trace(i, block).total, token_mask(batch))
        self.last = block

    def _call(self, i: int) -> Calls:
        return layer_calls(self.model, self.layout, self.batches[i])[1]


Passed = Callable[[Block, Walk, Walk], None]
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
        return *_solved(added(parts), ridges[0], weight), ridges[0]
    fitted, judged = parts
    errors = {ridge: judged.error(*_solved(fitted, ridge, weight)) for ridge in ridges}
    best = min(errors, key=lambda ridge: errors[ridge])
    if errors[best] >= judged.error(weight, bias):
        return weight, bias, None
    return *_solved(added(parts), best, weight), best


def _solved(moments: Moments, ridge: float, prior: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = solve_weights(moments, ridge, prior=prior)
    assert bias is not None, "an intercept is fitted"
    return weight, bias


def walk_blocks(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    layout: Layout,
    parts: Sequence[Sequence[Batch]],
    solve: Solve,
    *,
    passed: Passed | None = None,
) -> None:
    """Fit the student's out-projections to the teacher, bottom up and in place, with moments of
    their own for several parts of the samples. `passed` is told of the first part.

    As in Kwon et al. 2022, section 4.3, the target is what output plus residual need to be the
    teacher's.
    """
    with torch.no_grad():
        walks = [[_start(model, layout, part) for model in (teacher, student)] for part in parts]
        for block in layout.blocks:
            consumer = student.get_submodule(block.consumer)
            moments = []
            for of_teacher, of_student in walks:
                of_teacher.go(block)
                moments.append(_moments(of_teacher, of_student, block))
            weight, bias = solve(block, moments, consumer.weight, consumer.bias)
            consumer.weight.copy_(weight)
            consumer.bias.copy_(bias)
            for _, of_student in walks:
                of_student.go(block)
            if passed is not None:
                passed(block, *walks[0])


def _start(model: PreTrainedModel, layout: Layout, batches: Sequence[Batch]) -> Walk:
    states = [pack(layer_calls(model, layout, batch)[0], token_mask(batch)) for batch in batches]
    return Walk(model, layout, batches, states)


def _moments(teacher: Walk, student: Walk, block: Block) -> Moments:
    """Of what enters the student's consumer and what it should give; the teacher is past it."""
    outputs, features = student.model.get_submodule(block.consumer).weight.shape
    moments = Moments.zeros(features, outputs)
    for i, batch in enumerate(student.batches):
        tokens, trace = token_mask(batch), student.trace(i, block)
        target = teacher.states[i] - pack(trace.total - trace.output, tokens)
        if trace.features is None:
            moments.add(target.new_zeros(len(target), 0), target)
        else:
            moments.add(pack(trace.features, tokens), target)
    return moments


def fit_norm(block: Block, teacher: Walk, student: Walk) -> None:
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
