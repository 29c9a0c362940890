"""The input of every stage that collects gradients: a model, its blocks and calibration batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rfprune.errors import UserError
from rfprune.model.batch import Batch
from rfprune.model.layout import Block, Layout
from rfprune.stages.objective import PREDICTIONS, Objective


@dataclass(frozen=True)
class Calibration:
    """A model and the batches over which statistics are collected.

    Attributes:
        model: frozen (see `rfprune.model.frozen.frozen`), so that no weight gradients are computed.
        layout: the blocks of `model`.
        batches: model inputs on the model's device: input_ids (B, S), attention_mask (B, S), ...
        objective: the scalar per example that is differentiated; see `rfprune.stages.objective`.
        seed: of labels sampled from the model's predictions, and of random importance.
        progress: whether to show progress bars.
        max_bytes: memory for statistics and autograd, besides the weights; None for half of what is
            free. A model that needs more is swept layer by layer.
    """

    model: PreTrainedModel
    layout: Layout
    batches: Sequence[Batch]
    objective: Objective = PREDICTIONS
    seed: int = 0
    progress: bool = False
    max_bytes: int | None = None


def require_finite(block: Block, quantity: str, *tensors: Tensor) -> None:
    """Check statistics that were collected for a block.

    Args:
        quantity: name of the statistics in the error message, in the plural.

    Raises:
        UserError: a tensor has an infinite or NaN entry; the block is named.
    """
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise UserError(
            f"the {quantity} of {block.name} are not finite; check the checkpoint's weights, or "
            "calibrate in float32 (--dtype float32)"
        )
