"""What a run that was interrupted has finished: the next run goes on after it.

Of an offloaded model each layer is written when it has been fitted, into a folder of the cache. Its
name is a hash of everything that the fit depends on. A run that finds the folder fits the remaining
layers; the result is the same, bit for bit. The folder is removed with the model that uses it, so
that only a killed run leaves one.

Before the fit, each error curve is an entry of the cache until all of them are there. They have a
few kilobytes, and take most of the time. The sweep that collects their statistics starts again: to
go on within it would take the gradients at a layer's output for all tokens, and between two chunks
of batches the statistics of all blocks, which are gigabytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import weakref
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors.torch import save
from transformers import PreTrainedModel

from rfprune import distributed
from rfprune.cache import (
    Key,
    Tensors,
    data_digest,
    environment,
    model_digest,
    read,
    remove,
    statistics_key,
    write,
)
from rfprune.methods.problem import Problem
from rfprune.model.masks import Masks
from rfprune.model.residency import is_offloaded

_ABANDONED_SECONDS = 7 * 86400.0
"""A folder that no run has gone on with for so long is removed."""

_PREFIX = "unfinished-"


@dataclass(frozen=True)
class UnfinishedFolder:
    """A folder for the fitted layers of a student, which no other run uses meanwhile.

    Attributes:
        path: of the folder.
        lock: freed with this object, and by the system if the process is killed.
    """

    path: Path
    lock: FileLock

    def remove_with(self, student: PreTrainedModel) -> None:
        """Remove the folder when the finished student, which reads its weights there, is freed."""
        weakref.finalize(student, self._remove)

    def _remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self.lock.release()


def unfinished_folder(
    problem: Problem, masks: Masks, removed: Collection[int] = ()
) -> UnfinishedFolder | None:
    """The folder for the fitted layers of a student.

    Args:
        problem: that of the original model.
        masks: of the units that the student keeps.
        removed: indices of the layers that it lacks.

    Returns:
        The folder; None without a cache, for a model in memory, for several processes, for a method
        whose fit has results besides the weights, for weights that are changed after the fit, or if
        another run is using the folder.
    """
    settings, cache = problem.settings, problem.cache
    goes_on = settings.method != "kwon" and settings.tune and settings.sparsity is None
    alone = distributed.world_size() == 1
    if cache is None or not goes_on or not alone or not is_offloaded(problem.model):
        return None
    _remove_abandoned(cache)
    path = cache / f"{_PREFIX}{_key(problem, masks, removed)}"
    lock = FileLock(path / "lock")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except (OSError, Timeout):  # such as a cache that cannot be written
        return None
    return UnfinishedFolder(path, lock)


@dataclass(frozen=True)
class UnfinishedCurves:
    """The error curves of an offloaded model that are computed already, each an entry of the cache.

    Attributes:
        folder: of the cache; None if curves are not kept.
        key: of the statistics that they are made from.
    """

    folder: Path | None
    key: Key

    @staticmethod
    def of(problem: Problem) -> UnfinishedCurves:
        """Those of a problem. Curves are not kept without a cache, with a loss of the user, for a
        model in memory, or for several processes."""
        kept = problem.loss is None and distributed.world_size() == 1
        if problem.cache is None or not kept or not is_offloaded(problem.model):
            return UnfinishedCurves(None, {})
        batches = problem.calibration.batches
        key = statistics_key(problem.model, batches, problem.settings)
        return UnfinishedCurves(problem.cache, key)

    def load(self, block: int) -> Tensors | None:
        """The order and the errors of the block of a number; None if they are not there."""
        return None if self.folder is None else read(self.folder, self._entry(block))

    def keep(self, block: int, order_and_errors: Tensors) -> None:
        """Keep the order and the errors of a block."""
        if self.folder is not None:
            write(self.folder, self._entry(block), order_and_errors)

    def remove(self, num_blocks: int) -> None:
        """Remove the curves of all blocks."""
        if self.folder is not None:
            for block in range(num_blocks):
                remove(self.folder, self._entry(block))

    def _entry(self, block: int) -> Key:
        return {**self.key, "block": block}


def _key(problem: Problem, masks: Masks, removed: Collection[int]) -> str:
    """SHA-256 of all that the fit of a student depends on."""
    kept = save({str(i): mask.contiguous() for i, mask in enumerate(masks)})
    entries = {
        "settings": asdict(problem.settings),
        "removed": sorted(removed),
        "masks": hashlib.sha256(kept).hexdigest(),
        "model": model_digest(problem.model),
        "data": data_digest(problem.inputs),
        **environment(problem.model),
    }
    return hashlib.sha256(json.dumps(entries, sort_keys=True, default=str).encode()).hexdigest()


def _remove_abandoned(cache: Path) -> None:
    for folder in cache.glob(f"{_PREFIX}*"):
        if time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
