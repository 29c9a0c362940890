"""Load the checkpoint that `--model` names, with its tokenizer, after checking that it is usable.

Cheap checks come first: the folder, the configuration and the labels before the weights.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from rfprune.checkpoints.aliases import resolve_checkpoint
from rfprune.checkpoints.companion_files import read_companion_files
from rfprune.checkpoints.inspection import (
    OTHER_CHECKPOINTS,
    check_config,
    kind_of,
    labels_of,
    missing_head_error,
    read_config,
)
from rfprune.checkpoints.offload import layers_elsewhere, without_weights
from rfprune.checkpoints.padding import align_pad_token
from rfprune.checkpoints.sentence_transformers import (
    EmbedderSettings,
    read_sentence_transformer,
    transformer_folder,
)
from rfprune.demo import DEMO_TASK, demo_data_dir, demo_path
from rfprune.embeddings import POOLING_ENTRY
from rfprune.errors import RfpruneWarning, UserError, error_summary
from rfprune.families.architectures import ARCHITECTURES
from rfprune.model.validation import check_weights
from rfprune.settings import WritingSettings
from rfprune.tasks.max_length import NO_LIMIT, tokenizer_limit
from rfprune.tasks.own_data import (
    blank_custom_task,
    custom_task,
    language_task,
    seq2seq_task,
    similarity_task,
    with_columns,
)
from rfprune.tasks.registry import (
    AUTO_CLASSES,
    CUSTOM,
    LANGUAGE_MODELING,
    OWN_DATA,
    SEQ2SEQ,
    SIMILARITY,
    HeldOut,
    Task,
    get_task,
    with_splits,
)

DEMO = "demo"


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that is ready for a task.

    Attributes:
        model: in eval mode, on its device, all weights finite.
        tokenizer: the image processor for a model of images.
        source: the folder or hub id of the checkpoint.
        files: what goes along with the pruned model, by path within its folder; see
            `rfprune.checkpoints.companion_files`.
    """

    model: Any
    tokenizer: Any
    source: str
    files: Mapping[str, bytes] = field(default_factory=dict)


def resolve_task(
    name: str,
    model: str,
    *,
    data_dir: Path | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    train_split: str | None = None,
    validation_split: str | None = None,
    held_out: HeldOut | None = None,
    writing: WritingSettings | None = None,
) -> Task:
    """The task of that name; a task on your own data is made from the checkpoint and the data.

    Args:
        name: a task of `rfprune.tasks.registry`.
        model: folder, hub id, alias or "demo".
        data_dir: folder or file with the data; None: the hub's.
        text_columns: columns with the text or texts; None: the usual names.
        label_column: column with the labels; None: the usual names.
        train_split: name of the split to calibrate on; None: train.
        validation_split: name of the split to score on; None: that of the task.
        held_out: makes the validation split from rows of the training split.
        writing: how task seq2seq writes and scores texts; None: `WritingSettings()`.

    Raises:
        UserError: the task is unknown, or the checkpoint or the data does not fit it.
    """
    if name not in OWN_DATA:
        return with_splits(get_task(name), train_split, validation_split)
    known: Mapping[str, Callable[[], Task]] = {
        LANGUAGE_MODELING: language_task,
        SIMILARITY: similarity_task,
        SEQ2SEQ: lambda: seq2seq_task(writing or WritingSettings()),
    }
    task = known.get(name, blank_custom_task)()
    source = resolve_model(model, task)
    with quiet_transformers(), _hub_errors(model, source):
        config = read_config(source)
        if name == CUSTOM:
            labels, kind = labels_of(config, source), kind_of(config, source)
            task = custom_task(labels, config.get("problem_type"), source, kind)
        check_config(config, source, task)
    task = with_splits(replace(task, held_out=held_out), train_split, validation_split)
    return with_columns(task, data_dir, text_columns, label_column)


