"""Error curves of all blocks in one unit of loss: what goes past the published method.

One forward and backward pass over the calibration batches gives every block the second moments A of
its consumer's inputs and G of the loss gradient at its consumer's outputs. Greedy removal (see
`rfprune.stages.optimal_brain_surgeon`) turns them into a removal order and an error curve that is
comparable between heads and neurons and between layers, with no weight to tune and no labels.

Choices of our own: A is taken about the mean where the consumer has a bias, which makes up for a
mean at no cost; all tokens count alike in A, which did better than weighting them by their
gradient; errors low in the model weigh more than errors above (`DEPTH_WEIGHT`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from rfprune import distributed
from rfprune.errors import UserError
from rfprune.model.batch import Batch, pack, token_mask
from rfprune.model.encoder_decoder import block_token_mask
from rfprune.model.layout import Block, Layout
from rfprune.model.linear import linear, weight_of
from rfprune.stages.float64 import to_float64
from rfprune.stages.least_squares import NumericalFailure
from rfprune.stages.objective import PREDICTIONS, Objective, batch_generator
from rfprune.stages.optimal_brain_surgeon import ErrorCurve, removal_curve
from rfprune.stages.output_gradients import output_gradients

DAMPING = 1e-2
"""Added to the diagonal of A, as a fraction of its mean diagonal."""

DEPTH_WEIGHT = 1.0
"""An error in the first layer counts exp(DEPTH_WEIGHT) times as much as one in the last: the Fisher
information is local, and does not know that the blocks above have moved as well. Not so where norms
come first: there errors are handed on by the residual alone, and all layers count alike."""


@dataclass
class KroneckerFactors:
    """Sums over the calibration tokens, float32.

    Attributes:
        input_moment: (p, p), of x·xᵀ. input_sum: (p,). gradient_moment: (d, d), of g·gᵀ.
        tokens: how many. examples: how many they come from.
    """

    input_moment: Tensor
    input_sum: Tensor
    gradient_moment: Tensor
    tokens: int = 0
    examples: int = 0

    def add_inputs(self, rows: Tensor) -> None:
        """Take in what enters the consumer, (tokens, p)."""
        self.input_moment += rows.T @ rows
        self.input_sum += rows.sum(0)
        self.tokens += len(rows)

    def add_gradients(self, rows: Tensor) -> None:
        """Take in the gradients at what leaves it, (tokens, d)."""
        self.gradient_moment += rows.T @ rows

    def input_covariance(self, *, about_mean: bool = True) -> Tensor:
        """A (p, p) float64, damped; about the mean, or about zero where nothing makes up for it."""
        covariance = to_float64(self.input_moment) / self.tokens
        if about_mean:
            mean = to_float64(self.input_sum) / self.tokens
            covariance -= torch.outer(mean, mean)
        damping = DAMPING * float(covariance.diagonal().mean())
        covariance.diagonal().add_(max(damping, torch.finfo(torch.float32).tiny))
        return covariance


def collect_curvature(
    model: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    *,
    objective: Objective = PREDICTIONS,
    seed: int = 0,
    progress: bool = False,
) -> tuple[KroneckerFactors, ...]:
    """Second moments at every block's consumer over the calibration batches.

    Args:
        model: frozen (see `rfprune.model.masks.frozen`), so that no weight gradient is computed.
        objective: what is differentiated, see `rfprune.stages.objective.objective_values`.

    Raises:
        UserError: a moment is not finite; the block is named.
    """
    collected = tuple(_nothing_yet(model, block) for block in layout.blocks)
    turns = distributed.steps(len(batches))
    for turn in tqdm(turns, desc="curvature", unit="batch", disable=not progress, leave=False):
        _add_turn(model, layout, batches, turn, collected, objective, seed)
    for block, curvature in zip(layout.blocks, collected, strict=True):
        for moment in (curvature.input_moment, curvature.gradient_moment):
            if not torch.isfinite(moment).all():
                raise UserError(
                    f"the activations or gradients of {block.name} are not finite; check the "
                    "checkpoint's weights, or calibrate in float32 (--dtype float32)"
                )
    return collected


def _keeper(block: Block) -> int:
    """The process that keeps a block's sums."""
    return block.layer % distributed.world_size()


def _nothing_yet(model: PreTrainedModel, block: Block) -> KroneckerFactors:
    weight = weight_of(model.get_submodule(block.consumer))

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, device=weight.device)

    outputs, features = weight.shape if _keeper(block) == distributed.rank() else (0, 0)
    return KroneckerFactors(zeros(features, features), zeros(features), zeros(outputs, outputs))


