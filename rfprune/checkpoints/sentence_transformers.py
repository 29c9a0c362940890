"""Folders of sentence-transformers: where the model is, how it pools, which files it needs.

Such a folder has a modules.json that lists its modules: the Transformer, for an embedding model a
Pooling, and possibly Dense, Normalize or Dropout. A pruned model gets copies of these files, so it
loads like the original. They are read and checked before any work begins.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch

from rfprune.embeddings import POOLINGS
from rfprune.errors import RfpruneWarning, UserError

MODULES_FILE = "modules.json"
_SETTINGS_FILE = "config_sentence_transformers.json"
_OWNER = "sentence_transformers."
_FIRST = ["Transformer", "Pooling"]
_NO_CHANGE = ("Normalize", "Dropout")  # without effect on a cosine at inference
_KNOWN = (*_FIRST, *_NO_CHANGE, "Dense")
_WEIGHTS, _PICKLED = "model.safetensors", "pytorch_model.bin"
_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
}
_SAVE_AGAIN = "save it again with sentence-transformers, or copy or download it again"


@dataclass(frozen=True)
class EmbedderSettings:
    """What sentence-transformers says of an embedding model.

    Attributes:
        pooling: one of `POOLINGS`, or None if the folder does not say.
        max_tokens: tokens read of a text, or None if the folder does not say.
    """

    pooling: str | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class _Module:
    kind: str
    path: str


def transformer_folder(folder: Path) -> Path:
    """The folder with the config.json: this one, or the one of its first module.

    Raises:
        UserError: modules.json is damaged, or leads out of the folder.
    """
    if (folder / "config.json").is_file() or not (folder / MODULES_FILE).is_file():
        return folder
    return folder / _modules(folder)[0].path


def read_sentence_transformer(source: str) -> EmbedderSettings:
    """Read the pooling and the length of an embedding model in a folder or hub repository.

    A RfpruneWarning says where sentence-transformers would do more with a text than is done here.

    Raises:
        UserError: a file is damaged or leads out of the folder, or a module or pooling is not
            supported.
    """
    folder = _folder_of(source, warn=True)
    if folder is None:
        return EmbedderSettings(_pooling_alone(Path(source)))
    modules = _modules(folder)
    _check_kinds(modules, folder)
    pooling = _pooling(folder / modules[1].path / "config.json")
    transformer = folder / modules[0].path
    settings = _settings_of(transformer)
    limit = {} if settings is None else _read(settings)
    _warn_of_differences(folder, modules, limit)
    tokens = limit.get("max_seq_length")
    return EmbedderSettings(pooling, tokens if isinstance(tokens, int) and tokens > 0 else None)


def read_sentence_transformer_files(source: str) -> dict[str, bytes]:
    """Read the files with which sentence-transformers loads a model, of any kind.

    Returns:
        Contents by path within the folder of the pruned model; none if it is no folder of
        sentence-transformers.

    Raises:
        UserError: a file is damaged or leads out of the folder, or a module is not one of
            sentence-transformers.
    """
    folder = _folder_of(source)
    if folder is None:
        folder = Path(source)
        alone = (folder / _SETTINGS_FILE).is_file()
        return {_SETTINGS_FILE: _library_settings(folder)} if alone else {}
    modules = _modules(folder)
    custom = [module.kind for module in modules if "." in module.kind]
    if custom or modules[0].kind != _FIRST[0]:
        what = f"'{custom[0]}', which is code of its own" if custom else f"{modules[0].kind} first"
        raise UserError(
            f"'{folder}' uses the module {what}, but only a Transformer followed by modules of "
            f"sentence-transformers can be pruned: remove {MODULES_FILE} to prune the model alone, "
            "or choose another checkpoint."
        )
    return _files(folder, modules, _settings_of(folder / modules[0].path))


def pools(files: Mapping[str, bytes]) -> bool:
    """Whether files of sentence-transformers are those of an embedding model."""
    entries = json.loads(files.get(MODULES_FILE, b"[]"))
    return any(_kind(entry) == "Pooling" for entry in entries)


def is_reranker(files: Mapping[str, bytes]) -> bool:
    """Whether files of sentence-transformers are those of a cross-encoder."""
    settings = json.loads(files.get(_SETTINGS_FILE, b"{}"))
    return bool(settings.get("model_type") == "CrossEncoder")


def _folder_of(source: str, *, warn: bool = False) -> Path | None:
    """The folder with the modules.json whose first module this model is, if there is one.

    Args:
        warn: warn if the hub is not reachable.
    """
    folder = Path(source)
    if not folder.is_dir():
        return _fetched(source, warn=warn)
    if (folder / MODULES_FILE).is_file():
        return folder
    above = folder.resolve().parent
    if not (above / MODULES_FILE).is_file() or (above / "config.json").is_file():
        return None
    return above if above / _modules(above)[0].path == folder.resolve() else None


def _fetched(repository: str, *, warn: bool) -> Path | None:
    """A local copy of such files of a hub repository; None if it has no modules.json."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        folder = Path(hf_hub_download(repository, MODULES_FILE)).parent
    except LocalEntryNotFoundError:
        if warn:
            warnings.warn(
                f"The pooling of '{repository}' cannot be read from the hub, which is not "
                f"reachable: the mean over tokens is used",
                RfpruneWarning,
                stacklevel=2,
            )
        return None
    except EntryNotFoundError:
        return None
    paths = [module.path for module in _modules(folder) if module.path]
    wanted = [MODULES_FILE, _SETTINGS_FILE, "sentence_*_config.json"]
    wanted += [f"{path}/{name}" for path in paths for name in ("*.json", _WEIGHTS, _PICKLED)]
    return Path(snapshot_download(repository, allow_patterns=wanted))