def load(
    name: str,
    task: Task,
    *,
    device: torch.device,
    dtype: torch.dtype,
    offload: str | None = None,
) -> LoadedCheckpoint:
    """Load a checkpoint for a task.

    Args:
        name: folder, hub id, alias (such as bert-base) or "demo".
        task: the task that its head must fit.
        device: where the model is put.
        dtype: of the loaded weights.
        offload: where layers stay until they are needed: "cpu" or "disk"; None for `device`.

    Raises:
        UserError: the checkpoint is missing, damaged, of an unsupported type, without a trained
            head for the task, or has weights that are not finite.
    """
    source = resolve_model(name, task)
    with quiet_transformers(), _hub_errors(name, source):
        config = read_config(source)
        check_config(config, source, task)
        embeds = task.kind == "similarity"
        extra = read_sentence_transformer(source) if embeds else EmbedderSettings()
        files = read_companion_files(source)
        _warn_of_own_code(config, source)
        options: dict[str, Any] = {"dtype": dtype}
        if offload is not None:
            options["device_map"] = layers_elsewhere(shapes_of(name, task), device, offload)
        model = (_load_pruned if "rfprune" in config else _load)(source, task, options)
        images = task.kind == "image-classification"
        slow = task.kind == "seq2seq"  # Marian's tokenizer is, with a vocabulary per language
        tokenizer = (
            _load_processor(source) if images else _load_tokenizer(source, model, may_be_slow=slow)
        )
    if extra.pooling is not None:
        setattr(model.config, POOLING_ENTRY, extra.pooling)
    if extra.max_tokens is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, extra.max_tokens)
    if not images:
        align_pad_token(model, tokenizer, source)
    check_weights(model)
    if offload is None:
        model = model.to(device)
    return LoadedCheckpoint(model.eval(), tokenizer, source, files)


def _warn_of_own_code(config: Mapping[str, Any], source: str) -> None:
    """Say that modelling code in a checkpoint is not run."""
    auto_map = config.get("auto_map")
    names = [name for name in auto_map if name != "AutoConfig"] if auto_map else []
    if names and "rfprune" not in config:
        warnings.warn(
            f"'{source}' brings modelling code of its own (auto_map in config.json), which is not "
            f"run: the weights are loaded into the {config['model_type']} model of transformers, "
            "so check the score of the original",
            RfpruneWarning,
            stacklevel=3,
        )


def resolve_model(name: str, task: Task) -> str:
    """The folder or hub id behind a name.

    Raises:
        UserError: no such folder, or an alias without a checkpoint for the task.
    """
    if name == DEMO:
        if task.name not in (DEMO_TASK, CUSTOM):
            raise UserError(
                f"The demo is a checkpoint for task {DEMO_TASK}, not {task.name}: use --task "
                f"{DEMO_TASK}, or --model with a checkpoint for {task.name}."
            )
        return str(demo_path())
    path = Path(name).expanduser()
    if path.is_file():
        raise UserError(f"Model '{name}' is a file: give the folder that holds config.json.")
    return str(transformer_folder(path)) if path.is_dir() else resolve_checkpoint(name, task)


def resolve_data_dir(name: str, data_dir: Path | None) -> Path | None:
    """The folder with the data: the given one, the demo's own, or None for the hub."""
    return demo_data_dir() if name == DEMO and data_dir is None else data_dir


def resolve_max_length(loaded: LoadedCheckpoint, task: Task, requested: int | None) -> int:
    """Tokens per example: the requested number, or what task, model and tokenizer all allow.

    Raises:
        UserError: more tokens are requested than the model has positions.
    """
    if task.kind == "image-classification":
        return task.max_length  # the model fixes the number of patches
    positions = _num_positions(loaded.model)
    if requested is None:
        return min(task.max_length, positions, tokenizer_limit(loaded.tokenizer))
    if requested > positions:
        raise UserError(
            f"--max-length {requested} exceeds the {positions} positions of the model "
            f"'{loaded.source}': choose {positions} or less."
        )
    return requested


