"""Several processes that share one run, each with its own device and its own copy of the model.

`accelerate launch` or `torchrun` starts them. The processes take the calibration batches in turn,
one each per step. The sums of a block are kept by one process, which receives the rows of every
batch in the order of the batches. So floats are added in the order of a single process, and the
selection is the same to the bit (on the same kind of device, with the same number of threads). Only
the sums of the least squares are added across processes, in float64: weights agree to about 1e-7.

Outside of `process_group`, and in a process that was started alone, every function here does what
a single process needs. So `prune()` called by each process of another launch prunes in each.
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

_TIMEOUT = timedelta(hours=12)
"""Other processes wait at the next collective call while the main process scores a model."""

_is_active = False
"""Whether the processes share their work, i.e. inside of `process_group`."""

_num_entered = 0
"""How many times `process_group` was entered: the same number in all processes."""


def num_launched_processes() -> int:
    """Number of processes that a launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device(name: str | None) -> str | None:
    """Name of the device of this process.

    Args:
        name: the device that the user asked for; returned as it is if there is one process.

    Raises:
        UserError: there is no device of this kind for each process.
    """
    if num_launched_processes() == 1:
        return name
    if name not in (None, "cpu", "cuda"):
        raise UserError(
            f"--device {name} is one device, but {num_launched_processes()} processes were "
            f"launched: leave --device out, or launch one process."
        )
    if name == "cpu" or not torch.cuda.is_available():
        return name or "cpu"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", str(num_launched_processes())))
    if here > torch.cuda.device_count():
        raise UserError(
            f"{here} processes were launched, but torch finds {torch.cuda.device_count()} CUDA "
            f"devices here: launch one process per device, or give --device cpu."
        )
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Share the work with the other processes while the context lasts.

    A process group that the caller has initialised is used, and left as it is.

    Raises:
        OtherProcessError: another process has failed first, and prints the reason.
    """
    global _is_active, _num_entered  # noqa: PLW0603  (torch has one default group per process, too)
    if num_launched_processes() == 1 or _is_active:
        yield
        return
    initialised_here = not dist.is_initialized()
    if initialised_here:
        from accelerate import PartialState

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # accelerate warns that it sets the number of threads
            PartialState(cpu=device.type == "cpu", timeout=_TIMEOUT)
    _is_active, _num_entered = True, _num_entered + 1
    try:
        yield
    except Exception as error:
        if not _is_first_to_fail():
            raise OtherProcessError from error
        if isinstance(error, UserError):
            error.on_one_process = True
        raise
    finally:
        _is_active = False
        if initialised_here:
            dist.destroy_process_group()
            PartialState._reset_state()


def _is_first_to_fail() -> bool:
    """Whether this process failed before the others, whose connections to it break afterwards."""
    try:
        store = dist.distributed_c10d._get_default_store()
        return int(store.add(f"rfprune/failed/{_num_entered}", 1)) == 1
    except RuntimeError:  # the process that keeps the store has ended
        return False


def world_size() -> int:
    """Number of processes that share the work."""
    return dist.get_world_size() if _is_active else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if _is_active else 0


def is_main() -> bool:
    """Whether this is the process that prints, scores and writes."""
    return rank() == 0


def steps(num_batches: int) -> list[list[int | None]]:
    """The number of the batch of each process, step by step; None without one in the last step.

    Raises:
        UserError: there are fewer batches than processes.
    """
    size = world_size()
    if num_batches < size:
        raise UserError(
            f"the examples make fewer batches ({num_batches}) than there are processes ({size}); "
            f"launch fewer processes, or make the batches smaller (--batch-size)"
        )
    return [
        [number if number < num_batches else None for number in range(first, first + size)]
        for first in range(0, num_batches, size)
    ]


def own_batches(num_batches: int) -> list[int]:
    """The numbers of the batches of this process."""
    own = [step[rank()] for step in steps(num_batches)]
    return [number for number in own if number is not None]


def shard(batches: Sequence[Item]) -> Sequence[Item]:
    """The batches of this process."""
    return [batches[number] for number in own_batches(len(batches))] if _is_active else batches


def batch_number(step: int) -> int:
    """The number of the batch of this process in a step."""
    return step * world_size() + rank()


def gather_rows(rows: Tensor, lengths: Sequence[int], destination: int) -> list[Tensor]:
    """Send the rows of one step to the process that adds them up.

    Args:
        rows: (n, d), of this process.
        lengths: n of every process.
        destination: rank of the process that receives the rows.

    Returns:
        At the destination the rows of each process with any, in the order of the ranks; elsewhere
        nothing.
    """
    if not _is_active:
        return [rows]
    if rank() != destination:
        if len(rows):
            dist.send(rows.contiguous(), destination)
        return []
    return [
        rows if source == destination else _receive(rows.new_empty(length, *rows.shape[1:]), source)
        for source, length in enumerate(lengths)
        if length
    ]


def _receive(buffer: Tensor, source: int) -> Tensor:
    dist.recv(buffer, source)
    return buffer


def all_gather(own: Mapping[int, Item]) -> list[Item]:
    """The items of all processes, in the order of their numbers.

    Args:
        own: items of this process by number, for example by that of the batch.
    """
    parts: list[Any] = [own]
    if _is_active:
        parts = [None] * world_size()
        dist.all_gather_object(parts, own)
    items = {number: item for part in parts for number, item in part.items()}
    return [items[number] for number in sorted(items)]


def all_reduce(*sums: Tensor) -> None:
    """Add tensors of all processes, in place."""
    if _is_active:
        for tensor in sums:
            dist.all_reduce(tensor)


def barrier() -> None:
    """Wait until all processes are here."""
    if _is_active:
        dist.barrier()


def broadcast_from_main(compute: Callable[[], Item]) -> Item:
    """Call a function in the main process, and return its result in all."""
    if not _is_active:
        return compute()
    box: list[Any] = [compute() if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    found: Item = box[0]
    return found
