"""Mask gradients over the calibration batches, and the Fisher information that they give.

Kwon et al. 2022 (arXiv 2204.09656), section 4.1. The masks have a batch
dimension, so one backward pass yields the gradient of every example.

Departure from the authors' code, which takes one gradient per batch: 64 vectors do not determine
the block Fisher of 3072 neurons, so their rearrangement overfits. `per_batch=True` reproduces it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rfprune import distributed
from rfprune.model.batch import Batch, token_mask
from rfprune.model.layout import Block
from rfprune.model.masks import masked
from rfprune.model.residency import execution_device
from rfprune.stages.calibration import Calibration, require_finite
from rfprune.stages.collection import passes
from rfprune.stages.float64 import to_float64
from rfprune.stages.objective import PREDICTIONS, batch_generator
from rfprune.stages.passes import batch_values

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
    layout = calibration.layout
    own: list[dict[int, list[Tensor]]] = [{} for _ in layout.blocks]
    values_of = partial(_signed_values, calibration) if per_batch else None
    with passes(calibration, "mask gradients", values_of=values_of) as found:
        for one in found:
            blocks = [layout.blocks[i] for i in one.blocks]
            for i in one.own_batches:
                watch = _Masks(calibration, blocks, calibration.batches[i])
                for gradients in one.gradients(i, watch):
                    for number, gradient in zip(one.blocks, gradients, strict=True):
                        rows = watch.by_example(gradient)
                        rows = rows.mean(0, keepdim=True) if per_batch else rows
                        own[number].setdefault(i, []).append(rows.float().cpu())
    collected = []
    for number, block in enumerate(layout.blocks):
        by_batch = {i: torch.cat(rows) for i, rows in own[number].items()}
        own[number].clear()  # memory for one copy, not for two
        collected.append(torch.cat(distributed.all_gather(by_batch)))
        require_finite(block, "mask gradients", collected[-1])
    return tuple(collected)


class _Masks:
    """Masks of ones (B, U) on some blocks; see `rfprune.stages.output_gradients.Watch`.

    Args:
        calibration: the model.
        blocks: those that have masks.
        batch: on which the model runs.
    """

    def __init__(self, calibration: Calibration, blocks: Sequence[Block], batch: Batch) -> None:
        self._model = calibration.model
        self._layout = replace(calibration.layout, blocks=tuple(blocks))
        self._num_examples = max(len(values) for values in batch.values())
        device, dtype = execution_device(calibration.model), calibration.model.dtype
        num_rows = len(token_mask(batch))
        with torch.inference_mode(False):
            self.tensors = [
                torch.ones(num_rows, block.num_units, dtype=dtype, device=device).requires_grad_()
                for block in blocks
            ]

    def attached(self) -> AbstractContextManager[None]:
        """A context in which the masks have an effect."""
        return masked(self._model, self._layout, self.tensors)

    def by_example(self, gradient: Tensor) -> Tensor:
        """Gradients (B, U) of the examples; one of multiple choice is several rows of inputs."""
        rows: Tensor = gradient.unflatten(0, (self._num_examples, -1)).sum(1)
        return rows


def _signed_values(calibration: Calibration, outputs: Any, number: int) -> list[Tensor]:
    """Values of the objective whose gradients may be averaged over a batch.

    The gradients of a Fisher factor have an arbitrary sign. Random signs keep them from cancelling
    or adding up systematically.
    """
    generator = batch_generator(calibration.seed, number)
    values = batch_values(calibration, outputs, number, generator)
    if calibration.objective != PREDICTIONS:
        return values
    coins = (torch.randint(0, 2, (len(value), 1), generator=generator) for value in values)
    return [
        value * (2 * coin[:, 0] - 1).to(value) for value, coin in zip(values, coins, strict=True)
    ]


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
