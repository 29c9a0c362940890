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
- Where a norm divides the output by its root mean square (Gemma 2), each input is divided by it
  too, and each gradient multiplied. Neither changes the product of a gradient and an output, but A
  and G are averaged apart, and tokens with small outputs, whose gradients are large, would dominate
  G. In Gemma 3 270M the root mean square of the first token is a thousandth of the others'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rfprune import distributed
from rfprune.errors import UserError
from rfprune.model.batch import pack, token_mask
from rfprune.model.encoder_decoder import block_token_mask
from rfprune.model.layerwise import output_rms
from rfprune.model.layout import Block, Layout
from rfprune.model.linear import linear, weight_of
from rfprune.model.residency import execution_device, resident
from rfprune.stages.calibration import Calibration, require_finite
from rfprune.stages.collection import passes
from rfprune.stages.float64 import to_float64
from rfprune.stages.least_squares import ROWS, NumericalFailure
from rfprune.stages.optimal_brain_surgeon import ErrorCurve, removal_curve
from rfprune.stages.output_gradients import LinearOutputs, RecordRun
from rfprune.stages.passes import Pass, Step
from rfprune.stages.tensor_store import KeptTensor, TensorStore

DAMPING = 1e-2
"""Added to the diagonal of A, as a fraction of its mean diagonal."""

ROUNDING = 64 * torch.finfo(torch.float32).eps
"""More than the rounding of the sums over many batches, relative to the trace of x·xᵀ."""

DEPTH_WEIGHT = 1.0
"""Errors in the first layer have exp(DEPTH_WEIGHT) times the weight of errors in the last layer.

The Fisher information is local: it does not include the errors that pruning causes in the layers
above. Layers of pre-norm models have equal weights, since there errors reach the layers above
through the residual connection only.
"""


Record = Callable[[Tensor], None]
"""A function that stores or sums the rows (tokens, n) that it is called with."""


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

    def input_covariance(self, *, centred: bool = True, rounding: float = 0.0) -> Tensor:
        """A, with damping on its diagonal, (p, p), rounded to float32.

        Args:
            centred: whether A is about the mean of the inputs; False for a projection without bias.
            rounding: least damping, as a fraction of the trace of A about zero.
        """
        mean = to_float64(self.input_sum) / self.tokens
        diagonal = to_float64(self.input_moment.diagonal()) / self.tokens
        least = max(rounding * float(diagonal.sum()), torch.finfo(torch.float32).tiny)
        if centred:
            diagonal -= mean.square()
        damping = max(DAMPING * float(diagonal.mean()), least)
        covariance = torch.empty(self.input_moment.shape, device=mean.device)
        for start in range(0, len(covariance), ROWS):
            rows = slice(start, start + ROWS)
            exact = to_float64(self.input_moment[rows]) / self.tokens
            if centred:
                exact -= torch.outer(mean[rows], mean)
            covariance[rows] = exact
        covariance.diagonal().copy_(diagonal + damping)
        return covariance


def collect_curvature(calibration: Calibration) -> Iterator[tuple[int, KroneckerFactors]]:
    """Kronecker factors of every block over the calibration batches.

    Factors are large: use those of a block before the next ones are requested, and drop them. In a
    model that is swept layer by layer no others are in memory then.

    With several processes, the sums of a block are complete in one of them, which yields them.

    Args:
        calibration: the model and its batches.

    Yields:
        The number of a block in the layout, and its factors.

    Raises:
        UserError: hidden states, activations or gradients are not finite (the layer or block is
            named), or labels are needed and missing.
    """
    blocks, model = calibration.layout.blocks, calibration.model
    shapes: Shapes = {}
    sums_bytes = sum(_sums_bytes(model, block) for block in blocks) // distributed.world_size()
    with (
        TensorStore(max_bytes_in_memory=0) as store,
        passes(calibration, "curvature", sums_bytes=sums_bytes) as found,
    ):
        kept: dict[int, _KeptFactors] = {}
        for one in found:
            collected = {
                i: kept[i].load(store) if i in kept else _zeros(model, blocks[i])
                for i in one.blocks
            }
            for step in one.steps:
                _add_step(calibration, one, step, collected, shapes)
            for i in one.blocks:
                factors = collected.pop(i)
                if _keeper(blocks[i]) != distributed.rank():
                    continue
                require_finite(
                    blocks[i],
                    "activations or gradients",
                    factors.input_moment,
                    factors.gradient_moment,
                )
                if one.is_last:
                    yield i, factors
                    del factors  # before the next ones are collected
                else:
                    kept[i] = _KeptFactors.of(factors, store, kept.get(i))


