"""Sums and factorisations in float64, wherever the model is."""

from __future__ import annotations

import torch
from torch import Tensor


def float64_device(device: torch.device) -> torch.device:
    """Where what is computed on a device is summed: Apple's GPUs (MPS) have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def to_float64(values: Tensor, device: torch.device | None = None) -> Tensor:
    """Values, without their gradient, in float64 on a device that has it; given none, their own."""
    where = float64_device(values.device if device is None else device)
    return values.detach().to(where).double()  # in this order: see above
