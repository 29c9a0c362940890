"""The weights of a student that is never whole in memory.

A weight is made from the original model each time it is needed, until its layer has been fitted and
written to a file. One file per module that was written, which appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from os.path import commonpath
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import PrefixedDataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rfprune.errors import UserError, error_summary
from rfprune.model.residency import execution_device, offloading_hooks, read_weight

SUFFIX = ".safetensors"

_FINISHED = ".finished.json"

MakeWeight = Callable[[], Tensor]
"""A function that makes a weight each time it is needed."""


class WeightStore(Mapping[str, Tensor]):
    """Weights by name, from a function that makes each of them or from files.

    Args:
        makers: a function for every weight.
        folder: of the files, which may be there already; None for a temporary one that is removed
            with the store.

    Attributes:
        dtype: in which floating-point weights are read; None for their own.
    """

    def __init__(self, makers: Mapping[str, MakeWeight], folder: Path | None = None) -> None:
        self._makers = dict(makers)
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="rfprune-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.folder = folder
        self._files: dict[str, Path] = {}
        self._warnings: dict[str, list[str]] = {}
        for path in sorted(folder.glob(f"*{_FINISHED}")):
            record = json.loads(path.read_text(encoding="utf-8"))
            self._files |= {name: folder / file for name, file in record["files"].items()}
            self._warnings[path.name.removesuffix(_FINISHED)] = record["warnings"]
        self.dtype: torch.dtype | None = None

    def __getitem__(self, name: str) -> Tensor:
        path = self._files.get(name)
        if path is None:
            value = self._makers[name]()
        else:
            with safe_open(path, framework="pt") as file:
                value = file.get_tensor(name)
        return value.to(self.dtype) if self.dtype and value.is_floating_point() else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def finish(self, layer: str, warnings: Sequence[str]) -> None:
        """Record that a layer has been fitted and written, so that a later store finds it."""
        files = {name: path.name for name, path in self._files.items() if _is_in(name, layer)}
        record = {"files": files, "warnings": list(warnings)}
        with _replaced(self.folder / f"{layer}{_FINISHED}") as unfinished:
            unfinished.write_text(json.dumps(record), encoding="utf-8")

    def warnings_of(self, layer: str) -> list[str] | None:
        """The warnings of a layer that an earlier store has finished; None for any other layer."""
        return self._warnings.get(layer)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __deepcopy__(self, memo: Any) -> WeightStore:
        """Copies of a model share its files."""
        return self

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Write weights to one file, from which they are read from now on.

        Raises:
            UserError: the folder cannot be written, such as on a full disk.
        """
        name = commonpath([name.replace(".", "/") for name in tensors]).replace("/", ".")
        path = self.folder / f"{name or 'model'}{SUFFIX}"
        kept = {name: self[name] for name, other in self._files.items() if other == path}
        contents = {name: one.detach().cpu().contiguous() for name, one in (kept | tensors).items()}
        with _replaced(path) as unfinished:
            save_file(contents, unfinished)
        self._files |= dict.fromkeys(tensors, path)


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A file to write to, which then takes the place of `path`.

    Raises:
        UserError: the folder cannot be written, such as on a full disk.
    """
    unfinished = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(
            f"fitted weights cannot be written to '{path.parent}' ({error_summary(error)}): make "
            "room there, or choose another folder (--cache-dir; TMPDIR without a cache)"
        ) from error


def _is_in(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")


def offload_like(
    student: PreTrainedModel,
    model: PreTrainedModel,
    own: Mapping[str, MakeWeight],
    folder: Path | None = None,
) -> None:
    """Let the placeholders of a student, which are on the meta device, be loaded when needed.

    Args:
        model: the offloaded model that the student was made from.
        own: functions that make the weights that differ from those of `model`, by name.
        folder: see `WeightStore`.
    """
    names = [name for name, weight in student.state_dict().items() if weight.is_meta]
    others: dict[str, MakeWeight] = {name: partial(read_weight, model, name) for name in names}
    store = WeightStore({**others, **own}, folder)
    for path, module in student.named_modules():
        if any(weight.is_meta for weight in module.parameters(recurse=False)):
            weights = PrefixedDataset(store, f"{path}." if path else "")
            hook = AlignDevicesHook(execution_device(model), offload=True, weights_map=weights)
            add_hook_to_module(module, hook, append=True)
    student.hf_device_map = {
        "": "disk"
    }  # by which transformers knows that it saves an offloaded one


def read_as(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights that a model has in stores to a dtype whenever they are read."""
    for store in _stores(model):
        store.dtype = dtype


@contextmanager
def reading_as(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within, the weights that a model has in stores are read in a dtype."""
    before = {store: store.dtype for store in _stores(model)}
    try:
        read_as(model, dtype)
        yield
    finally:
        for store, own in before.items():
            store.dtype = own


def store_of(model: nn.Module) -> WeightStore | None:
    """The store of a student or of a part of one; None for a model in memory."""
    return next(iter(_stores(model)), None)


def _stores(model: nn.Module) -> list[WeightStore]:
    maps = [hook.weights_map.dataset for _, hook in offloading_hooks(model)]
    return [store for store in maps if isinstance(store, WeightStore)]