def _modules(folder: Path) -> list[_Module]:
    """The modules that modules.json lists, in order; the Transformer comes first."""
    path = folder / MODULES_FILE
    entries = _json(path)
    if (
        not isinstance(entries, list)
        or not entries
        or not all(isinstance(entry, dict) and "type" in entry for entry in entries)
    ):
        raise UserError(f"'{path}' does not list modules of sentence-transformers: {_SAVE_AGAIN}.")
    modules = [_Module(_kind(entry), _inside(entry.get("path", ""), path)) for entry in entries]
    if not all(module.path for module in modules[1:]):
        raise UserError(f"'{path}' names a module that has no folder: {_SAVE_AGAIN}.")
    return modules


def _kind(entry: Mapping[str, Any]) -> str:
    """The class name of a module of sentence-transformers; the full path of any other class."""
    name = str(entry["type"])
    return name.rpartition(".")[2] if name.startswith(_OWNER) else name


def _inside(path: Any, source: Path) -> str:
    """A checked path within the folder: a downloaded file must not point elsewhere."""
    there = PureWindowsPath(str(path))  # understands both kinds of slashes
    if not isinstance(path, str) or there.anchor or ".." in there.parts:
        raise UserError(
            f"'{source}' leads out of its folder, to {path!r}, which is not followed: "
            f"{_SAVE_AGAIN}."
        )
    return PurePosixPath(*there.parts).as_posix() if there.parts else ""


def _check_kinds(modules: Sequence[_Module], folder: Path) -> None:
    kinds = [module.kind for module in modules]
    unknown = [kind for kind in kinds if kind not in _KNOWN]
    if unknown or kinds[:2] != _FIRST or set(kinds[2:]) & set(_FIRST):
        what = f"the module '{unknown[0]}'" if unknown else f"the modules {', '.join(kinds)}"
        raise UserError(
            f"'{folder}' uses {what}, but only a Transformer, then its Pooling, then "
            f"{', '.join(_KNOWN[2:])} are supported: choose another checkpoint."
        )


def _warn_of_differences(
    folder: Path, modules: Sequence[_Module], settings: Mapping[str, Any]
) -> None:
    """Warn where sentence-transformers would compute other embeddings than are scored here."""
    differences = []
    if any(module.kind == "Dense" for module in modules):
        differences.append(
            f"'{folder}' ends in a Dense module: the embeddings before it are pruned and scored, "
            f"and the module is kept unchanged"
        )
    if settings.get("do_lower_case") is True:
        differences.append(
            f"'{folder}' converts texts to lower case, which is not done here: convert them in the "
            f"data"
        )
    path = folder / _SETTINGS_FILE
    prompts = _read(path) if path.is_file() else {}
    named = prompts.get("default_prompt_name")
    prompt = (prompts.get("prompts") or {}).get(named) if named else None
    if prompt:
        differences.append(
            f"'{folder}' puts {prompt!r} before every text, which is not done here: add it in the "
            f"data"
        )
    for sentence in differences:
        warnings.warn(sentence, RfpruneWarning, stacklevel=3)


