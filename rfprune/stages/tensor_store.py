"""Tensors kept in memory up to a limit, and in a scratch file beyond it.

The file has no name: the operating system removes it when it is closed, also after a run that was
killed, and no other run can find it. It is written and read rather than mapped into memory: mapped
pages count as memory of the process, and a full disk would end the process without a message.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from rfprune.errors import UserError

GIGABYTE = 2**30


@dataclass(eq=False)
class KeptTensor:
    """A tensor of a store.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        device: that `TensorStore.load` returns it on.
        value: the tensor, if it is in memory.
        offset: its first byte in the file, if it is there.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    value: Tensor | None = None
    offset: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.shape.numel() * self.dtype.itemsize


class TensorStore:
    """Keeps tensors until they are released; a context manager that frees memory and disk.

    Example:
        >>> import torch
        >>> with TensorStore(max_bytes_in_memory=0) as store:
        ...     kept = store.keep(torch.arange(3))
        ...     store.load(kept).tolist()
        [0, 1, 2]
    """

    def __init__(self, max_bytes_in_memory: int) -> None:
        self.max_bytes_in_memory = max_bytes_in_memory
        self.bytes_in_memory = 0
        self.bytes_on_disk = 0
        self._file: Any = None
        self._free: dict[int, list[int]] = defaultdict(list)  # offsets by number of bytes

    def __enter__(self) -> TensorStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._free.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def keep(self, tensor: Tensor) -> KeptTensor:
        """Keep a copy of a tensor.

        Raises:
            UserError: the disk is full.
        """
        tensor = tensor.detach()
        kept = KeptTensor(tensor.shape, tensor.dtype, tensor.device)
        size = kept.num_bytes
        if self.bytes_in_memory + size <= self.max_bytes_in_memory:
            self.bytes_in_memory += size
            kept.value = tensor.to("cpu", copy=True)
            return kept
        if self._free[size]:
            kept.offset = self._free[size].pop()
        else:
            kept.offset, self.bytes_on_disk = self.bytes_on_disk, self.bytes_on_disk + size
        self._write(kept, tensor)
        return kept

    def load(self, kept: KeptTensor) -> Tensor:
        """A kept tensor, on the device that it came from; do not change it in place."""
        if kept.value is not None:
            return kept.value.to(kept.device)
        content = torch.empty(kept.num_bytes, dtype=torch.uint8)
        view = content.numpy().data
        self._file.seek(kept.offset)
        while view:
            read = self._file.readinto(view)
            assert read, "the file holds all that was written"
            view = view[read:]
        return content.view(kept.dtype).view(kept.shape).to(kept.device)

    def replace(self, kept: KeptTensor, tensor: Tensor) -> None:
        """Keep another tensor of the same shape and dtype instead."""
        if kept.value is not None:
            kept.value.copy_(tensor.detach())
        else:
            self._write(kept, tensor.detach())

    def release(self, kept: KeptTensor) -> None:
        """Free the memory of a kept tensor, or its place in the file."""
        if kept.value is None:
            self._free[kept.num_bytes].append(kept.offset)
        else:
            self.bytes_in_memory -= kept.num_bytes
            kept.value = None

    def _write(self, kept: KeptTensor, tensor: Tensor) -> None:
        content = tensor.cpu().contiguous().view(-1).view(torch.uint8)
        view = content.numpy().data
        try:
            if self._file is None:
                self._file = scratch_file()
            self._file.seek(kept.offset)
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise UserError(
                f"the scratch file in '{scratch_folder()}' cannot be written "
                f"({error.strerror or error}) after {self.bytes_on_disk / GIGABYTE:.1f} GB; free "
                "space there, or name a folder on another disk in the environment variable TMPDIR"
            ) from error


def scratch_folder() -> str:
    """The folder for temporary files.

    Raises:
        UserError: there is none that can be written.
    """
    try:
        return tempfile.gettempdir()
    except OSError as error:
        raise UserError(
            "no folder for temporary files can be written; name one in the environment variable "
            "TMPDIR"
        ) from error


def scratch_file() -> Any:
    """A new file without a name, in the folder for temporary files."""
    return tempfile.TemporaryFile(prefix="rfprune-", buffering=0, dir=scratch_folder())


def check_scratch_space(num_bytes: int) -> None:
    """Check that the folder for temporary files has space for so many bytes.

    Raises:
        UserError: it has less, or there is none.
    """
    if num_bytes <= 0:
        return
    folder = scratch_folder()
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise UserError(
            f"collecting statistics layer by layer needs {num_bytes / GIGABYTE:.1f} GB of scratch "
            f"space, but '{folder}' has {free / GIGABYTE:.1f} GB; free space there, calibrate on "
            "fewer tokens, or name a folder on another disk in the environment variable TMPDIR"
        )
