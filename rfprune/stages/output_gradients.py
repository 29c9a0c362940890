"""What enters the consumers of all blocks, and the loss gradients at what leaves them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rfprune.model.batch import Batch, model_inputs
from rfprune.model.layout import Layout
from rfprune.stages.objective import Objective, objective_values


def output_gradients(
    model: PreTrainedModel,
    layout: Layout,
    batch: Batch,
    record_inputs: Sequence[Callable[[Tensor], None]],
    generator: torch.Generator,
    *,
    objective: Objective,
) -> Iterator[tuple[tuple[Tensor, ...], ...]]:
    """Run a batch and differentiate it; nothing runs before the first item is asked for.

    Args:
        model: frozen, and not under no_grad.
        record_inputs: one a block, each given what enters its consumer, (B, S, p) or
            (B * S, p), detached, as often as the block runs.
        objective: what is differentiated, see `rfprune.stages.objective.objective_values`.

    Yields:
        For every factor, of every block and each of its runs, (B, S, d), or (B * S, d), padding
        included.
    """
    leaving: list[list[Tensor]] = [[] for _ in layout.blocks]
    with ExitStack() as stack:
        for block, take, left in zip(layout.blocks, record_inputs, leaving, strict=True):
            consumer = model.get_submodule(block.consumer)
            stack.callback(consumer.register_forward_hook(_watch(take, left)).remove)
        outputs = model(**model_inputs(batch), return_dict=True)
    factors = objective_values(outputs, batch, model.config, generator, objective=objective)
    flat = [output for left in leaving for output in left]
    for i, factor in enumerate(factors):
        found = iter(torch.autograd.grad(factor.sum(), flat, retain_graph=i + 1 < len(factors)))
        yield tuple(tuple(islice(found, len(left))) for left in leaving)


def _watch(
    take: Callable[[Tensor], None], leaving: list[Tensor]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """Take in what enters a consumer, and make what leaves it a place to differentiate at."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        take(inputs[0].detach())
        if not output.requires_grad:  # the first block: nothing before it is differentiated
            output = output.detach().requires_grad_()
        leaving.append(output)
        return output

    return hook
