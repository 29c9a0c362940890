"""Fit the output projections of a pruned student to its teacher, bottom up.

Kwon et al. 2022, section 4.3 (mask tuning). The hidden states of teacher and student advance
together, one block at a time. The target of a block's output projection is

    teacher output + teacher residual - student residual

so that the student's output plus its own residual matches the teacher's. A block therefore also
corrects the errors of the blocks below it (as in K-prune, Park et al., ICLR 2024). Compute: one
forward pass of the teacher and two of the student. Memory: one hidden state per token and model,
and the moments of one block. On a CPU, those of an offloaded student are in a scratch file while
they are not used.

Where a norm divides the output by its root mean square before the residual is added (Gemma 2), the
features are divided by that of the teacher's output instead, and the weight of the norm scales the
output projection. The fit is then linear. It is exact where student and teacher have the same root
mean square, so the target is the teacher's output alone: an output of fixed length has no room for
errors of the residual. With them in the target, the fit of Gemma 3 270M was worse than none.

Layers with shared weights (ALBERT) run several times in a forward pass. Their blocks are fitted
once, to the teacher's outputs in all runs. The inputs of a run depend on the fit itself, through
the earlier runs. So both models are given the teacher's hidden states in each run, and there is no
error to correct and nothing to align. Compute: one forward pass of teacher and student per block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from rfprune import distributed
from rfprune.model.batch import Batch, first_tokens, pack, token_mask
from rfprune.model.depth import without_layers
from rfprune.model.layerwise import LayerCalls, layer_calls, layer_scale, run_layer, trace_block
from rfprune.model.layout import Block, Layout
from rfprune.model.linear import is_empty, linear, weight_of
from rfprune.model.residency import execution_device, is_offloaded, resident
from rfprune.model.weight_store import store_of
from rfprune.stages.align import apply_regression_map, fit_regression_map
from rfprune.stages.float64 import float64_device
from rfprune.stages.hidden_states import HiddenStates, first_hidden_states
from rfprune.stages.least_squares import Moments, NumericalFailure, StoredMoments
from rfprune.stages.tensor_store import TensorStore

HELD_OUT_EVERY = 8
"""One batch of this many is held out from a fit, to choose the ridge and to accept the fit."""

Solve = Callable[[Block, Moments, Moments, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""From a block, the moments of the training and of the held-out batches, and the present weight
(d, p) and bias (d,) or None of its output projection, to a new weight and bias. In families that
scale the output of the projection (layer scale, norm of the output), both include that scale."""


@dataclass(frozen=True)
class Pair:
    """A teacher and its student, which may lack some of the teacher's layers.

    Attributes:
        teacher: the reference model, frozen. Masks on it have an effect.
        student: a compact copy of it, frozen.
        layout: the blocks of the teacher.
        student_layout: the same blocks in the layers that the student has, as they are in it.
    """

    teacher: PreTrainedModel
    student: PreTrainedModel
    layout: Layout
    student_layout: Layout

    @staticmethod
    def of(
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        layout: Layout,
        removed: Collection[int] = (),
    ) -> Pair:
        """The pair, where the student lacks the layers `removed`."""
        return Pair(teacher, student, layout, without_layers(layout, removed))

    def blocks(self, removed: Collection[int]) -> list[FittedBlock]:
        """The student's blocks in the order in which they are fitted."""
        found: list[FittedBlock] = []
        own = iter(self.student_layout.blocks)
        for stack in self.layout.stacks():
            last_kept = max(set(stack) - set(removed))
            for block in (block for block in self.layout.blocks if block.layer in stack):
                if block.layer not in removed:
                    found.append(FittedBlock(next(own), block, block))
                elif (
                    found
                    and found[-1].original.layer in stack
                    and (block.pre_norm or block.layer > last_kept)
                ):
                    found[-1] = replace(found[-1], target=block)
        return found


@dataclass(frozen=True)
class FittedBlock:
    """A block of the student and what it is fitted to.

    Attributes:
        own: the block in the student.
        original: the same block in the teacher, which may be in a layer of another number. Results
            and warnings are named by it.
        target: the block of the teacher whose output plus residual is the target: `original`, or
            the last block of the layers above that the student lacks. Inside a post-norm stack,
            whose hidden states pass other norms there, it is `original`.
    """

    own: Block
    original: Block
    target: Block


