"""Sums and factorisations in float64, for models of any dtype on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def float64_device(device: torch.device) -> torch.device:
    """The device for float64 sums of tensors on `device`: the CPU for MPS, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def to_float64(values: Tensor, device: torch.device | None = None) -> Tensor:
    """Detached values in float64, on a device (their own by default), or the CPU for MPS."""
    where = float64_device(values.device if device is None else device)
    return values.detach().to(where).double()  # move first: MPS cannot convert to float64
