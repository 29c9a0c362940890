"""Choose the device of a run."""

from __future__ import annotations

import torch

from rfprune.errors import UserError


def pick_device(name: str | None) -> torch.device:
    """The named device, or the best available one: cuda, mps or cpu.

    Raises:
        UserError: the machine, or this build of torch, has no such device.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(
                f"--device {name}: torch {torch.__version__} finds {count} CUDA devices here; "
                f"leave --device out to use the best available one."
            )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(
            f"--device mps: torch {torch.__version__} finds no Metal device here; "
            f"leave --device out to use the best available one."
        )
    return device
