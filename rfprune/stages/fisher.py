"""Mask gradients over the calibration batches, and the importance that they give (Kwon et al. 2022, section 4.1).

The masks get a batch dimension, so that one backward pass yields the gradient of every example. The authors' code
takes one gradient per batch instead: 64 vectors for 3072 neurons, whose block Fisher overfits;
`gradients="per-batch"` gives that for comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from rfprune.errors import UserError
from rfprune.model.layout import Layout
from rfprune.model.masks import masked
from rfprune.model.replay import Batch
from rfprune.stages.objective import LABELS, fisher_factors, label_losses

Gradients = tuple[Tensor, ...]
"""One (n, U) matrix per block: n gradient vectors over its units."""


def collect_gradients(
    model: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    *,
    use_labels: bool = False,
    per_batch: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Gradients:
    """Gradients with respect to masks of ones on every head and neuron.

    Args:
        model: frozen (see `rfprune.model.masks.frozen`), so that no weight gradient is computed.
        use_labels: differentiate the loss on the labels instead of the label-free Fisher factors.
        per_batch: one vector per batch (the mean over its examples) instead of one per example and factor.

    Returns:
        Per block a float32 matrix (n, U) on the CPU.

    Raises:
        UserError: a gradient is not finite; the block is named.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[Tensor]] = [[] for _ in layout.blocks]
    for batch in tqdm(batches, desc="mask gradients", unit="batch", disable=not progress, leave=False):
        for gradients in _batch_gradients(model, layout, batch, use_labels, generator):
            for block_rows, gradient in zip(rows, gradients, strict=True):
                gradient = gradient.mean(0, keepdim=True) if per_batch else gradient
                block_rows.append(gradient.float().cpu())
    collected = tuple(torch.cat(block_rows) for block_rows in rows)
    for block, gradient in zip(layout.blocks, collected, strict=True):
        if not torch.isfinite(gradient).all():
            raise UserError(
                f"the mask gradients of {block.name} are not finite; check the checkpoint's weights, "
                "or calibrate in float32 (--dtype float32)"
            )
    return collected


def _batch_gradients(
    model: PreTrainedModel, layout: Layout, batch: Batch, use_labels: bool, generator: torch.Generator
) -> Iterable[tuple[Tensor, ...]]:
    weight = next(model.parameters())
    num_examples = len(next(iter(batch.values())))
    masks = [
        torch.ones(num_examples, block.num_units, device=weight.device, dtype=weight.dtype, requires_grad=True)
        for block in layout.blocks
    ]
    inputs = {name: value for name, value in batch.items() if name not in LABELS}
    with masked(model, layout, masks):
        outputs = model(**inputs)
    if use_labels:
        factors = label_losses(outputs, batch, model.config)
    else:
        factors = fisher_factors(outputs, model.config, generator)
    for i, factor in enumerate(factors):
        yield torch.autograd.grad(factor.sum(), masks, retain_graph=i + 1 < len(factors))



def diagonal_fisher(gradients: Gradients) -> tuple[Tensor, ...]:
    """Importance of every unit: the sum of its squared gradients, (U,) float64 per block."""
    return tuple(gradient.double().square().sum(0) for gradient in gradients)


def block_fisher(gradient: Tensor) -> Tensor:
    """Fisher information of one block, (n, U) -> (U, U) float64: the Gram matrix of its gradient vectors."""
    gradient = gradient.double()
    return gradient.T @ gradient
