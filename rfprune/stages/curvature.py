"""Kronecker factors of the Fisher information of output projections, and the error curves.

One forward and backward pass over the calibration batches collects two second moments for each
block: A = E[x·xᵀ] of the inputs x of its output projection (the consumer), and G = E[g·gᵀ] of the
loss gradients g at the outputs. Their Kronecker product approximates the Fisher information of that
projection's weight (K-FAC, Martens & Grosse 2015; for pruning, LLM Surgeon, van der Ouderaa et al.
2024). `rfprune.stages.optimal_brain_surgeon` turns them into a removal order and an error curve for
each block. Errors are in nats, so heads and neurons of all layers compare without a weight to tune,
and no labels are needed.

Choices of this project, all by measurement:

- A is centred where the consumer has a bias, which can restore the mean of a removed unit.
- All tokens have equal weight in A. Weighting them by their gradients gave larger divergences.
- Errors in lower layers have more weight; see `DEPTH_WEIGHT`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from rfprune.model.residency import execution_device, resident
from rfprune.stages.calibration import Calibration, require_finite
from rfprune.stages.float64 import to_float64
from rfprune.stages.least_squares import NumericalFailure
from rfprune.stages.objective import batch_generator
from rfprune.stages.optimal_brain_surgeon import ErrorCurve, removal_curve
from rfprune.stages.output_gradients import Record, output_gradients

DAMPING = 1e-2
"""Added to the diagonal of A, as a fraction of its mean diagonal."""

DEPTH_WEIGHT = 1.0
"""Errors in the first layer have exp(DEPTH_WEIGHT) times the weight of errors in the last layer.

The Fisher information is local: it does not include the errors that pruning causes in the layers
above. Layers of pre-norm models have equal weights, since there errors reach the layers above
through the residual connection only.
"""


@dataclass
class KroneckerFactors:
    """Sums over calibration tokens at one output projection, in float32.

    Attributes:
        input_moment: (p, p), sum of x·xᵀ over tokens.
        input_sum: (p,), sum of x over tokens.
        gradient_moment: (d, d), sum of g·gᵀ over tokens and objective values.
        tokens: number of tokens in the sums; a block that runs several times counts each run.
        examples: number of examples.
    """

    input_moment: Tensor
    input_sum: Tensor
    gradient_moment: Tensor
    tokens: int = 0
    examples: int = 0

    def add_inputs(self, rows: Tensor) -> None:
        """Add inputs (tokens, p) of the output projection."""
        self.input_moment += rows.T @ rows
        self.input_sum += rows.sum(0)
        self.tokens += len(rows)

    def add_gradients(self, rows: Tensor) -> None:
        """Add loss gradients (tokens, d) at its outputs."""
        self.gradient_moment += rows.T @ rows

    def input_covariance(self, *, centred: bool = True) -> Tensor:
        """A, with damping on its diagonal, (p, p) float64.

        Args:
            centred: whether A is about the mean of the inputs; False for a projection without bias.
        """
        covariance = to_float64(self.input_moment) / self.tokens
        if centred:
            mean = to_float64(self.input_sum) / self.tokens
            covariance -= torch.outer(mean, mean)
        damping = DAMPING * float(covariance.diagonal().mean())
        covariance.diagonal().add_(max(damping, torch.finfo(torch.float32).tiny))
        return covariance


def collect_curvature(calibration: Calibration) -> tuple[KroneckerFactors, ...]:
    """Kronecker factors of every block over the calibration batches.

    With several processes, the sums of each block are complete in one of them and empty elsewhere.

    Args:
        calibration: the model and its batches.

    Returns:
        One `KroneckerFactors` per block.

    Raises:
        UserError: an activation or gradient is not finite (the block is named), or labels are
            needed and missing.
    """
    blocks = calibration.layout.blocks
    collected = tuple(_zeros(calibration.model, block) for block in blocks)
    steps, hidden = distributed.steps(len(calibration.batches)), not calibration.progress
    for step in tqdm(steps, desc="curvature", unit="batch", disable=hidden, leave=False):
        _add_step(calibration, step, collected)
    for block, factors in zip(blocks, collected, strict=True):
        require_finite(
            block, "activations or gradients", factors.input_moment, factors.gradient_moment
        )
    return collected


def error_curves(
    model: PreTrainedModel,
    layout: Layout,
    collected: Sequence[KroneckerFactors],
    *,
    progress: bool = False,
) -> tuple[ErrorCurve, ...]:
    """Removal order and error curve of every block.

    The predicted increase of the loss of an example is half of the Fisher's quadratic form, summed
    over the example's tokens.

    Args:
        model: the model whose statistics were collected.
        layout: its blocks.
        collected: the Kronecker factors of every block; see `collect_curvature`.
        progress: whether to show a progress bar.

    Returns:
        One curve per block. Errors are in nats, times the weight of the block's layer (see
        `DEPTH_WEIGHT`).

    Raises:
        UserError: the input moments of a block are not positive definite; the block is named.
    """
    curves = {}
    own = [i for i, block in enumerate(layout.blocks) if _keeper(block) == distributed.rank()]
    for i in tqdm(own, desc="error curves", unit="block", disable=not progress, leave=False):
        block, factors = layout.blocks[i], collected[i]
        consumer = linear(model, block.consumer)
        scale = depth_weight(block, layout) / (2 * factors.examples)
        try:
            with resident(consumer):
                curves[i] = removal_curve(
                    factors.input_covariance(centred=consumer.bias is not None),
                    weight_of(consumer).detach(),
                    scale * to_float64(factors.gradient_moment),
                    block.unit_width,
                )
        except NumericalFailure as failure:
            raise UserError(
                f"the error curve of {block.name} cannot be computed: {failure}; calibrate on more "
                "or other examples"
            ) from failure
    return tuple(distributed.all_gather(curves))


def depth_weight(block: Block, layout: Layout) -> float:
    """The weight of errors in the layer of a block; see `DEPTH_WEIGHT`."""
    if block.pre_norm:
        return 1.0
    height = 1 - block.layer / max(1, len(layout.layers) - 1)  # 1 in the first layer, 0 in the last
    return math.exp(DEPTH_WEIGHT * height)


def _keeper(block: Block) -> int:
    """Rank of the process that keeps a block's sums."""
    return block.layer % distributed.world_size()


