"""Several processes that share one run, each with a device and a copy of the model of its own.

`accelerate launch` or `torchrun` starts them. The calibration batches are dealt out in turns, and
what each process finds comes together so that all of them hold the same: the sums of a block are
kept by one process, which takes in what it needs of every batch, in the order of the batches. No
float is added in another order than by a single process, so the selection is the same to the bit
(with the same kind of device and number of threads). Only the sums of the least squares are added
across processes, in float64: weights agree to about 1e-7.

Outside of `process_group`, and in a process that was started alone, every function here does the
obvious thing for one process.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rfprune.errors import OtherProcessError, UserError

Item = TypeVar("Item")

_PATIENCE = timedelta(hours=12)
"""While the main process scores a model, the others wait at what comes next."""

_joined = False


def num_launched_processes() -> int:
    """How many processes a launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device(name: str | None) -> str | None:
    """The name of this process' device; that of the flag where there is one process.

    Raises:
        UserError: there is no device of this kind for each process.
    """
    if num_launched_processes() == 1:
        return name
    if name not in (None, "cpu", "cuda"):
        raise UserError(
            f"--device {name} is one device, but {num_launched_processes()} processes were "
            f"launched: leave --device out, or launch one."
        )
    if name == "cpu" or not torch.cuda.is_available():
        return name or "cpu"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", str(num_launched_processes())))
    if here > torch.cuda.device_count():
        raise UserError(
            f"{here} processes were launched, but torch finds {torch.cuda.device_count()} CUDA "
            f"devices here: launch as many, or give --device cpu."
        )
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Share the work with the other processes for as long as the context lasts.

    Raises:
        OtherProcessError: another process has failed first, and said why.
    """
    global _joined  # noqa: PLW0603  (as torch's own process group is one for all)
    if num_launched_processes() == 1 or _joined:
        yield
        return
    from accelerate import PartialState

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it sets the number of threads
        PartialState(cpu=device.type == "cpu", timeout=_PATIENCE)
    _joined = True
    try:
        yield
    except Exception as error:
        if not _is_first_to_fail():
            raise OtherProcessError from error
        if isinstance(error, UserError):
            error.on_one_process = True
        raise
    finally:
        _joined = False
        dist.destroy_process_group()
        PartialState._reset_state()


def _is_first_to_fail() -> bool:
    """When a process ends, the others' connections break: only the first knows what happened."""
    try:
        return int(dist.distributed_c10d._get_default_store().add("rfprune/failed", 1)) == 1
    except RuntimeError:  # with the process that kept the count
        return False


def world_size() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if _joined else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _joined else 0


def is_main() -> bool:
    """Whether this is the process that prints, scores and writes."""
    return rank() == 0


def steps(num_batches: int) -> list[list[int | None]]:
    """In every turn a batch for each process, by number; in the last one some may have none.

    Raises:
        UserError: there are fewer batches than processes.
    """
    size = world_size()
    if num_batches < size:
        raise UserError(
            f"the examples make fewer batches ({num_batches}) than there are processes ({size}); "
            f"launch fewer, or make the batches smaller (--batch-size)"
        )
    return [
        [number if number < num_batches else None for number in range(first, first + size)]
        for first in range(0, num_batches, size)
    ]


def shard(batches: Sequence[Item]) -> Sequence[Item]:
    """This process' part of the batches, those that are its own in `turns`."""
    return [batches[number] for number in own_batches(len(batches))] if _joined else batches


def batch_number(turn: int) -> int:
    """The number of the batch that this process has in a turn."""
    return turn * world_size() + rank()


def own_batches(num_batches: int) -> list[int]:
    """The numbers of the batches that are this process' turn."""
    mine = [turn[rank()] for turn in steps(num_batches)]
    return [number for number in mine if number is not None]


def gather_rows(rows: Tensor, lengths: Sequence[int], keeper: int) -> list[Tensor]:
    """Bring what all processes have of one turn to the one that keeps it.

    Args:
        rows: (n, d), of this process. lengths: the n of every process.

    Returns:
        At the keeper everybody's rows, in the order of the processes; elsewhere nothing.
    """
    if not _joined:
        return [rows]
    if rank() != keeper:
        if len(rows):
            dist.send(rows.contiguous(), keeper)
        return []
    return [
        rows if source == keeper else _receive(rows.new_empty(length, *rows.shape[1:]), source)
        for source, length in enumerate(lengths)
        if length
    ]


def _receive(place: Tensor, source: int) -> Tensor:
    dist.recv(place, source)
    return place


def all_gather(own: Mapping[int, Item]) -> list[Item]:
    """What the processes have between them, in the order of the numbers."""
    parts: list[Any] = [own]
    if _joined:
        parts = [None] * world_size()
        dist.all_gather_object(parts, own)
    items = {number: item for part in parts for number, item in part.items()}
    return [items[number] for number in sorted(items)]


def all_reduce(*sums: Tensor) -> None:
    """Add the processes' sums, in place."""
    if _joined:
        for tensor in sums:
            dist.all_reduce(tensor)


def barrier() -> None:
    """Until all processes are here."""
    if _joined:
        dist.barrier()


def broadcast_from_main(compute: Callable[[], Item]) -> Item:
    """What a function gives in the main process, where alone it is called."""
    if not _joined:
        return compute()
    box: list[Any] = [compute() if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    found: Item = box[0]
    return found