def error_curves(
    model: PreTrainedModel, layout: Layout, collected: Iterable[tuple[int, KroneckerFactors]]
) -> tuple[ErrorCurve, ...]:
    """Removal order and error curve of every block.

    Args:
        model: the model whose statistics were collected.
        layout: its blocks.
        collected: the Kronecker factors of every block; see `collect_curvature`.

    Returns:
        One curve per block; see `error_curve`.
    """
    curves = {i: error_curve(model, layout, layout.blocks[i], one) for i, one in collected}
    return tuple(distributed.all_gather(curves))


def error_curve(
    model: PreTrainedModel, layout: Layout, block: Block, factors: KroneckerFactors
) -> ErrorCurve:
    """Removal order and error curve of one block.

    The predicted increase of the loss of an example is half of the Fisher's quadratic form, summed
    over the example's tokens.

    Inputs that hardly vary about a large mean leave only the rounding of the sums once the mean is
    subtracted. A is then damped by more than this rounding.

    Args:
        model: the model whose statistics were collected.
        layout: its blocks.
        block: one of them.
        factors: of the block.

    Returns:
        The curve. Errors are in nats, times the weight of the block's layer (see `DEPTH_WEIGHT`).

    Raises:
        UserError: the input moments of the block are not positive definite.
    """
    consumer = linear(model, block.consumer)
    scale = depth_weight(block, layout) / (2 * factors.examples)
    with resident(consumer):
        gradients = scale * to_float64(factors.gradient_moment)
        for rounding in (0.0, ROUNDING):
            try:
                curve = removal_curve(
                    factors.input_covariance(centred=consumer.bias is not None, rounding=rounding),
                    weight_of(consumer).detach(),
                    gradients,
                    block.unit_width,
                )
                break
            except NumericalFailure as failure:
                if rounding == ROUNDING:
                    raise UserError(
                        f"the error curve of {block.name} cannot be computed: {failure}; calibrate "
                        "on more or other examples"
                    ) from failure
    return curve


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


def _sums_bytes(model: PreTrainedModel, block: Block) -> int:
    """Bytes of the sums of a block."""
    outputs, features = weight_of(model.get_submodule(block.consumer)).shape
    return 4 * (features * features + features + outputs * outputs)


@dataclass
class _KeptFactors:
    """Factors of a block between two chunks of batches, on disk."""

    tensors: tuple[KeptTensor, ...]
    tokens: int
    examples: int

    @staticmethod
    def of(
        factors: KroneckerFactors, store: TensorStore, earlier: _KeptFactors | None
    ) -> _KeptFactors:
        sums = (factors.input_moment, factors.input_sum, factors.gradient_moment)
        if earlier is None:
            tensors = tuple(store.keep(one) for one in sums)
        else:
            tensors = earlier.tensors
            for kept, one in zip(tensors, sums, strict=True):
                store.replace(kept, one)
        return _KeptFactors(tensors, factors.tokens, factors.examples)

    def load(self, store: TensorStore) -> KroneckerFactors:
        inputs, input_sum, gradients = (store.load(kept) for kept in self.tensors)
        return KroneckerFactors(inputs, input_sum, gradients, self.tokens, self.examples)


Shapes = dict[int, list[tuple[int, ...]]]
"""By number of the block the sizes of its rows on a batch, apart from tokens: consumer inputs
(runs, p), and output gradients (objective values and runs, d)."""