def _add_turn(
    model: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    turn: Sequence[int | None],
    collected: Sequence[KroneckerFactors],
    objective: Objective,
    seed: int,
) -> None:
    """Every process runs its batch of a turn; the sums of a block are kept by one of them.

    A process alone takes in what it sees as it sees it. One that has no batch left runs its first
    one again, of which no token counts.
    """
    others = [None if number is None else batches[number] for number in turn]
    own, number = others[distributed.rank()], turn[distributed.rank()]
    batch = batches[distributed.rank() if number is None else number]
    masks = [block_token_mask(layout, block, batch) for block in layout.blocks]
    tokens = [torch.zeros_like(mask) if own is None else mask for mask in masks]
    generator = batch_generator(seed, number or 0)
    for curvature in collected:
        curvature.examples += sum(len(token_mask(other)) for other in others if other is not None)
    if distributed.world_size() == 1:
        record_inputs = [(curvature.add_inputs, curvature.add_gradients) for curvature in collected]
        _run(model, layout, batch, tokens, record_inputs, objective, generator)
        return
    seen: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in layout.blocks]
    waiting = [(inputs.append, gradients.append) for inputs, gradients in seen]
    _run(model, layout, batch, tokens, waiting, objective, generator)
    lengths = [
        [
            0 if other is None else int(block_token_mask(layout, block, other).sum())
            for other in others
        ]
        for block in layout.blocks
    ]
    _exchange(layout, collected, seen, lengths)


Taker = Callable[[Tensor], None]


def _run(
    model: PreTrainedModel,
    layout: Layout,
    batch: Batch,
    tokens: Sequence[Tensor],
    record_inputs: Sequence[tuple[Taker, Taker]],
    objective: Objective,
    generator: torch.Generator,
) -> None:
    """Give the takers of every block, at its tokens (B, S), what enters its consumer, (tokens, p),
    and by factor the gradient at what leaves it, (tokens, d); both as often as the block runs.
    """

    def packed(take: Taker, mask: Tensor) -> Taker:
        return lambda values: take(pack(values, mask).float())

    pairs = list(zip(record_inputs, tokens, strict=True))
    entering = [packed(take_inputs, mask) for (take_inputs, _), mask in pairs]
    leaving = [packed(take_gradients, mask) for (_, take_gradients), mask in pairs]
    for gradients in output_gradients(
        model, layout, batch, entering, generator, objective=objective
    ):
        for take, of_runs in zip(leaving, gradients, strict=True):
            for gradient in of_runs:
                take(gradient)


def _exchange(
    layout: Layout,
    collected: Sequence[KroneckerFactors],
    seen: Sequence[tuple[list[Tensor], list[Tensor]]],
    lengths: Sequence[Sequence[int]],
) -> None:
    """Bring what was seen of every block to its keeper, which takes it in batch by batch.

    First all is passed on and then all is taken in, so that the keepers work at the same time.
    """
    passed = [
        [distributed.gather_rows(torch.stack(rows, 1), own, _keeper(block)) for rows in pair]
        for block, pair, own in zip(layout.blocks, seen, lengths, strict=True)
    ]  # each (tokens, runs or factors and runs, p or d)
    for curvature, (inputs, gradients) in zip(collected, passed, strict=True):
        for rows in inputs:
            for run in rows.unbind(1):
                curvature.add_inputs(run.contiguous())
        for rows in gradients:
            for factor in rows.unbind(1):
                curvature.add_gradients(factor.contiguous())


def error_curves(
    model: PreTrainedModel,
    layout: Layout,
    collected: Sequence[KroneckerFactors],
    *,
    progress: bool = False,
) -> tuple[ErrorCurve, ...]:
    """Removal order and error curve of every block.

    The loss of an example grows by half of the Fisher's quadratic form, summed over its tokens; in
    nats, before depth is weighted in (see `DEPTH_WEIGHT`).

    Raises:
        UserError: the moments of a block are degenerate beyond repair; the block is named.
    """
    curves = {}
    own = [i for i, block in enumerate(layout.blocks) if _keeper(block) == distributed.rank()]
    for i in tqdm(own, desc="error curves", unit="block", disable=not progress, leave=False):
        block, moments = layout.blocks[i], collected[i]
        consumer = linear(model, block.consumer)
        importance = _weight(block, layout) / (2 * moments.examples)
        gradients = importance * to_float64(moments.gradient_moment)
        try:
            curves[i] = removal_curve(
                moments.input_covariance(about_mean=consumer.bias is not None),
                weight_of(consumer).detach(),
                gradients,
                block.unit_width,
            )
        except NumericalFailure as failure:
            raise UserError(
                f"no error curve can be made for {block.name}: {failure}; calibrate on more or "
                "other examples"
            ) from failure
    return tuple(distributed.all_gather(curves))


def _weight(block: Block, layout: Layout) -> float:
    """How much an error in this block counts; see `DEPTH_WEIGHT`."""
    if block.pre_norm:
        return 1.0
    height = 1 - block.layer / max(1, len(layout.layers) - 1)  # 1 at the bottom, 0 at the top
    return math.exp(DEPTH_WEIGHT * height)