def _num_positions(model: Any) -> int:
    """The longest input in tokens; RoBERTa's positions start after the one of its padding."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - before
    return int(getattr(model.config, "max_position_embeddings", None) or NO_LIMIT)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within: no loading report, no progress bar, no conversion service of transformers.

    For a hub repository with pickled weights alone, transformers would ask a service to convert
    them. Logging and environment are restored at the end.
    """
    from transformers.utils import logging

    before = logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    offloading = getLogger("accelerate.big_modeling")  # says that weights are where --offload is
    level = offloading.level
    offloading.setLevel(ERROR)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with _environment_default("DISABLE_SAFETENSORS_CONVERSION", "1"):
            yield
    finally:
        offloading.setLevel(level)
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()


@contextmanager
def _environment_default(name: str, value: str) -> Iterator[None]:
    """Within, an environment variable has this value unless it is set already."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def shapes_of(name: str, task: Task) -> Any:
    """The model of a checkpoint without its weights, on the meta device.

    Args:
        name: folder, hub id, alias or "demo".

    Raises:
        UserError: the checkpoint is missing, or of an unsupported type.
    """
    import transformers

    source = resolve_model(name, task)
    with quiet_transformers(), _hub_errors(name, source):
        check_config(read_config(source), source, task)
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        return without_weights(getattr(transformers, AUTO_CLASSES[task.kind]), config)


def _load_pruned(source: str, _: Task, options: Mapping[str, Any]) -> Any:
    """An output of rfprune, from a folder or the hub."""
    from rfprune.model.checkpoint import load_pruned

    if not Path(source).is_dir():
        from huggingface_hub import snapshot_download

        source = snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.txt"])
    return load_pruned(source, **options)


def _load(source: str, task: Task, options: Mapping[str, Any]) -> Any:
    """A model of transformers in which every weight comes from the checkpoint."""
    import transformers

    model_class = getattr(transformers, AUTO_CLASSES[task.kind])
    try:
        model, info = model_class.from_pretrained(
            source,
            use_safetensors=True if Path(source).is_dir() else None,
            ignore_mismatched_sizes=True,  # _check_shapes reports them
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except SafetensorError as error:
        raise UserError(
            f"The weights in '{source}' are damaged or cut short ({error_summary(error)}): copy or "
            f"download them again."
        ) from error
    except Exception as error:  # models raise errors of many types
        if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
            raise
        if isinstance(error, OSError) and not Path(source).is_dir():
            raise
        if isinstance(error, ImportError) or "attn_implementation" in str(error):
            raise UserError(
                f"The checkpoint '{source}' needs what this machine does not have "
                f"({error_summary(error)}): remove the entry that asks for it, such as "
                f"attn_implementation, from its config.json, or install it."
            ) from error
        if "Unrecognized configuration class" in str(error):
            kind = read_config(source).get("model_type")
            raise UserError(
                f"The checkpoint '{source}' is a {kind} model, which has no class for task "
                f"{task.name} ({AUTO_CLASSES[task.kind]}): choose a task that fits it, or load it "
                "yourself and call rfprune.prune."
            ) from error
        raise UserError(
            f"The checkpoint '{source}' cannot be loaded ({error_summary(error)}): its config.json "
            f"may belong to other weights, or a file is missing or damaged; copy or download it "
            f"again."
        ) from error
    _check_shapes(info["mismatched_keys"], source)
    _check_missing(info["missing_keys"], model, source, task)
    _check_left_over(info["unexpected_keys"], model, source)
    return model


def _check_shapes(mismatched: Collection[tuple[Any, ...]], source: str) -> None:
    """Refuse weights whose shape differs from the configuration's.

    Args:
        mismatched: name, shape in the checkpoint, shape according to the configuration.
    """
    if mismatched:
        name, saved, expected = min(mismatched, key=lambda entry: str(entry[0]))
        raise UserError(
            f"'{name}' in the checkpoint '{source}' has the shape {tuple(saved)}, but its "
            f"config.json requires {tuple(expected)}: the two do not belong together; copy or "
            f"download both again."
        )


def _check_missing(missing: Iterable[str], model: Any, source: str, task: Task) -> None:
    """Refuse a checkpoint with missing weights, which transformers would initialise at random."""
    names = sorted(str(name) for name in missing)
    inside = [name for name in names if name.startswith(f"{model.base_model_prefix}.")]
    if model.base_model is model:  # no head; embeddings do not use a pooler
        inside = names = [name for name in names if not name.startswith("pooler.")]
    if names and not inside:
        raise missing_head_error(source, task, f"{names[0]} is missing")
    if inside:
        number = "a weight" if len(inside) == 1 else f"{len(inside)} weights"
        raise UserError(
            f"The checkpoint '{source}' lacks {number} that its config.json requires, such as "
            f"'{inside[0]}': copy or download it again."
        )


def _check_left_over(unexpected: Iterable[str], model: Any, source: str) -> None:
    """Refuse a checkpoint with weights of layers that transformers would drop silently."""
    stacks = ARCHITECTURES[model.config.model_type].stacks
    layers = tuple(f"{model.base_model_prefix}.{stack.layers}." for stack in stacks)
    names = sorted(str(name) for name in unexpected if str(name).startswith(layers))
    if names:
        raise UserError(
            f"The checkpoint '{source}' holds '{names[0]}', but the {model.config.model_type} "
            f"model of its config.json has no such weight: the two do not belong together; copy or "
            f"download both again, or merge an adapter first."
        )


def _load_processor(source: str) -> Any:
    """The image processor of a checkpoint."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # processors raise errors of many types
        if not Path(source).is_dir() and isinstance(error, OSError):
            raise
        raise UserError(
            f"No image processor can be loaded from '{source}' ({error_summary(error)}): save it "
            f"beside the model, as preprocessor_config.json."
        ) from error