def _add_step(
    calibration: Calibration,
    one: Pass,
    step: Step,
    collected: Mapping[int, KroneckerFactors],
    shapes: Shapes,
) -> None:
    """Add the batches of one step, one batch per process.

    A single process adds rows as soon as it has them. With several processes, the keeper of a block
    receives the rows of all of them, and adds them in the order of the batches. All rows are sent
    before the first are added, so that the keepers add at the same time.

    Args:
        step: number of the batch of every process; in the last step a process may have none.
        collected: factors by number of the block, to which the rows are added.
        shapes: of the rows; noted here for a step in which this process has none.
    """
    layout, batches = calibration.layout, calibration.batches
    numbers = [number for number in step if number is not None]
    for factors in collected.values():
        factors.examples += sum(len(token_mask(batches[number])) for number in numbers)
    own = step[distributed.rank()]
    if distributed.world_size() == 1:
        assert own is not None
        direct = [(factors.add_inputs, factors.add_gradients) for factors in collected.values()]
        _record_rows(calibration, one, own, direct)
        return
    rows: dict[int, tuple[list[Tensor], list[Tensor]]] = {i: ([], []) for i in collected}
    if own is not None:
        stored = [(inputs.append, gradients.append) for inputs, gradients in rows.values()]
        _record_rows(calibration, one, own, stored)
    received = []
    for i, pair in rows.items():
        block = layout.blocks[i]
        lengths = [
            0 if number is None else int(block_token_mask(layout, block, batches[number]).sum())
            for number in step
        ]
        if own is None:
            blank = collected[i].input_sum.new_empty
            stacked = [blank(0, *shape) for shape in shapes[i]]
        else:
            stacked = [torch.stack(each, 1) for each in pair]
            shapes[i] = [tuple(each.shape[1:]) for each in stacked]
        received.append(
            [distributed.gather_rows(each, lengths, _keeper(block)) for each in stacked]
        )
    for factors, (inputs, gradients) in zip(collected.values(), received, strict=True):
        for process_rows in inputs:
            for run in process_rows.unbind(1):
                factors.add_inputs(run.contiguous())
        for process_rows in gradients:
            for gradient in process_rows.unbind(1):
                factors.add_gradients(gradient.contiguous())


def _record_rows(
    calibration: Calibration, one: Pass, number: int, record: Sequence[tuple[Record, Record]]
) -> None:
    """Run one batch forward and backward, without the rows of padding.

    Args:
        number: of the batch.
        record: per block of the pass a function for consumer inputs (tokens, p) and one for output
            gradients (tokens, d). Each is called once for every run of the block, and the second
            one also for every objective value.
    """
    layout, batch, model = calibration.layout, calibration.batches[number], calibration.model
    blocks = [layout.blocks[i] for i in one.blocks]
    masks = [block_token_mask(layout, block, batch) for block in blocks]

    def rows(block: Block, values: Tensor, output: Tensor, mask: Tensor, power: int) -> Tensor:
        packed, rms = pack(values, mask).float(), output_rms(model, block, output)
        return packed if rms is None else packed * pack(rms, mask) ** power

    def record_run(block: Block, record_inputs: Record, mask: Tensor) -> RecordRun:
        return lambda inputs, output: record_inputs(rows(block, inputs, output, mask, -1))

    watch = LinearOutputs(
        model,
        [block.consumer for block in blocks],
        [
            record_run(block, record_inputs, mask)
            for block, (record_inputs, _), mask in zip(blocks, record, masks, strict=True)
        ],
    )
    for found in one.gradients(number, watch):
        by_block = watch.by_map(found), watch.by_map(watch.tensors)
        for block, (_, record_gradients), mask, gradients, outputs in zip(
            blocks, record, masks, *by_block, strict=True
        ):
            for gradient, output in zip(gradients, outputs, strict=True):
                record_gradients(rows(block, gradient, output.detach(), mask, 1))
