"""Embedders as sentence-transformers saves them: where the model is, how it pools, what it needs.

Such a folder has a modules.json, which lists what a text goes through: the model, a pooling of its
hidden states, and what may follow. A pruned embedder gets the same files beside it, so that it is
loaded as the original is. They are read whole before anything else happens.
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
_NO_CHANGE = ("Normalize", "Dropout")  # none of the cosine, when nothing is trained
_KNOWN = (*_FIRST, *_NO_CHANGE, "Dense")
_WEIGHTS, _PICKLED = "model.safetensors", "pytorch_model.bin"
_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
}
_SAVE_AGAIN = "save it again with sentence-transformers, or copy or download it again"


@dataclass(frozen=True)
class SentenceTransformerFiles:
    """What stands beside the model of an embedder.

    `pooling`: one of `POOLINGS`, None where nothing says. `max_tokens`: that sentence-transformers
    reads of a text, None where it does not say. `files`: what it needs beside the pruned model,
    contents by their names within the folder; none where it is not its own folder.
    """

    pooling: str | None = None
    max_tokens: int | None = None
    files: Mapping[str, bytes] | None = None


@dataclass(frozen=True)
class _Module:
    kind: str
    path: str


def transformer_folder(folder: Path) -> Path:
    """Where the config.json is: in the folder, or in that of its first module.

    Raises:
        UserError: modules.json is damaged, or leads out of the folder.
    """
    if (folder / "config.json").is_file() or not (folder / MODULES_FILE).is_file():
        return folder
    return folder / _modules(folder)[0].path


def read_sentence_transformer(source: str) -> SentenceTransformerFiles:
    """What a folder or hub repository says of its embeddings; warns of what is not done here.

    Raises:
        UserError: it is damaged, leads elsewhere, or its embeddings are made in a way that is not
            known here; the sentence says which.
    """
    folder = _folder_of(source)
    if folder is None:
        return SentenceTransformerFiles(_pooling_alone(Path(source)))
    modules = _modules(folder)
    _check_kinds(modules, folder)
    pooling = _pooling(folder / modules[1].path / "config.json")
    transformer = folder / modules[0].path
    settings = _settings_of(transformer)
    limit = {} if settings is None else _read(settings)
    _warn_of_differences(folder, modules, limit)
    tokens = limit.get("max_seq_length")
    files = _files(folder, modules, settings)
    return SentenceTransformerFiles(
        pooling, tokens if isinstance(tokens, int) and tokens > 0 else None, files
    )


def write_sentence_transformer_files(files: Mapping[str, bytes] | None, folder: Path) -> bool:
    """Put the files of an embedder beside its pruned model; whether there are any."""
    for name, content in (files or {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return bool(files)


def _folder_of(source: str) -> Path | None:
    """The folder with the modules.json that this model is the first module of."""
    folder = Path(source)
    if not folder.is_dir():
        return _fetched(source)
    if (folder / MODULES_FILE).is_file():
        return folder
    above = folder.resolve().parent
    if not (above / MODULES_FILE).is_file() or (above / "config.json").is_file():
        return None
    return above if above / _modules(above)[0].path == folder.resolve() else None


def _fetched(repository: str) -> Path | None:
    """A copy of what a hub repository holds of such files, None if it is no embedder."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        folder = Path(hf_hub_download(repository, MODULES_FILE)).parent
    except LocalEntryNotFoundError:
        warnings.warn(
            f"The hub cannot be asked how '{repository}' pools: the mean over tokens is taken",
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
    """What modules.json lists, in its order; the model comes first."""
    path = folder / MODULES_FILE
    entries = _json(path)
    if (
        not isinstance(entries, list)
        or not entries
        or not all(isinstance(entry, dict) and "type" in entry for entry in entries)
    ):
        raise UserError(f"'{path}' does not list the modules of an embedder: {_SAVE_AGAIN}.")
    modules = [_Module(_kind(entry), _inside(entry.get("path", ""), path)) for entry in entries]
    if not all(module.path for module in modules[1:]):
        raise UserError(f"'{path}' names a module that has no folder: {_SAVE_AGAIN}.")
    return modules


def _kind(entry: Mapping[str, Any]) -> str:
    """The class' name if it is one of sentence-transformers, else all of its path."""
    name = str(entry["type"])
    return name.rpartition(".")[2] if name.startswith(_OWNER) else name


def _inside(path: Any, said_by: Path) -> str:
    """A path within the folder: what a downloaded file says must not lead anywhere else."""
    there = PureWindowsPath(str(path))  # which knows both kinds of slashes
    if not isinstance(path, str) or there.anchor or ".." in there.parts:
        raise UserError(
            f"'{said_by}' leads out of its folder, to {path!r}, which is not followed: "
            f"{_SAVE_AGAIN}."
        )
    return PurePosixPath(*there.parts).as_posix() if there.parts else ""


def _check_kinds(modules: Sequence[_Module], folder: Path) -> None:
    kinds = [module.kind for module in modules]
    strange = [kind for kind in kinds if kind not in _KNOWN]
    if strange or kinds[:2] != _FIRST or set(kinds[2:]) & set(_FIRST):
        what = f"'{strange[0]}'" if strange else f"the modules {', '.join(kinds)}"
        raise UserError(
            f"The embedder '{folder}' makes its embeddings by {what}, but only a Transformer, its "
            f"Pooling, and then {', '.join(_KNOWN[2:])} are known here: choose another checkpoint."
        )


def _warn_of_differences(
    folder: Path, modules: Sequence[_Module], settings: Mapping[str, Any]
) -> None:
    """Where sentence-transformers would say something else of a text than is scored here."""
    told = []
    if any(module.kind == "Dense" for module in modules):
        told.append(
            f"The embedder '{folder}' ends in a Dense module: it is pruned and scored by the "
            f"embeddings that go into it, and the module is kept as it is"
        )
    if settings.get("do_lower_case") is True:
        told.append(
            f"The embedder '{folder}' reads texts in lower case, which is left to its tokenizer "
            f"here: put them in lower case in the data"
        )
    path = folder / _SETTINGS_FILE
    prompts = _read(path) if path.is_file() else {}
    named = prompts.get("default_prompt_name")
    prompt = (prompts.get("prompts") or {}).get(named) if named else None
    if prompt:
        told.append(
            f"The embedder '{folder}' puts {prompt!r} before every text, which is not done here: "
            f"write it into the data"
        )
    for sentence in told:
        warnings.warn(sentence, RfpruneWarning, stacklevel=3)


def _pooling_alone(folder: Path) -> str | None:
    """The pooling where there is its own folder, but no modules.json."""
    beside = sorted(folder.glob("*_Pooling/config.json")) if folder.is_dir() else []
    return _pooling(beside[0]) if beside else None


def _pooling(path: Path) -> str:
    """One of `POOLINGS`, from either of the two ways in which it is written."""
    settings = _read(path)
    modes = [name for name, on in settings.items() if name.startswith("pooling_mode") and on]
    if "pooling_mode" in settings:
        named = settings["pooling_mode"]
        modes = list(map(str, named)) if isinstance(named, list) else [str(named)]
    found = [_MODES.get(mode, mode) for mode in modes or ["mean"]]
    if len(found) != 1 or found[0] not in POOLINGS:
        raise UserError(
            f"'{path}' asks for {' and '.join(modes)}, but embeddings are made here by one "
            f"of {', '.join(POOLINGS)}: choose another checkpoint."
        )
    return found[0]


def _settings_of(transformer: Path) -> Path | None:
    """The settings of the first module, whose name was once that of the kind of model."""
    found = sorted(transformer.glob("sentence_*_config.json"))
    usual = transformer / "sentence_bert_config.json"
    return usual if usual in found else found[0] if found else None


def _files(folder: Path, modules: Sequence[_Module], settings: Path | None) -> dict[str, bytes]:
    """All that goes beside a pruned model, which itself lies where modules.json is."""
    entries = _json(folder / MODULES_FILE)
    entries[0]["path"] = ""
    files = {MODULES_FILE: (json.dumps(entries, indent=2) + "\n").encode()}
    if settings is not None:
        files[settings.name] = _content(settings, folder)
    if (folder / _SETTINGS_FILE).is_file():
        files[_SETTINGS_FILE] = _content(folder / _SETTINGS_FILE, folder)
    for module in modules[1:]:
        config = folder / module.path / "config.json"
        if config.is_file():
            files[f"{module.path}/config.json"] = _content(config, folder)
        if module.kind == "Dense":
            files[f"{module.path}/{_WEIGHTS}"] = _weights(folder / module.path, folder)
    return files


def _weights(module: Path, folder: Path) -> bytes:
    """The weights of a module as safetensors, whatever they were."""
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
    except Exception as error:  # a damaged file fails in any way
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
    """Links may lead within the folder, or to where the hub's cache keeps all files: what is copied
    may be published."""
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parents[1] / "blobs")
    if not any(path.resolve().is_relative_to(place) for place in inside):
        raise UserError(
            f"'{path}' is a link that leads out of its folder, which is not followed: copy the "
            f"file there instead."
        )


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
            f"'{path}' is missing, or no JSON ({type(error).__name__}): {_SAVE_AGAIN}."
        ) from error
