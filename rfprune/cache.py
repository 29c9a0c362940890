"""A cache on disk for the statistics and the scores of an unpruned model.

Another constraint, or another run, then collects nothing. An entry is one file: a line of JSON with
the key and the SHA-256 of the rest, followed by the tensors as safetensors. Its name is a hash of
the key: weights, configuration, data, settings, the code that computes the tensors, and the
versions of the libraries. A damaged entry is computed again, with a warning; a folder that cannot
be written is a warning, too. Files appear by renaming, so readers never see half an entry, and the
last of several writers wins, with the same contents. The least recently used entries are removed
when the folder is full.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors.torch import load, save
from torch import Tensor, nn

from rfprune import distributed
from rfprune.errors import RfpruneWarning
from rfprune.model.residency import execution_device, stored_tensors
from rfprune.result import StageTimer
from rfprune.settings import Settings

Tensors = tuple[Tensor, ...]
Key = Mapping[str, Any]
"""Everything that the tensors of an entry depend on, as JSON can write it."""

MAX_BYTES = 4 * 2**30
"""Largest size of all entries together."""

SUFFIX = ".rfprune"
_PARTIAL = ".partial"
_ABANDONED_SECONDS = 3600.0
"""A half-written file that is older than this belongs to a process that was killed."""

LATER_SETTINGS = (
    *("allocation", "rearrange", "tune", "teacher", "uniform", "depth", "round_to", "rounds"),
    *("protect", "min_heads", "min_neurons"),
    *("sparsity", "sparsity_criterion", "sparsity_scope"),
)
"""Settings that statistics do not depend on. All others are part of the key, new ones included."""

_COMPUTED_BY = ("rfprune.methods.statistics", "rfprune.tasks.evaluation")
"""The modules that compute what is cached: statistics of a method, and the original's logits."""

_SOURCE_ENTRIES = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Entries of a configuration that name the source of a model and do not change its outputs."""


def default_folder() -> Path:
    """The folder of the cache: $RFPRUNE_CACHE, or $XDG_CACHE_HOME/rfprune, or ~/.cache/rfprune."""
    if own := os.environ.get("RFPRUNE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rfprune"


def load_or_compute(
    compute: Callable[[], Tensors],
    folder: Path | None,
    key: Callable[[], Key],
    timer: StageTimer,
    stage: str,
    *,
    shared: bool = False,
) -> Tensors:
    """Load the tensors of an entry; if there is none, compute them and write the entry.

    Args:
        folder: of the cache; None to compute without it.
        key: makes the key of the entry; called only with a folder, since it hashes model and data.
        timer: takes the seconds of reading and writing, and the name of a stage that was loaded.
        stage: under which the timer counts them.
        shared: all processes of a run compute together, and the main one looks up the entry.

    Six parameters: the cache is below the methods, and cannot know their `Problem`.
    """
    if folder is None:
        return compute()

    def look_up() -> tuple[Key, Tensors | None]:
        known = key()
        return known, read(folder, known)

    with timer.stage(stage):
        known, found = distributed.broadcast_from_main(look_up) if shared else look_up()
    if found is not None:
        timer.cached.add(stage)
        return found
    computed = compute()
    if distributed.is_main():
        with timer.stage(stage):
            write(folder, known, computed)
    return computed


def read(folder: Path, key: Key) -> Tensors | None:
    """The tensors of an entry; None if there is none, or if it is damaged (RfpruneWarning)."""
    path = _path(folder, key)
    try:
        content = path.read_bytes()
        os.utime(path)  # other entries are removed first
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        _warn(f"The cache entry '{path}' cannot be read ({error.strerror}); it is computed again.")
        return None
    start = content.find(b"\n") + 1
    payload = memoryview(content)[start:]
    if content[:start] != _header(key, payload):
        _warn(f"The cache entry '{path}' is damaged or out of date; it is computed again.")
        return None
    named = load(bytes(payload))
    return tuple(named[str(i)] for i in range(len(named)))


def write(folder: Path, key: Key, tensors: Sequence[Tensor]) -> None:
    """Write an entry; RfpruneWarning if the folder cannot be written. Tensors are read back on the
    CPU."""
    named = {str(i): tensor.detach().cpu().contiguous() for i, tensor in enumerate(tensors)}
    payload = save(named)
    path = _path(folder, key)
    partial = folder / f".{path.stem}.{os.getpid()}.{secrets.token_hex(4)}{_PARTIAL}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as file:
                file.write(_header(key, payload))
                file.write(payload)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        _make_room(folder, path)
    except OSError as error:
        _warn(
            f"The cache folder '{folder}' cannot be written ({error.strerror}), so the next run "
            f"collects again; choose another with --cache-dir, or none with --no-cache."
        )


def remove(folder: Path, key: Key) -> None:
    """Remove an entry, if it is there and can be removed."""
    with suppress(OSError):
        _path(folder, key).unlink()


def _make_room(folder: Path, newest: Path) -> None:
    """Remove the least recently used entries, and the files of killed processes."""
    entries = []
    for path in folder.iterdir():
        try:
            status = path.stat()
            if path.suffix == SUFFIX and path != newest:
                entries.append((status.st_mtime, status.st_size, path))
            elif path.suffix == _PARTIAL and time.time() - status.st_mtime > _ABANDONED_SECONDS:
                path.unlink(missing_ok=True)
        except FileNotFoundError:  # another process has removed it
            continue
    total = newest.stat().st_size + sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= MAX_BYTES:
            return
        path.unlink(missing_ok=True)
        total -= size


def _path(folder: Path, key: Key) -> Path:
    return folder / (hashlib.sha256(_canonical(key)).hexdigest() + SUFFIX)


def _header(key: Key, payload: bytes | memoryview) -> bytes:
    """The first line of an entry. It is compared whole, so every bit of a file is checked."""
    return _canonical({"of": key, "sha256": hashlib.sha256(payload).hexdigest()}) + b"\n"


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def _warn(text: str) -> None:
    warnings.warn(text, RfpruneWarning, stacklevel=3)


def load_or_collect(
    collect: Callable[[], Tensors],
    folder: Path | None,
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    settings: Settings,
    timer: StageTimer,
) -> Tensors:
    """The statistics of a method from the cache, or collected and cached.

    A model with hooks is not cached: what a hook computes is not part of the key.
    """
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    return load_or_compute(
        collect,
        None if hooked else folder,
        lambda: statistics_key(model, batches, settings),
        timer,
        "collect",
        shared=True,
    )


def statistics_key(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], settings: Settings
) -> Key:
    """The key of a method's statistics. They do not depend on the constraint."""
    chosen = {name: value for name, value in asdict(settings).items() if name not in LATER_SETTINGS}
    return {
        "statistics": chosen,
        "model": model_digest(model),
        "data": data_digest(batches),
        **environment(model),
    }


