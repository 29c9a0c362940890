"""Mask gradients over the calibration batches, and the importance that they give.

Kwon et al. 2022, section 4.1. The masks get a batch dimension, so that one backward pass yields the
gradient of every example. The authors' code takes one gradient per batch instead: 64 vectors for
3072 neurons, whose block Fisher overfits; `gradients="per-batch"` gives that for comparison.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from rfprune import distributed
from rfprune.errors import UserError
from rfprune.model.batch import Batch, model_inputs, token_mask
from rfprune.model.layout import Layout
from rfprune.model.masks import masked
from rfprune.stages.float64 import to_float64
from rfprune.stages.objective import (
    PREDICTIONS,
    Objective,
    batch_generator,
    objective_values,
)

Gradients = tuple[Tensor, ...]
"""One (n, U) matrix per block: n gradient vectors over its units."""


def collect_gradients(
    model: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    *,
    objective: Objective = PREDICTIONS,
    per_batch: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Gradients:
    """Gradients with respect to masks of ones on every head and neuron.

    Args:
        model: frozen (see `rfprune.model.masks.frozen`), so that no weight gradient is computed.
        objective: what is differentiated, see `rfprune.stages.objective.objective_values`.
        per_batch: one vector per batch (the mean over its examples) instead of one per example and
            factor.

    Returns:
        Per block a float32 matrix (n, U) on the CPU.

    Raises:
        UserError: a gradient is not finite (the block is named), or labels are needed and missing.
    """
    own: dict[int, list[list[Tensor]]] = {}
    numbers = distributed.own_batches(len(batches))
    for i in tqdm(numbers, desc="mask gradients", unit="batch", disable=not progress, leave=False):
        generator, own[i] = batch_generator(seed, i), []
        for gradients in _batch_gradients(model, layout, batches[i], objective, generator):
            if per_batch:
                gradients = _batch_means(
                    gradients, signed=objective != PREDICTIONS, generator=generator
                )
            own[i].append([gradient.float().cpu() for gradient in gradients])
    factors = [factor for batch in distributed.all_gather(own) for factor in batch]
    own.clear()
    rows = [list(block_rows) for block_rows in zip(*factors, strict=True)]
    factors.clear()
    collected = tuple(torch.cat(rows.pop(0)) for _ in layout.blocks)  # one copy at a time
    for block, gradient in zip(layout.blocks, collected, strict=True):
        if not torch.isfinite(gradient).all():
            raise UserError(
                f"the mask gradients of {block.name} are not finite; check the checkpoint's "
                "weights, or calibrate in float32 (--dtype float32)"
            )
    return collected


def _batch_gradients(
    model: PreTrainedModel,
    layout: Layout,
    batch: Batch,
    objective: Objective,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, ...]]:
    """For every factor one (B, U) gradient per block; the caller may be in no_grad mode."""
    weight = next(model.parameters())
    num_rows = len(token_mask(batch))
    with torch.inference_mode(False), torch.enable_grad():
        masks = [
            weight.new_ones(num_rows, block.num_units).requires_grad_() for block in layout.blocks
        ]
        with masked(model, layout, masks):
            outputs = model(**model_inputs(batch), return_dict=True)
        factors = objective_values(outputs, batch, model.config, generator, objective=objective)
        totals = [factor.sum() for factor in factors]
    for i, total in enumerate(totals):
        gradients = torch.autograd.grad(total, masks, retain_graph=i + 1 < len(totals))
        # An example may be several rows of the model's: choices, say.
        yield tuple(gradient.unflatten(0, (len(factors[0]), -1)).sum(1) for gradient in gradients)


def _batch_means(
    gradients: tuple[Tensor, ...], *, signed: bool, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """(B, U) -> (1, U). Fisher factors have no sign of their own: random ones keep their mean 0."""
    if not signed:
        coins = torch.randint(0, 2, (len(gradients[0]), 1), generator=generator)
        gradients = tuple(gradient * (2 * coins - 1).to(gradient) for gradient in gradients)
    return tuple(gradient.mean(0, keepdim=True) for gradient in gradients)


def diagonal_fisher(gradients: Gradients) -> tuple[Tensor, ...]:
    """Importance of every unit: the sum of its squared gradients, (U,) float64 per block."""
    return tuple(to_float64(gradient).square().sum(0) for gradient in gradients)


def block_fisher(gradient: Tensor) -> Tensor:
    """Fisher information of one block, (n, U) -> (U, U) float64: a Gram matrix."""
    gradient = to_float64(gradient)
    return gradient.T @ gradient
