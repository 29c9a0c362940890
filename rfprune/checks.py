"""What `prune` is given, looked at before any work is done with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rfprune.errors import UserError
from rfprune.model.replay import Batch


def on_device(batch: Any, device: torch.device) -> Batch:
    """A batch on a device; UserError where it is none."""
    if not (isinstance(batch, Mapping) and all(isinstance(v, Tensor) for v in batch.values())):
        raise UserError(
            f"a batch must map names to tensors, as a data collator's output does; got a "
            f"{type(batch).__name__}: collate the examples with tensors first"
        )
    return {name: value.to(device) for name, value in batch.items()}


def check_finite(model: PreTrainedModel) -> None:
    """Refuse weights that are not finite, or not there to look at.

    Raises:
        UserError: the first such parameter is named.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UserError(
                f"parameter '{name}' is not in memory: it was offloaded, and every weight is "
                "looked at and some are changed; load the model onto devices that hold all of it"
            )
        if not torch.isfinite(parameter).all():
            raise UserError(
                f"parameter '{name}' holds NaN or infinity; save or download the checkpoint again"
            )