def _load_tokenizer(source: str, model: Any, *, may_be_slow: bool = False) -> Any:
    """The tokenizer: fast, unless it may be slow, and with no id beyond the model's embeddings."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # tokenizers raise errors of many types
        if not Path(source).is_dir() and isinstance(error, OSError):
            raise
        raise UserError(
            f"No tokenizer can be loaded from '{source}' ({error_summary(error)}): save the "
            f"tokenizer beside the model."
        ) from error
    if not (tokenizer.is_fast or may_be_slow):
        raise UserError(
            f"The tokenizer of '{source}' is slow, and a fast one is needed: save a tokenizer.json."
        )
    vocabulary = tokenizer.get_vocab()
    # transformers substitutes an empty tokenizer for missing files
    if len(vocabulary) <= len(tokenizer.all_special_tokens):
        raise UserError(
            f"'{source}' has no tokenizer.json: save the tokenizer beside the model, with its "
            f"save_pretrained()."
        )
    rows = model.get_input_embeddings().num_embeddings
    largest = max(vocabulary.values())
    if largest >= rows:
        raise UserError(
            f"The tokenizer of '{source}' makes ids up to {largest} but the model has {rows} "
            f"embeddings: save the tokenizer that the model was trained with beside it."
        )
    return tokenizer


@contextmanager
def _hub_errors(name: str, source: str) -> Iterator[None]:
    """Turn errors of hub and network into UserErrors; without a connection, answer at once."""
    if Path(source).is_dir():
        yield
        return
    from rfprune.tasks.offline import cached_when_unreachable

    with cached_when_unreachable():
        try:
            yield
        except (OSError, ValueError) as error:
            wanted = f"'{source}'" if name == source else f"'{source}' (for --model {name})"
            raise UserError(
                f"The checkpoint {wanted} is neither a folder here nor available from the Hugging "
                f"Face hub ({error_summary(error)}): check the name and the connection, "
                f"{OTHER_CHECKPOINTS}."
            ) from error
