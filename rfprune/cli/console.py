"""What goes wrong on the way of a run, put for its user: warnings, and memory that runs out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console

from rfprune.checkpoints.inspection import reason
from rfprune.errors import RfpruneWarning, UserError


@contextmanager
def out_of_memory_is_said(batch_size: int) -> Iterator[None]:
    """Smaller batches mend it.

    Raises:
        UserError: memory ran out, on the device or beside it.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        on_cpu = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        if not (on_cpu or isinstance(error, torch.cuda.OutOfMemoryError)):
            raise
        raise UserError(
            f"Memory ran out with batches of {batch_size} ({reason(error)}): give a smaller "
            f"--batch-size, fewer --samples or a smaller --max-length."
        ) from error


@contextmanager
def collected_warnings(told: Console, *, verbose: bool) -> Iterator[list[str]]:
    """Show our own warnings as they come and keep them; others only where `verbose` asks."""
    heard: list[str] = []

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, RfpruneWarning):
            if str(message) in heard:
                return
            heard.append(str(message))
        elif not verbose:
            return
        told.print(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("default" if verbose else "ignore")
        warnings.simplefilter("always", RfpruneWarning)
        warnings.showwarning = show
        yield heard