def _pooling_alone(folder: Path) -> str | None:
    """The pooling of a folder with a pooling module and without modules.json."""
    beside = sorted(folder.glob("*_Pooling/config.json")) if folder.is_dir() else []
    return _pooling(beside[0]) if beside else None


def _pooling(path: Path) -> str:
    """One of `POOLINGS`, from the older flags or the newer list of modes."""
    settings = _read(path)
    modes = [name for name, on in settings.items() if name.startswith("pooling_mode") and on]
    if "pooling_mode" in settings:
        named = settings["pooling_mode"]
        modes = list(map(str, named)) if isinstance(named, list) else [str(named)]
    found = [_MODES.get(mode, mode) for mode in modes or ["mean"]]
    if len(found) != 1 or found[0] not in POOLINGS:
        raise UserError(
            f"'{path}' asks for the pooling {' and '.join(modes)}, but one of "
            f"{', '.join(POOLINGS)} is needed: choose another checkpoint."
        )
    return found[0]


def _settings_of(transformer: Path) -> Path | None:
    """The settings of the Transformer; older versions named the file after the model type."""
    found = sorted(transformer.glob("sentence_*_config.json"))
    usual = transformer / "sentence_bert_config.json"
    return usual if usual in found else found[0] if found else None


def _files(folder: Path, modules: Sequence[_Module], settings: Path | None) -> dict[str, bytes]:
    """The files to copy. The pruned model lies beside modules.json, so its path becomes ""."""
    entries = _json(folder / MODULES_FILE)
    entries[0]["path"] = ""
    files = {MODULES_FILE: (json.dumps(entries, indent=2) + "\n").encode()}
    if settings is not None:
        files[settings.name] = _content(settings, folder)
    if (folder / _SETTINGS_FILE).is_file():
        files[_SETTINGS_FILE] = _library_settings(folder)
    for module in modules[1:]:
        config = folder / module.path / "config.json"
        if config.is_file():
            files[f"{module.path}/config.json"] = _content(config, folder)
        has_weights = any((folder / module.path / name).exists() for name in (_WEIGHTS, _PICKLED))
        if module.kind == "Dense" or has_weights:
            files[f"{module.path}/{_WEIGHTS}"] = _weights(folder / module.path, folder)
    return files


def _library_settings(folder: Path) -> bytes:
    """The file with prompts and activation function, after a check."""
    _read(folder / _SETTINGS_FILE)
    return _content(folder / _SETTINGS_FILE, folder)


def _weights(module: Path, folder: Path) -> bytes:
    """The weights of a module as safetensors, converted if they are a pickle."""
    from safetensors.torch import load, save

    path = module / _WEIGHTS
    try:
        if path.is_file():
            content = _content(path, folder)
            load(content)
            return content
        path = module / _PICKLED
        _check_linked(path, folder)
        return save(torch.load(path, map_location="cpu", weights_only=True))
    except UserError:
        raise
    except Exception as error:  # damaged files raise errors of many types
        raise UserError(
            f"The weights in '{path}' cannot be read ({type(error).__name__}): {_SAVE_AGAIN}."
        ) from error


def _content(path: Path, folder: Path) -> bytes:
    _check_linked(path, folder)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}): {_SAVE_AGAIN}.") from error


def _check_linked(path: Path, folder: Path) -> None:
    """Refuse links out of the folder, except into the hub's cache: a copy may be published."""
    if not is_inside(path, folder):
        raise UserError(
            f"'{path}' is a link that leads out of its folder, which is not followed: copy the "
            f"file there instead."
        )


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path, with its links followed, lies in a folder or in the hub's cache of it."""
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parents[1] / "blobs")
    return any(path.resolve().is_relative_to(place) for place in inside)


def _read(path: Path) -> dict[str, Any]:
    found = _json(path)
    if not isinstance(found, dict):
        raise UserError(f"'{path}' does not hold a JSON object: {_SAVE_AGAIN}.")
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"'{path}' is missing or not JSON ({type(error).__name__}): {_SAVE_AGAIN}."
        ) from error
