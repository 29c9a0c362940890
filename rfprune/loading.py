"""From what `--model` names to a model, its tokenizer and a device: everything checked first.

What is cheap is checked before what is dear: the folder, the configuration, the task's labels, and
only then the weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rfprune.demo import DEMO_TASK, demo_data_dir, demo_path
from rfprune.errors import UserError
from rfprune.pipeline import check_finite
from rfprune.tasks.registry import Task, check_labels
from rfprune.tasks.zoo import resolve_checkpoint

DEMO = "demo"
_HEADS = {
    "classification": "SequenceClassification",
    "regression": "SequenceClassification",
    "question-answering": "QuestionAnswering",
}
_WAYS_OUT = "give a folder that holds the checkpoint, or try --model demo"


@dataclass(frozen=True)
class Loaded:
    """A checkpoint ready for a task: in eval mode, on its device, all weights finite.

    `source` is the folder or hub id that it came from.
    """

    model: Any
    tokenizer: Any
    source: str


def load(name: str, task: Task, *, device: torch.device, dtype: torch.dtype) -> Loaded:
    """Load the checkpoint that `name` (folder, hub id, alias or demo) has for a task.

    Raises:
        UserError: there is none, it is damaged, of an unsupported type, without a trained head
            for the task, or with weights that are not finite; the sentence says which.
    """
    source = locate(name, task)
    with quiet_transformers(), _hub_errors(name, source):
        config = _read_config(source)
        _check_config(config, source, task)
        model = _load_pruned(source, dtype) if "rfprune" in config else _load(source, task, dtype)
        tokenizer = _load_tokenizer(source, model)
    check_finite(model)
    return Loaded(model.to(device).eval(), tokenizer, source)


def locate(name: str, task: Task) -> str:
    """The folder or hub id behind a name.

    Raises:
        UserError: no such folder, or an alias without a checkpoint for the task.
    """
    if name == DEMO:
        if task.name != DEMO_TASK:
            raise UserError(
                f"The demo is a checkpoint for task {DEMO_TASK}, not {task.name}: use --task "
                f"{DEMO_TASK}, or --model with a checkpoint for {task.name}."
            )
        return str(demo_path())
    path = Path(name).expanduser()
    if path.is_file():
        raise UserError(f"Model '{name}' is a file: give the folder that holds config.json.")
    return str(path) if path.is_dir() else resolve_checkpoint(name, task)


def data_folder(name: str, data_dir: Path | None) -> Path | None:
    """Where the data is: the folder that was given, the demo's own, or None for the hub."""
    return demo_data_dir() if name == DEMO and data_dir is None else data_dir


def length_limit(loaded: Loaded, task: Task, requested: int | None) -> int:
    """Tokens an example: what was asked for, or the task's length if the model has the positions.

    Raises:
        UserError: more was asked for than the model has positions.
    """
    positions = _num_positions(loaded.model)
    if requested is None:
        return min(task.max_length, positions)
    if requested > positions:
        raise UserError(
            f"--max-length {requested} is more than the {positions} positions that the model of "
            f"'{loaded.source}' has: choose {positions} or less."
        )
    return requested


def _num_positions(model: Any) -> int:
    """The longest input; where padding has a position (as in RoBERTa) the others come after it."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - before
    return int(model.config.max_position_embeddings)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep back the library's loading report (our errors say what matters) and side jobs."""
    from transformers.utils import logging

    # Where a hub repository holds only a pickle, transformers would ask a service to convert it.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    before = logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()


def _read_config(source: str) -> dict[str, Any]:
    """The configuration as it stands in config.json."""
    if not Path(source).is_dir():
        from transformers import PretrainedConfig

        found: dict[str, Any] = PretrainedConfig.get_config_dict(source)[0]
        if not found:
            raise UserError(f"'{source}' on the hub has no config.json: {_WAYS_OUT}.")
        return found
    import json

    folder = Path(source)
    if not any(folder.iterdir()):
        raise UserError(f"Model folder '{source}' is empty: {_WAYS_OUT}.")
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"Model folder '{source}' has no config.json: save the model again.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' is not readable as JSON ({_first_line(error)}).") from error
    if not isinstance(config, dict):
        raise UserError(f"'{path}' does not hold a JSON object: save the model again.")
    _check_files(folder)
    return config


def _check_files(folder: Path) -> None:
    """A folder must hold safetensors: reading a pickle can run whatever code it carries."""
    if any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        return
    pickles = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
    if pickles:
        raise UserError(
            f"Model folder '{folder}' holds its weights as a pickle ({min(pickles)}), which can "
            f"run code when read: load it where you trust it and save it with "
            f"save_pretrained(), which writes model.safetensors."
        )
    raise UserError(f"Model folder '{folder}' has no model.safetensors: save the model again.")


