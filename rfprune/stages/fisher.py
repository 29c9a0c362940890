"""Mask gradients over the calibration batches, and the Fisher information that they give.

Kwon et al. 2022 (arXiv 2204.09656), section 4.1. The masks have a batch
dimension, so one backward pass yields the gradient of every example.

Departure from the authors' code, which takes one gradient per batch: 64 vectors do not determine
the block Fisher of 3072 neurons, so their rearrangement overfits. `per_batch=True` reproduces it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from rfprune import distributed
from rfprune.model.batch import Batch, model_inputs, token_mask
from rfprune.model.masks import masked
from rfprune.model.residency import execution_device
from rfprune.stages.calibration import Calibration, require_finite
from rfprune.stages.float64 import to_float64
from rfprune.stages.objective import PREDICTIONS, batch_generator, objective_values

Gradients = tuple[Tensor, ...]
"""One (n, U) matrix per block: n gradient vectors over its units."""


def collect_gradients(calibration: Calibration, *, per_batch: bool = False) -> Gradients:
    """Gradients of the objective with respect to masks of ones on every head and neuron.

    Args:
        calibration: the model and its batches.
        per_batch: one vector per batch (the mean over its examples) instead of one per example and
            objective value.

    Returns:
        A float32 matrix (n, U) on the CPU for every block.

    Raises:
        UserError: a gradient is not finite (the block is named), or labels are needed and missing.
    """
    batches, objective = calibration.batches, calibration.objective
    own: dict[int, list[list[Tensor]]] = {}
    numbers = distributed.own_batches(len(batches))
    hidden = not calibration.progress
    for i in tqdm(numbers, desc="mask gradients", unit="batch", disable=hidden, leave=False):
        generator, own[i] = batch_generator(calibration.seed, i), []
        for gradients in _batch_gradients(calibration, batches[i], generator):
            if per_batch:
                gradients = _batch_means(
                    gradients, signed=objective != PREDICTIONS, generator=generator
                )
            own[i].append([gradient.float().cpu() for gradient in gradients])
    vectors = [vector for batch in distributed.all_gather(own) for vector in batch]
    own.clear()
    rows = [list(block_rows) for block_rows in zip(*vectors, strict=True)]
    vectors.clear()
    # Each block's rows are freed once they are concatenated: memory for one copy, not for two.
    collected = tuple(torch.cat(rows.pop(0)) for _ in calibration.layout.blocks)
    for block, gradient in zip(calibration.layout.blocks, collected, strict=True):
        require_finite(block, "mask gradients", gradient)
    return collected


def _batch_gradients(
    calibration: Calibration, batch: Batch, generator: torch.Generator
) -> Iterator[tuple[Tensor, ...]]:
    """For every objective value, a gradient (B, U) per block; also under no_grad."""
    model, layout = calibration.model, calibration.layout
    device, dtype = execution_device(model), model.dtype
    num_rows = len(token_mask(batch))
    with torch.inference_mode(False), torch.enable_grad():
        masks = [
            torch.ones(num_rows, block.num_units, dtype=dtype, device=device, requires_grad=True)
            for block in layout.blocks
        ]
        with masked(model, layout, masks):
            outputs = model(**model_inputs(batch), return_dict=True)
        values = objective_values(
            outputs, batch, model.config, generator, objective=calibration.objective
        )
        totals = [value.sum() for value in values]
    for i, total in enumerate(totals):
        gradients = torch.autograd.grad(total, masks, retain_graph=i + 1 < len(totals))
        # A multiple-choice example is several rows of the model's input.
        yield tuple(gradient.unflatten(0, (len(values[0]), -1)).sum(1) for gradient in gradients)


def _batch_means(
    gradients: tuple[Tensor, ...], *, signed: bool, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Mean over a batch, (B, U) -> (1, U).

    The gradients of a Fisher factor have an arbitrary sign (`signed` is false). Random signs keep
    them from cancelling or adding up systematically.
    """
    if not signed:
        coins = torch.randint(0, 2, (len(gradients[0]), 1), generator=generator)
        gradients = tuple(gradient * (2 * coins - 1).to(gradient) for gradient in gradients)
    return tuple(gradient.mean(0, keepdim=True) for gradient in gradients)


def diagonal_fisher(gradients: Gradients) -> tuple[Tensor, ...]:
    """Importance of every unit: the sum of its squared gradients.

    Kwon et al. 2022, section 4.1.

    Args:
        gradients: a matrix (n, U) per block; see `collect_gradients`.

    Returns:
        A float64 vector (U,) per block.
    """
    return tuple(to_float64(gradient).square().sum(0) for gradient in gradients)


def block_fisher(gradient: Tensor) -> Tensor:
    """Fisher information of one block's mask: the Gram matrix of its gradients.

    Kwon et al. 2022, section 4.2: the off-diagonal entries are the interactions between units.

    Args:
        gradient: (n, U).

    Returns:
        A float64 matrix (U, U).
    """
    gradient = to_float64(gradient)
    return gradient.T @ gradient
