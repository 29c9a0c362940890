"""What can be told from a checkpoint's files before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rfprune.errors import UserError
from rfprune.tasks.label_order import check_labels
from rfprune.tasks.own_data import HEADS
from rfprune.tasks.registry import (
    AUTO_CLASSES,
    CUSTOM,
    KINDS_WITH_LABEL_NAMES,
    LANGUAGE_MODELING,
    Kind,
    Task,
)

OTHER_CHECKPOINTS = "give a folder that holds the checkpoint, or try --model demo"
_SAVE_AGAIN = "save the model again with save_pretrained()"
_LONGEST_REASON = 200


def read_config(source: str) -> dict[str, Any]:
    """The configuration as it stands in the config.json of a folder or a hub repository.

    Raises:
        UserError: it is missing or damaged, or there are no safetensors beside it.
    """
    if not Path(source).is_dir():
        from transformers import PretrainedConfig

        found: dict[str, Any] = PretrainedConfig.get_config_dict(source)[0]
        if not found:
            raise UserError(f"'{source}' on the hub has no config.json: {OTHER_CHECKPOINTS}.")
        return found
    folder = Path(source)
    if not any(folder.iterdir()):
        raise UserError(f"Model folder '{source}' is empty: {OTHER_CHECKPOINTS}.")
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"Model folder '{source}' holds an adapter (adapter_config.json): merge it into its "
            f"model with merge_and_unload(), and save that."
        )
    if not path.is_file():
        raise UserError(f"Model folder '{source}' has no config.json: {_SAVE_AGAIN}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is not JSON ({reason(error)}): {_SAVE_AGAIN}.") from error
    if not isinstance(config, dict):
        raise UserError(f"'{path}' does not hold a JSON object: {_SAVE_AGAIN}.")
    _check_files(folder)
    return config


def _check_files(folder: Path) -> None:
    """A folder must hold safetensors: reading a pickle can run whatever code it carries."""
    for weights in sorted(folder.glob("*.safetensors")):
        if weights.is_file() and _is_pointer(weights):
            raise UserError(
                f"'{weights}' is a pointer of git-lfs, not the weights: get them with git lfs pull."
            )
    if any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        return
    pickles = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
    if pickles:
        raise UserError(
            f"Model folder '{folder}' holds its weights as a pickle ({min(pickles)}), which can "
            f"run code when read: load it where you trust it and save it with "
            f"save_pretrained(), which writes model.safetensors."
        )
    raise UserError(f"Model folder '{folder}' has no model.safetensors: {_SAVE_AGAIN}.")


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(30).startswith(b"version https://git-lfs")


def check_config(config: Mapping[str, Any], source: str, task: Task) -> None:
    """A supported model type, a head of the task's kind, and the task's labels.

    Raises:
        UserError: any of them is missing or does not fit.
    """
    from rfprune.families.architectures import ARCHITECTURES

    model_type = config.get("model_type")
    if not model_type:
        raise UserError(f"The config.json of '{source}' names no model_type: {_SAVE_AGAIN}.")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UserError(
            f"Model type {model_type!r} of '{source}' is not supported: the supported types are "
            f"{', '.join(sorted(ARCHITECTURES))}."
        )
    if task.kind == "similarity" and len(ARCHITECTURES[model_type].stacks) > 1:
        raise UserError(
            f"'{source}' is an encoder-decoder ({model_type}), or an encoder taken out of one, of "
            f"which no embeddings are made here: choose an encoder or a decoder."
        )
    names = class_names(config)
    head = AUTO_CLASSES[task.kind].removeprefix("AutoModel")
    known = (head, "LMHeadModel") if task.kind == "language-modeling" else (head,)
    if names and not any(name.endswith(known) for name in names) and head:
        raise missing_head_error(source, task, f"it is a {names[0]}, not a ...{head}")
    if task.kind in (*KINDS_WITH_LABEL_NAMES, "regression"):
        check_labels(labels_of(config, source), task)


def class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes of transformers that a configuration says its weights are of."""
    names = config.get("architectures") or ()
    return tuple(map(str, names)) if isinstance(names, list | tuple) else (str(names),)


def kind_of(config: Mapping[str, Any], source: str) -> Kind:
    """What task `custom` asks of a checkpoint: by the head it has, a sequence classifier's if its
    configuration does not say.

    Raises:
        UserError: it is a language model, for which there is a task of its own.
    """
    names = class_names(config)
    for name in names:
        for end, kind in HEADS.items():
            if name.endswith(end):
                return kind
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        raise UserError(
            f"'{source}' is a language model ({names[0]}): use --task {LANGUAGE_MODELING}, which "
            f"scores it on a text of yours."
        )
    return "classification"


def labels_of(config: Mapping[str, Any], source: str) -> Any:
    """The labels as transformers understands them: an object with `id2label`.

    Raises:
        UserError: transformers cannot read them.
    """
    from transformers import PretrainedConfig

    keys = ("id2label", "label2id", "num_labels")
    try:
        return PretrainedConfig.from_dict({key: config[key] for key in keys if key in config})
    except Exception as error:  # how a wrong type fails differs with the version
        raise UserError(
            f"The labels in the config.json of '{source}' cannot be read: id2label must map the "
            f'ids to names, such as {{"0": "no", "1": "yes"}}, but is '
            f"{str(config.get('id2label'))[:80]!r}."
        ) from error


def missing_head_error(source: str, task: Task, why: str) -> UserError:
    """The error for a checkpoint that was never trained for a task of this kind."""
    data = "your data" if task.name == CUSTOM else task.name
    return UserError(
        f"'{source}' has no trained head for task {task.name} ({why}): fine-tune it on "
        f"{data} first, or choose a checkpoint that is."
    )


def reason(error: BaseException) -> str:
    """What an error says, as part of one sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):
        text = f"unknown {text}"
    return (text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "...").rstrip(".:")
