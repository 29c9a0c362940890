"""What is learnt about an unpruned model is kept on disk: another constraint collects nothing.

An entry is one file: a line of JSON, which says what the entry is of and what SHA-256 the rest has,
and then the tensors as safetensors. It is named after a hash of everything that its contents
depend on: weights, configuration, data, settings, the code that computes them and the versions
below it. A damaged entry is computed again, with a warning; a folder that cannot be written is a
warning too. Files appear by renaming, so readers never see half an entry, and of several writers
the last one wins, with the same contents. The entries longest unused go when the folder is full.
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
from rfprune.result import StageTimer
from rfprune.settings import Settings

Tensors = tuple[Tensor, ...]
Key = Mapping[str, Any]
"""What an entry depends on, as JSON can write it."""

MOST_BYTES = 4 * 2**30
"""Of all entries together."""

SUFFIX = ".rfprune"
_PARTIAL = ".partial"
_ABANDONED_SECONDS = 3600.0
"""A half-written file this old is of a process that was killed."""

_LATER_SETTINGS = ("allocation", "rearrange", "tune", "teacher", "uniform", "round_to", "rounds")
"""Settings of what follows the collection. Any other is part of the key, also one that is new."""

_COMPUTED_BY = ("rfprune.methods.statistics", "rfprune.tasks.evaluation")
"""The modules that compute what is cached: statistics of a method, and the original's logits."""

_SINCE_LOADING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Entries of a configuration that say where a model comes from, not what it computes."""


def default_folder() -> Path:
    """$RFPRUNE_CACHE, else $XDG_CACHE_HOME/rfprune, else ~/.cache/rfprune."""
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
    """Tensors of an entry, or computed and written to it; without a folder only computed.

    Args:
        key: of the entry; called only with a folder, since it hashes model and data.
        timer: takes the seconds of reading and writing, and notes a stage that was loaded.
        shared: several processes compute together; the main process looks up the entry for all.
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
    """The tensors of an entry, or None where there is none, or a damaged one (RfpruneWarning)."""
    path = _path(folder, key)
    try:
        content = path.read_bytes()
        os.utime(path)  # in use: others go first
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        _warn(f"The cache entry '{path}' cannot be read ({error.strerror}): it is computed again.")
        return None
    start = content.find(b"\n") + 1
    payload = memoryview(content)[start:]
    if content[:start] != _header(key, payload):
        _warn(f"The cache entry '{path}' is damaged or out of date: it is computed again.")
        return None
    named = load(bytes(payload))
    return tuple(named[str(i)] for i in range(len(named)))


def write(folder: Path, key: Key, tensors: Sequence[Tensor]) -> None:
    """Keep tensors (they come back on the CPU); a RfpruneWarning where the folder does not let."""
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
            f"Nothing can be kept in the cache folder '{folder}' ({error.strerror}): the next run "
            f"collects again; choose another with --cache-dir, or none with --no-cache."
        )


def _make_room(folder: Path, newest: Path) -> None:
    """Remove the entries that were used the longest ago, and what killed processes left."""
    entries = []
    for path in folder.iterdir():
        try:
            status = path.stat()
            if path.suffix == SUFFIX and path != newest:
                entries.append((status.st_mtime, status.st_size, path))
            elif path.suffix == _PARTIAL and time.time() - status.st_mtime > _ABANDONED_SECONDS:
                path.unlink(missing_ok=True)
        except FileNotFoundError:  # another process was faster
            continue
    total = newest.stat().st_size + sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= MOST_BYTES:
            return
        path.unlink(missing_ok=True)
        total -= size


def _path(folder: Path, key: Key) -> Path:
    return folder / (hashlib.sha256(_canonical(key)).hexdigest() + SUFFIX)


def _header(key: Key, payload: bytes | memoryview) -> bytes:
    """Compared whole, so that no bit of a file goes unchecked."""
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
    """What the statistics of a method depend on; the constraint is no part of it."""
    chosen = {
        name: value for name, value in asdict(settings).items() if name not in _LATER_SETTINGS
    }
    return {
        "statistics": chosen,
        "model": model_digest(model),
        "data": data_digest(batches),
        **environment(model),
    }


def environment(model: nn.Module) -> dict[str, str]:
    """What else numbers depend on: code, versions, and the kind of device."""
    return {
        "code": code_digest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "device": next(model.parameters()).device.type,
    }


def model_digest(model: Any) -> str:
    """SHA-256 of a model's weights and configuration, wherever they were loaded from."""
    config = {
        name: value for name, value in model.config.to_dict().items() if name not in _SINCE_LOADING
    }
    config["attention"] = model.config._attn_implementation
    digest = hashlib.sha256(_canonical([type(model).__name__, config]))
    for name, tensor in model.state_dict().items():
        _feed(digest, name, tensor)
    return digest.hexdigest()


def data_digest(batches: Iterable[Mapping[str, Tensor]]) -> str:
    """SHA-256 of batches: what is in them, and how they are divided."""
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