def _check_config(config: Mapping[str, Any], source: str, task: Task) -> None:
    """A supported model type, a head of the task's kind, and the task's labels."""
    from transformers import PretrainedConfig

    from rfprune.model.architectures import ARCHITECTURES

    model_type = config.get("model_type")
    if not model_type:
        raise UserError(f"The config.json of '{source}' names no model_type: save the model again.")
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"Model type '{model_type}' of '{source}' is not supported: the supported types are "
            f"{', '.join(sorted(ARCHITECTURES))}."
        )
    head = _HEADS[task.kind]
    names = [str(name) for name in config.get("architectures") or ()]
    if names and not any(name.endswith(f"For{head}") for name in names):
        raise _no_head(source, task, f"it is a {names[0]}, not a ...For{head}")
    if task.kind != "question-answering":
        try:
            labels = PretrainedConfig.from_dict(
                {
                    key: config[key]
                    for key in ("id2label", "label2id", "num_labels")
                    if key in config
                }
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"The labels in the config.json of '{source}' cannot be read "
                f"({_first_line(error)}): mend id2label."
            ) from error
        check_labels(labels, task)


def _no_head(source: str, task: Task, reason: str) -> UserError:
    return UserError(
        f"'{source}' has no trained head for task {task.name} ({reason}): fine-tune it on "
        f"{task.name} first, or choose a checkpoint that is."
    )


def _load_pruned(source: str, dtype: torch.dtype) -> Any:
    """A model that rfprune has pruned before, from a folder or the hub."""
    from rfprune.model.checkpoint import load_pruned

    if not Path(source).is_dir():
        from huggingface_hub import snapshot_download

        source = snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.txt"])
    return load_pruned(source, dtype=dtype)


def _load(source: str, task: Task, dtype: torch.dtype) -> Any:
    import transformers
    from safetensors import SafetensorError

    model_class = getattr(transformers, f"AutoModelFor{_HEADS[task.kind]}")
    try:
        model, info = model_class.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True if Path(source).is_dir() else None,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise UserError(
            f"The weights in '{source}' are damaged or cut short ({_first_line(error)}): copy or "
            f"download them again."
        ) from error
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"The checkpoint '{source}' cannot be loaded ({_first_line(error)}): its weights and "
            f"its config.json may not belong together."
        ) from error
    missing = sorted(str(key) for key in info["missing_keys"])
    inside = [key for key in missing if key.startswith(f"{model.base_model_prefix}.")]
    if missing and not inside:
        raise _no_head(source, task, f"{missing[0]} is missing")
    if inside:
        raise UserError(
            f"The checkpoint '{source}' lacks {len(missing)} weights, such as '{inside[0]}': copy "
            f"or download it again."
        )
    return model


def _load_tokenizer(source: str, model: Any) -> Any:
    """The tokenizer, which must be a fast one and make no id that the model has no row for."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # each tokenizer fails in its own way
        if not Path(source).is_dir() and isinstance(error, OSError):
            raise
        raise UserError(
            f"No tokenizer can be loaded from '{source}' ({_first_line(error)}): save the "
            f"tokenizer beside the model."
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"The tokenizer of '{source}' is a slow one: save a fast tokenizer.json.")
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) <= len(tokenizer.all_special_tokens):  # made up where files are missing
        raise UserError(f"'{source}' has no tokenizer: save the tokenizer beside the model.")
    rows = model.get_input_embeddings().num_embeddings
    largest = max(vocabulary.values())
    if largest >= rows:
        raise UserError(
            f"The tokenizer of '{source}' makes ids up to {largest} but the model has {rows} "
            f"embeddings: they do not belong together."
        )
    return tokenizer


@contextmanager
def _hub_errors(name: str, source: str) -> Iterator[None]:
    """Turn what hub and network raise into one sentence; answer at once where there is none."""
    if Path(source).is_dir():
        yield
        return
    from rfprune.tasks.hub import cached_when_unreachable

    with cached_when_unreachable():
        try:
            yield
        except (OSError, ValueError) as error:
            wanted = f"'{source}'" if name == source else f"'{source}' (for --model {name})"
            raise UserError(
                f"The checkpoint {wanted} is neither a folder here nor to be had from the Hugging "
                f"Face hub ({_first_line(error)}): check the name and the connection, {_WAYS_OUT}."
            ) from error


def _first_line(error: BaseException) -> str:
    """What an error says, short enough for one sentence."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else type(error).__name__
    return (text if len(text) <= 200 else text[:200] + "...").rstrip(".:")
