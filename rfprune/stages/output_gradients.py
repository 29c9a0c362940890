"""Inputs of all output projections on a batch, and the loss gradients at their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice

import torch
from torch import Tensor, nn

from rfprune.errors import UserError
from rfprune.model.batch import Batch, model_inputs
from rfprune.stages.calibration import Calibration
from rfprune.stages.objective import objective_values

Record = Callable[[Tensor], None]
"""A function that stores or sums the tensor that it is called with."""


def output_gradients(
    calibration: Calibration,
    batch: Batch,
    generator: torch.Generator,
    record_inputs: Sequence[Record],
    paths: Sequence[str] | None = None,
) -> Iterator[tuple[tuple[Tensor, ...], ...]]:
    """Run the model on a batch and differentiate its objective at the output of every consumer.

    This is a generator: the forward pass runs when the first item is requested. The caller must
    have gradients enabled.

    Args:
        batch: one of the calibration batches.
        generator: of sampled labels.
        record_inputs: one function per block. It is called with the input of the block's consumer,
            (B, S, p) or (B * S, p), detached, once for each run of the block.
        paths: of other linear maps, which then take the place of the blocks' consumers.

    Raises:
        UserError: the objective does not depend on every block.

    Yields:
        One item for each objective value of an example (one per class, for instance). An item holds
        for every block, and each of its runs, the gradient (B, S, d) or (B * S, d) at the
        consumer's output, including padding.
    """
    model = calibration.model
    if paths is None:
        paths = [block.consumer for block in calibration.layout.blocks]
    outputs: list[list[Tensor]] = [[] for _ in paths]
    with ExitStack() as stack:
        for path, record, block_outputs in zip(paths, record_inputs, outputs, strict=True):
            hook = _recording_hook(record, block_outputs)
            stack.callback(model.get_submodule(path).register_forward_hook(hook).remove)
        predictions = model(**model_inputs(batch), return_dict=True)
    values = objective_values(
        predictions, batch, model.config, generator, objective=calibration.objective
    )
    flat = [output for block_outputs in outputs for output in block_outputs]
    for i, value in enumerate(values):
        keep = i + 1 < len(values)
        found = torch.autograd.grad(value.sum(), flat, retain_graph=keep, allow_unused=True)
        if any(gradient is None for gradient in found):
            raise UserError(
                "the loss does not depend on every layer of the model; compute it from the outputs "
                "of the last layer or of the head"
            )
        gradients = iter(found)
        yield tuple(tuple(islice(gradients, len(block_outputs))) for block_outputs in outputs)


def _recording_hook(
    record: Record, outputs: list[Tensor]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        record(inputs[0].detach())
        if not output.requires_grad:  # the first block of a frozen model: its output is a leaf
            output = output.detach().requires_grad_()
        outputs.append(output)
        return output

    return hook
