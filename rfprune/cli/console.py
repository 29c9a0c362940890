"""What a run prints: its log, its results, warnings, and a UserError if memory runs out."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from rfprune.errors import RfpruneWarning, UserError, error_summary
from rfprune.report.console_table import LOG_WIDTH


@dataclass(frozen=True)
class Consoles:
    """Where a run prints.

    Attributes:
        log: one line per step on stderr; also recorded for log.txt if nothing is printed.
        results: the tables on stdout.
        progress: whether to show progress bars.
    """

    log: Console
    results: Console
    progress: bool


def open_consoles(*, quiet: bool) -> Consoles:
    """The consoles of this process; `quiet`: nothing is printed."""
    log = Console(
        file=io.StringIO() if quiet else sys.stderr,
        record=True,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
    )
    # rich would cut the table to 80 columns in a file or a pipe.
    results = Console(quiet=quiet, width=None if sys.stdout.isatty() else LOG_WIDTH)
    return Consoles(log, results, progress=not quiet and sys.stderr.isatty())


@contextmanager
def out_of_memory_as_user_error(batch_size: int) -> Iterator[None]:
    """Turn an out-of-memory error, on the device or the host, into a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        on_host = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        if not (on_host or isinstance(error, torch.cuda.OutOfMemoryError)):
            raise
        raise UserError(
            f"Out of memory with a batch size of {batch_size} ({error_summary(error)}): give a "
            f"smaller --batch-size, fewer --samples or a smaller --max-length"
        ) from error


@contextmanager
def collected_warnings(log: Console, *, verbose: bool) -> Iterator[list[str]]:
    """Print and collect each RfpruneWarning once; `verbose` also prints other warnings."""
    collected: list[str] = []

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, RfpruneWarning):
            if str(message) in collected:
                return
            collected.append(str(message))
        elif not verbose:
            return
        log.print(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("default" if verbose else "ignore")
        warnings.simplefilter("always", RfpruneWarning)
        warnings.showwarning = show
        yield collected