def environment(model: Any) -> dict[str, str]:
    """The part of a key besides model and data: code, library versions, and the kind of device."""
    return {
        "code": code_digest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "device": execution_device(model).type,
    }


def model_digest(model: Any) -> str:
    """SHA-256 of a model's weights and configuration, the same for every source of the model."""
    config = {
        name: value for name, value in model.config.to_dict().items() if name not in _SOURCE_ENTRIES
    }
    config["attention"] = model.config._attn_implementation
    digest = hashlib.sha256(_canonical([type(model).__name__, config]))
    for name, tensor in stored_tensors(model):
        _feed(digest, name, tensor)
    return digest.hexdigest()


def data_digest(batches: Iterable[Mapping[str, Tensor]]) -> str:
    """SHA-256 of batches: their entries, and the division into batches."""
    digest = hashlib.sha256()
    for number, batch in enumerate(batches):
        for name in sorted(batch):
            _feed(digest, f"{number} {name}", batch[name])
    return digest.hexdigest()


@lru_cache(maxsize=1)
def code_digest() -> str:
    """SHA-256 of the source code that cached tensors come from, so no entry outlives a change."""
    digest = hashlib.sha256()
    for name in sorted(code_modules()):
        digest.update(f"{name}\n".encode() + _source_file(name).read_bytes())
    return digest.hexdigest()


def code_modules() -> set[str]:
    """Names of the modules of rfprune that cached tensors come from: `_COMPUTED_BY` and everything
    that these import, also inside functions."""
    found: set[str] = set()
    waiting = list(_COMPUTED_BY)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _imports(ast.parse(_source_file(name).read_bytes()))
    return found


def _imports(tree: ast.Module) -> Iterator[str]:
    """Names of the modules of rfprune that a module imports."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (
            name for name in names if name.startswith("rfprune.") and _source_file(name).is_file()
        )


def _source_file(module: str) -> Path:
    return Path(__file__).parents[1].joinpath(*module.split(".")).with_suffix(".py")


def _feed(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