def _zeros(model: PreTrainedModel, block: Block) -> KroneckerFactors:
    shape = weight_of(model.get_submodule(block.consumer)).shape
    outputs, features = shape if _keeper(block) == distributed.rank() else (0, 0)
    device = execution_device(model)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, device=device)

    return KroneckerFactors(zeros(features, features), zeros(features), zeros(outputs, outputs))


def _add_step(
    calibration: Calibration,
    step: Sequence[int | None],
    collected: Sequence[KroneckerFactors],
) -> None:
    """Add the batches of one step, one batch per process.

    A single process adds rows as soon as it has them. With several processes, the keeper of a block
    receives the rows of all of them. In the last step a process may have no batch. It then runs an
    earlier batch and counts none of its tokens, since all processes must take part in the exchange.

    Args:
        step: number of the batch of every process; None where there is none.
    """
    layout, batches = calibration.layout, calibration.batches
    own = step[distributed.rank()]
    batch = batches[distributed.rank() if own is None else own]
    masks = [block_token_mask(layout, block, batch) for block in layout.blocks]
    tokens = [torch.zeros_like(mask) if own is None else mask for mask in masks]
    generator = batch_generator(calibration.seed, own or 0)
    step_batches = [None if number is None else batches[number] for number in step]
    for factors in collected:
        factors.examples += sum(len(token_mask(one)) for one in step_batches if one is not None)
    if distributed.world_size() == 1:
        direct = [(factors.add_inputs, factors.add_gradients) for factors in collected]
        _record_rows(calibration, batch, tokens, generator, direct)
        return
    rows: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in layout.blocks]
    stored = [(inputs.append, gradients.append) for inputs, gradients in rows]
    _record_rows(calibration, batch, tokens, generator, stored)
    lengths = [
        [
            0 if one is None else int(block_token_mask(layout, block, one).sum())
            for one in step_batches
        ]
        for block in layout.blocks
    ]
    _exchange(layout, collected, rows, lengths)


def _record_rows(
    calibration: Calibration,
    batch: Batch,
    tokens: Sequence[Tensor],
    generator: torch.Generator,
    record: Sequence[tuple[Record, Record]],
) -> None:
    """Run one batch forward and backward, without the rows of padding.

    Args:
        tokens: per block the token mask (B, S).
        record: per block a function for consumer inputs (tokens, p) and one for output gradients
            (tokens, d). Each is called once for every run of the block, and the second one also
            for every objective value.
    """

    def packed(record_rows: Record, mask: Tensor) -> Record:
        return lambda values: record_rows(pack(values, mask).float())

    pairs = list(zip(record, tokens, strict=True))
    record_inputs = [packed(inputs, mask) for (inputs, _), mask in pairs]
    record_gradients = [packed(gradients, mask) for (_, gradients), mask in pairs]
    for block_gradients in output_gradients(calibration, batch, generator, record_inputs):
        for record_one, runs in zip(record_gradients, block_gradients, strict=True):
            for gradient in runs:
                record_one(gradient)


def _exchange(
    layout: Layout,
    collected: Sequence[KroneckerFactors],
    rows: Sequence[tuple[list[Tensor], list[Tensor]]],
    lengths: Sequence[Sequence[int]],
) -> None:
    """Send the rows of every block to its keeper, which adds them in the order of the batches.

    All rows are sent before the first are added, so that the keepers add at the same time.

    Args:
        rows: per block the consumer inputs and output gradients of this process.
        lengths: per block the number of tokens of every process.
    """
    received = [
        [distributed.gather_rows(torch.stack(own, 1), counts, _keeper(block)) for own in pair]
        for block, pair, counts in zip(layout.blocks, rows, lengths, strict=True)
    ]  # each (tokens, runs, p) or (tokens, objective values and runs, d)
    for factors, (inputs, gradients) in zip(collected, received, strict=True):
        for process_rows in inputs:
            for run in process_rows.unbind(1):
                factors.add_inputs(run.contiguous())
        for process_rows in gradients:
            for gradient in process_rows.unbind(1):
                factors.add_gradients(gradient.contiguous())