@dataclass(frozen=True)
class BlockFit:
    """How the output projections are fitted.

    Attributes:
        solve: computes the new weight and bias of one block.
        skip: consumers that are not fitted.
        first_token_only: consumers that are fitted on the first token of every example alone.
        align: whether input projections are aligned as well; see `rfprune.stages.align`.
        removed: indices of layers of the teacher that the student lacks. Each layer of the student
            is fitted to the teacher's layer that it came from.
    """

    solve: Solve
    skip: Collection[str] = ()
    first_token_only: Collection[str] = ()
    align: bool = False
    removed: Collection[int] = ()


def reconstruct(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    fit: BlockFit,
    *,
    progress: bool = False,
) -> list[str]:
    """Fit every block of `student` to `teacher`, in place.

    Args:
        teacher: the reference model, frozen. Masks on it have an effect.
        student: a compact copy of the model that `layout` describes, frozen.
        layout: the blocks of the teacher.
        batches: calibration batches with token masks, on the models' device.
        fit: how a block is fitted.
        progress: whether to show a progress bar.

    Returns:
        One warning for every block whose fit or alignment failed. Weights of a failed step are
        unchanged, and the other blocks are fitted all the same.
    """
    pair = Pair.of(teacher, student, layout, fit.removed)
    blocks = [one for one in pair.blocks(fit.removed) if one.original.consumer not in fit.skip]
    bar = tqdm(blocks, desc="reconstruction", unit="block", disable=not progress, leave=False)
    method = _fit_shared_layers if layout.execution_order else _fit_bottom_up
    with torch.no_grad():
        return method(pair, distributed.shard(batches), fit, bar)


def _fit_bottom_up(
    pair: Pair, batches: Sequence[Batch], fit: BlockFit, blocks: Iterable[FittedBlock]
) -> list[str]:
    warnings: list[str] = []
    models, layouts = (pair.teacher, pair.student), (pair.layout, pair.student_layout)
    # On a GPU, moving moments would take longer than the solves.
    on_disk = is_offloaded(pair.student) and execution_device(pair.student).type == "cpu"
    states = first_hidden_states(models, layouts, batches, in_decoder=False)
    is_first = True
    for (layer, own), blocks_of_layer in groupby(
        blocks, key=lambda block: (block.original.layer, block.own.layer)
    ):
        if layer in pair.layout.layer_indices(decoder=True) and not states[0].encoder_outputs:
            states = first_hidden_states(models, layouts, batches, in_decoder=True)
            is_first = True
        path = pair.student_layout.layers[own]
        store = store_of(pair.student.get_submodule(path))
        finished = None if store is None else store.warnings_of(path)
        new_warnings: list[str] = []
        with (
            resident(pair.teacher.get_submodule(pair.layout.layers[layer])),
            resident(pair.student.get_submodule(path), write_back=finished is None),
        ):
            for block in blocks_of_layer:
                if finished is None:
                    _take_over_norm(pair, block)
                    if fit.align and not is_first:
                        new_warnings += _align_input_projections(*states, block)
                    first_only = block.original.consumer in fit.first_token_only
                    with TensorStore(max_bytes_in_memory=0) as store_of_block:
                        moments = _collect_moments(
                            *states,
                            block,
                            first_token_only=first_only,
                            store=store_of_block if on_disk else None,
                        )
                        new_warnings += _fit_block(fit.solve, pair.student, block, moments)
                    del moments  # before those of the next block are collected
                else:  # by an earlier run
                    states[0].advance(block.target)
                states[1].advance(block.own)
                is_first = False
        if store is not None and finished is None:
            store.finish(path, new_warnings)
        warnings += new_warnings if finished is None else finished
    return warnings


def _fit_shared_layers(
    pair: Pair, batches: Sequence[Batch], fit: BlockFit, blocks: Iterable[FittedBlock]
) -> list[str]:
    warnings = []
    for block in blocks:
        path = pair.student_layout.layers[block.own.layer]
        with resident(pair.student.get_submodule(path), write_back=True):
            moments = _collect_moments_of_runs(pair, batches, block.original)
            warnings += _fit_block(fit.solve, pair.student, block, moments)
    return warnings


def _take_over_norm(pair: Pair, block: FittedBlock) -> None:
    """Give a post-norm block that is fitted to the input of another norm that norm's weights."""
    own, target = block.own.sublayer.next_norm, block.target.sublayer.next_norm
    if block.target is not block.original and own is not None and target is not None:
        norm = pair.teacher.get_submodule(target)
        pair.student.get_submodule(own).load_state_dict(norm.state_dict())


