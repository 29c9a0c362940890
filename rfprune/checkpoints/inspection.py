"""Check a checkpoint's files and configuration before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rfprune.errors import UserError, error_summary
from rfprune.tasks.label_order import check_labels
from rfprune.tasks.own_data import HEADS
from rfprune.tasks.registry import (
    AUTO_CLASSES,
    CUSTOM,
    KINDS_WITH_LABEL_NAMES,
    LANGUAGE_MODELING,
    SEQ2SEQ,
    Kind,
    Task,
)

_HEADS: Mapping[Kind, tuple[str, ...]] = {
    "language-modeling": ("ForCausalLM", "LMHeadModel"),
    "seq2seq": ("ForConditionalGeneration", "MTModel"),
}
"""Ends of class names, where they are not that of the class that loads the checkpoint."""

OTHER_CHECKPOINTS = "give a folder that holds the checkpoint, or try --model demo"
_SAVE_AGAIN = "save the model again with save_pretrained()"


def read_config(source: str) -> dict[str, Any]:
    """The content of the config.json of a folder or a hub repository.

    Raises:
        UserError: the file is missing or damaged, or the folder has no safetensors.
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
        raise UserError(f"'{path}' is not JSON ({error_summary(error)}): {_SAVE_AGAIN}.") from error
    if not isinstance(config, dict):
        raise UserError(f"'{path}' does not hold a JSON object: {_SAVE_AGAIN}.")
    _check_files(folder)
    return config


def _check_files(folder: Path) -> None:
    """Require safetensors: loading a pickle can run any code."""
    for weights in sorted(folder.glob("*.safetensors")):
        if weights.is_file() and _is_pointer(weights):
            raise UserError(
                f"'{weights}' is a git-lfs pointer instead of weights: run git lfs pull."
            )
    if any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        return
    pickles = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
    if pickles:
        raise UserError(
            f"Model folder '{folder}' holds its weights as a pickle ({min(pickles)}), which can "
            f"run code when loaded: if you trust it, load it and save it again with "
            f"save_pretrained(), which writes model.safetensors."
        )
    raise UserError(f"Model folder '{folder}' has no model.safetensors: {_SAVE_AGAIN}.")


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(30).startswith(b"version https://git-lfs")


def check_config(config: Mapping[str, Any], source: str, task: Task) -> None:
    """Check the model type, the kind of head and the labels against the task.

    Raises:
        UserError: the type is not supported, or head or labels do not fit the task.
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
    _check_takes_no_audio(config, source)
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise UserError(
            f"'{source}' is quantised ({method or 'quantization_config in its config.json'}), and "
            f"pruning needs weights that are not: give the original checkpoint, or load this one, "
            f"call its dequantize() and save it again without quantization_config."
        )
    if task.kind == "similarity" and len(ARCHITECTURES[model_type].stacks) > 1:
        raise UserError(
            f"'{source}' is an encoder-decoder ({model_type}), or an encoder taken from one, and "
            f"makes no embeddings here: choose an encoder or a decoder."
        )
    names = class_names(config)
    if task.kind == "seq2seq" and not _writes_from_text(model_type):
        raise UserError(
            f"'{source}' is a {names[0] if names else model_type}, which does not write a text "
            f"from a text by an encoder and a decoder: choose a T5, BART, Marian or similar "
            f"checkpoint for task {SEQ2SEQ}, or another --task."
        )
    known = _HEADS.get(task.kind, (AUTO_CLASSES[task.kind].removeprefix("AutoModel"),))
    head = known[0]
    if names and not any(name.endswith(known) for name in names) and head:
        raise missing_head_error(source, task, f"it is a {names[0]}, not a ...{head}")
    if task.kind in (*KINDS_WITH_LABEL_NAMES, "regression"):
        check_labels(labels_of(config, source), task)


def _check_takes_no_audio(config: Mapping[str, Any], source: str) -> None:
    from transformers.models.auto import modeling_auto

    model_type = str(config.get("model_type"))
    if model_type in modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES:
        of_spectrograms = model_type in modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
        taken = "input_features" if of_spectrograms else "input_values"
        raise UserError(
            f"'{source}' is a {class_names(config)[0] if class_names(config) else model_type}, "
            f"which takes audio, and no --task does: call rfprune.prune() in Python with batches "
            f"of {taken}."
        )


def _writes_from_text(model_type: str) -> bool:
    from transformers.models.auto import modeling_auto

    return model_type in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES


def class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The model classes that a configuration names under `architectures`."""
    names = config.get("architectures") or ()
    return tuple(map(str, names)) if isinstance(names, list | tuple) else (str(names),)


def kind_of(config: Mapping[str, Any], source: str) -> Kind:
    """The kind of task that `custom` is for a checkpoint, by its head.

    A configuration without `architectures` counts as a sequence classifier.

    Raises:
        UserError: the checkpoint writes texts, which other tasks are for, or takes audio, which no
            task accepts.
    """
    _check_takes_no_audio(config, source)
    names = class_names(config)
    for name in names:
        for end, kind in HEADS.items():
            if name.endswith(end):
                return kind
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        raise UserError(
            f"'{source}' is a language model ({names[0]}): use --task {LANGUAGE_MODELING}, which "
            f"scores it on your text."
        )
    if any(name.endswith(_HEADS["seq2seq"]) for name in names):
        raise UserError(
            f"'{source}' is an encoder-decoder that writes texts ({names[0]}): use --task "
            f"{SEQ2SEQ}, which scores them."
        )
    return "classification"


def labels_of(config: Mapping[str, Any], source: str) -> Any:
    """The labels as transformers reads them: an object with `id2label`.

    Raises:
        UserError: transformers rejects them.
    """
    from transformers import PretrainedConfig

    keys = ("id2label", "label2id", "num_labels")
    try:
        return PretrainedConfig.from_dict({key: config[key] for key in keys if key in config})
    except Exception as error:  # the error depends on the version of transformers
        raise UserError(
            f"The labels in the config.json of '{source}' cannot be read: id2label must map the "
            f'ids to names, such as {{"0": "no", "1": "yes"}}, but is '
            f"{str(config.get('id2label'))[:80]!r}."
        ) from error


def missing_head_error(source: str, task: Task, why: str) -> UserError:
    """The error for a checkpoint without a trained head for this kind of task."""
    data = "your data" if task.name == CUSTOM else task.name
    return UserError(
        f"'{source}' has no trained head for task {task.name} ({why}): fine-tune it on {data} "
        f"first, or choose a fine-tuned checkpoint."
    )