class SplitMoments(NamedTuple):
    """Moments of the batches that a fit is made on, and of the held-out ones."""

    train: Moments
    held_out: Moments

    @staticmethod
    def zeros(num_features: int, num_outputs: int, device: torch.device) -> SplitMoments:
        where = float64_device(device)
        return SplitMoments(*(Moments.zeros(num_features, num_outputs, where) for _ in range(2)))

    def add(self, i: int, features: Tensor, targets: Tensor) -> None:
        """Add features (tokens, p) and targets (tokens, d) of batch i of this process."""
        self[is_held_out(i)].add(features, targets)

    def all_reduce(self) -> SplitMoments:
        """Sum over all processes, in place."""
        for moments in self:
            _all_reduce(moments)
        return self


def is_held_out(i: int) -> bool:
    """Whether batch i of this process is held out from a fit."""
    return distributed.batch_number(i) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def _all_reduce(moments: Moments) -> None:
    """Sum over all processes, in place."""
    numbers = moments.gram.new_tensor([moments.target_energy, moments.count])
    distributed.all_reduce(
        moments.gram, moments.cross, moments.feature_sum, moments.target_sum, numbers
    )
    moments.target_energy, moments.count = float(numbers[0]), int(numbers[1])


def _collect_moments(
    teacher: HiddenStates,
    student: HiddenStates,
    block: FittedBlock,
    *,
    first_token_only: bool,
    store: TensorStore | None,
) -> SplitMoments:
    """Moments of the inputs of the student's output projection and of their targets.

    The stored hidden states of the teacher advance to the output of the block. Those of the student
    do so once the block has been fitted.

    Args:
        store: for the moments while they are not used; None: they stay in memory.
    """
    batches = range(len(student.batches))
    parts: list[Moments] = []
    for held_out in (False, True):
        moments = _empty_moments(student.model, block.own)
        for i in batches:
            if is_held_out(i) == held_out:
                moments.add(*_fit_data(teacher, student, block, i, first_token_only))
        _all_reduce(moments)
        parts.append(moments if store is None else StoredMoments(moments, store))
    if not block.target.sublayer.parallel:
        teacher.block = block.target
    return SplitMoments(*parts)


def _fit_data(
    teacher: HiddenStates,
    student: HiddenStates,
    block: FittedBlock,
    i: int,
    first_token_only: bool,
) -> tuple[Tensor, Tensor]:
    """Features (tokens, p) and targets (tokens, d) of batch i; the teacher's states advance."""
    own = block.own
    tokens = student.tokens(i, own)
    teacher_calls, student_calls = _layer_calls(teacher, student, i)
    wanted = teacher.trace(i, block.original, teacher_calls)
    wanted_sum = wanted.residual_sum
    if block.target is not block.original:
        wanted_sum = teacher.trace(i, block.target, teacher_calls).residual_sum
    teacher.store(i, block.target, wanted_sum)
    trace = student.trace(i, own, student_calls)
    chosen = first_tokens(tokens) if first_token_only else tokens
    if wanted.output_rms is not None:
        target = pack(wanted.output, chosen)
        return _features(trace.features, chosen, target) / pack(wanted.output_rms, chosen), target
    residual = pack(trace.residual_sum, chosen) - pack(trace.output, chosen)
    target = pack(wanted_sum, chosen) - residual
    return _features(trace.features, chosen, target), target


def _collect_moments_of_runs(pair: Pair, batches: Sequence[Batch], block: Block) -> SplitMoments:
    """The same over all runs of a block, with the teacher's hidden states as the input of each."""
    teacher, student, layout = pair.teacher, pair.student, pair.layout
    moments = SplitMoments(*(_empty_moments(student, block) for _ in range(2)))
    blocks = layout.blocks_of_layer(block.layer)
    before = blocks[: blocks.index(block)]
    for i, batch in enumerate(batches):
        tokens = token_mask(batch)
        hidden, calls = layer_calls(teacher, layout, batch)
        for layer in layout.execution_order:
            path, state = layout.layers[layer], hidden
            if layer == block.layer:
                if before:
                    state = trace_block(teacher, path, hidden, calls, before[-1]).residual_sum
                wanted = trace_block(teacher, path, state, calls, block, skip=before)
                trace = trace_block(student, path, state, calls, block, skip=before)
                target = pack(wanted.output, tokens)
                moments.add(i, _features(trace.features, tokens, target), target)
            hidden = run_layer(teacher, path, hidden, calls)
    return moments.all_reduce()


def _empty_moments(student: PreTrainedModel, block: Block) -> Moments:
    weight = weight_of(student.get_submodule(block.consumer))
    num_outputs, num_features = weight.shape
    return Moments.zeros(num_features, num_outputs, float64_device(weight.device))


def _features(features: Tensor | None, tokens: Tensor, target: Tensor) -> Tensor:
    """Features at the given tokens, (tokens, p); p is 0 where a block has no units left."""
    return target.new_zeros(len(target), 0) if features is None else pack(features, tokens)


def _layer_calls(
    teacher: HiddenStates, student: HiddenStates, i: int
) -> tuple[LayerCalls, LayerCalls]:
    """Arguments of the layers of both models on batch i.

    They are the same unless the layers are those of a decoder, which attends to an encoder, or the
    student has fewer. The student can take the teacher's arguments, but not the other way round: a
    position bias may have a slice for each head of the model that made it.
    """
    teacher_calls = teacher.layer_calls(i)
    has_own = bool(student.encoder_outputs) or student.layout.layers != teacher.layout.layers
    return teacher_calls, student.layer_calls(i) if has_own else teacher_calls


def _align_input_projections(
    teacher: HiddenStates, student: HiddenStates, block: FittedBlock
) -> list[str]:
    """Multiply the input projections of a block by a regression map: all of them or none.

    Returns:
        A warning if the alignment failed, else nothing.
    """
    own = block.own
    if is_empty(student.model, own.consumer):
        return []
    projections = [linear(student.model, path) for path in own.input_projections]
    moments = _collect_input_moments(teacher, student, block)
    try:
        maps = {
            has_bias: fit_regression_map(*moments, intercept=has_bias)
            for has_bias in {projection.bias is not None for projection in projections}
        }
        aligned = [
            apply_regression_map(weight_of(each), each.bias, *maps[each.bias is not None])
            for each in projections
        ]
    except NumericalFailure as failure:
        return [f"the input projections of {block.original.name} were left unchanged: {failure}"]
    for projection, (weight, bias) in zip(projections, aligned, strict=True):
        weight_of(projection).copy_(weight)
        if bias is not None:
            projection.bias.copy_(bias)
    return []


def _collect_input_moments(
    teacher: HiddenStates, student: HiddenStates, block: FittedBlock
) -> SplitMoments:
    """Moments of the student's inputs of a block (features) and of the teacher's (targets)."""
    size = student.values[0].shape[1]
    moments = SplitMoments.zeros(size, size, student.values[0].device)
    for i in range(len(student.batches)):
        tokens = student.tokens(i, block.own)
        teacher_calls, student_calls = _layer_calls(teacher, student, i)
        features = student.block_input(i, block.own, student_calls)
        targets = teacher.block_input(i, block.original, teacher_calls)
        moments.add(i, pack(features, tokens), pack(targets, tokens))
    return moments.all_reduce()


def _fit_block(
    solve: Solve, student: PreTrainedModel, block: FittedBlock, moments: SplitMoments
) -> list[str]:
    """Fit the output projection of one block, in place.

    Returns:
        A warning if the fit failed, else nothing.
    """
    consumer = student.get_submodule(block.own.consumer)
    weight, bias, scale = weight_of(consumer), consumer.bias, layer_scale(student, block.own)
    try:
        if scale is None:
            new_weight, new_bias = solve(block.original, *moments, weight, bias)
        else:
            scaled_bias = None if bias is None else scale * bias
            new_weight, new_bias = solve(
                block.original, *moments, scale[:, None] * weight, scaled_bias
            )
            new_weight = _divide(new_weight, scale[:, None], weight)
            new_bias = None if new_bias is None else _divide(new_bias, scale, bias)
        if not all(torch.isfinite(new).all() for new in (new_weight, new_bias) if new is not None):
            raise NumericalFailure("the fitted weights are not finite")
    except NumericalFailure as failure:
        return [f"{block.original.name} was left unchanged: {failure}"]
    weight.copy_(new_weight)
    if new_bias is not None:
        bias.copy_(new_bias)
    return []


def _divide(scaled: Tensor, scale: Tensor, before: Tensor) -> Tensor:
    """Undo a layer scale; where it is zero, the value before the fit."""
    return torch.where(scale == 0, before, scaled.to(before) / scale)
