"""From what `--model` names to a model, its tokenizer and a device: everything checked first.

What is cheap is checked before what is dear: the folder, the configuration, the task's labels, and
only then the weights.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from rfprune.checkpoints.aliases import resolve_checkpoint
from rfprune.checkpoints.inspection import (
    OTHER_CHECKPOINTS,
    check_config,
    kind_of,
    labels_of,
    missing_head_error,
    read_config,
    reason,
)
from rfprune.checkpoints.sentence_transformers import (
    SentenceTransformerFiles,
    read_sentence_transformer,
    transformer_folder,
)
from rfprune.demo import DEMO_TASK, demo_data_dir, demo_path
from rfprune.embeddings import POOLING_ENTRY
from rfprune.errors import UserError
from rfprune.families.architectures import ARCHITECTURES
from rfprune.model.validation import check_finite_weights
from rfprune.tasks.max_length import tokenizer_limit
from rfprune.tasks.own_data import (
    blank_custom_task,
    custom_task,
    language_task,
    similarity_task,
    with_columns,
)
from rfprune.tasks.registry import (
    AUTO_CLASSES,
    CUSTOM,
    LANGUAGE_MODELING,
    OWN_DATA,
    SIMILARITY,
    Task,
    get_task,
)

DEMO = "demo"


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint ready for a task: in eval mode, on its device, all weights finite.

    `source` is the folder or hub id that it came from; the `tokenizer` of a model of images is its
    image processor. `embedder`: what stands beside the model of an embedder.
    """

    model: Any
    tokenizer: Any
    source: str
    sentence_transformer: SentenceTransformerFiles = field(default_factory=SentenceTransformerFiles)


def resolve_task(
    name: str,
    model: str,
    *,
    data_dir: Path | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
) -> Task:
    """The task of that name; `custom` is made from the configuration of `model` and the data.

    `text_columns` and `label_column` name the columns of `custom`; None: the usual names.

    Raises:
        UserError: there is no such task, or model or data do not make one; the sentence says why.
    """
    if name not in OWN_DATA:
        return get_task(name)
    known = {LANGUAGE_MODELING: language_task, SIMILARITY: similarity_task}
    task = known[name]() if name in known else blank_custom_task()
    source = resolve_model(model, task)
    with quiet_transformers(), _hub_errors(model, source):
        config = read_config(source)
        if name == CUSTOM:
            labels, kind = labels_of(config, source), kind_of(config, source)
            task = custom_task(labels, config.get("problem_type"), source, kind)
        check_config(config, source, task)
    return with_columns(task, data_dir, text_columns, label_column)


def load(name: str, task: Task, *, device: torch.device, dtype: torch.dtype) -> LoadedCheckpoint:
    """Load the checkpoint that `name` (folder, hub id, alias or demo) has for a task.

    Raises:
        UserError: there is none, it is damaged, of an unsupported type, without a trained head
            for the task, or with weights that are not finite; the sentence says which.
    """
    source = resolve_model(name, task)
    with quiet_transformers(), _hub_errors(name, source):
        config = read_config(source)
        check_config(config, source, task)
        beside = (
            read_sentence_transformer(source)
            if task.kind == "similarity"
            else SentenceTransformerFiles()
        )
        model = _load_pruned(source, dtype) if "rfprune" in config else _load(source, task, dtype)
        images = task.kind == "image-classification"
        tokenizer = _load_processor(source) if images else _load_tokenizer(source, model)
    if beside.pooling is not None:
        setattr(model.config, POOLING_ENTRY, beside.pooling)
    if beside.max_tokens is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, beside.max_tokens)
    check_finite_weights(model)
    return LoadedCheckpoint(model.to(device).eval(), tokenizer, source, beside)


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
    """Where the data is: the folder that was given, the demo's own, or None for the hub."""
    return demo_data_dir() if name == DEMO and data_dir is None else data_dir


def resolve_max_length(loaded: LoadedCheckpoint, task: Task, requested: int | None) -> int:
    """Tokens an example: what was asked for, or the task's length if model and tokenizer have it.

    Raises:
        UserError: more was asked for than the model has positions.
    """
    if task.kind == "image-classification":
        return task.max_length  # an image has as many patches as the model wants
    positions = _num_positions(loaded.model)
    if requested is None:
        return min(task.max_length, positions, tokenizer_limit(loaded.tokenizer))
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


def _load_pruned(source: str, dtype: torch.dtype) -> Any:
    """A model that rfprune has pruned before, from a folder or the hub."""
    from rfprune.model.checkpoint import load_pruned

    if not Path(source).is_dir():
        from huggingface_hub import snapshot_download

        source = snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.txt"])
    return load_pruned(source, dtype=dtype)


def _load(source: str, task: Task, dtype: torch.dtype) -> Any:
    """A model as transformers has it, every weight in its place; the caller is quiet."""
    import transformers

    model_class = getattr(transformers, AUTO_CLASSES[task.kind])
    try:
        model, info = model_class.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True if Path(source).is_dir() else None,
            ignore_mismatched_sizes=True,  # they are looked for below
            trust_remote_code=False,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise UserError(
            f"The weights in '{source}' are damaged or cut short ({reason(error)}): copy or "
            f"download them again."
        ) from error
    except Exception as error:  # each configuration and model fails in its own way
        if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
            raise
        if isinstance(error, OSError) and not Path(source).is_dir():
            raise
        raise UserError(
            f"The checkpoint '{source}' cannot be loaded ({reason(error)}): its config.json may "
            f"not be that of its weights, or a file is missing or damaged; copy or download it "
            f"again."
        ) from error
    _check_shapes(info["mismatched_keys"], source)
    _check_missing(info["missing_keys"], model, source, task)
    _check_left_over(info["unexpected_keys"], model, source)
    return model


def _check_shapes(mismatched: Collection[tuple[Any, ...]], source: str) -> None:
    """`mismatched`: name, shape in the checkpoint, shape by the configuration."""
    if mismatched:
        name, saved, promised = min(mismatched, key=lambda entry: str(entry[0]))
        raise UserError(
            f"'{name}' in the checkpoint '{source}' has the shape {tuple(saved)}, but by its "
            f"config.json it should have {tuple(promised)}: the two do not belong together; copy "
            f"or download both again."
        )


def _check_missing(missing: Iterable[str], model: Any, source: str, task: Task) -> None:
    """Weights that transformers would draw at random."""
    names = sorted(str(name) for name in missing)
    inside = [name for name in names if name.startswith(f"{model.base_model_prefix}.")]
    if model.base_model is model:  # no head; the pooler, if it has one, plays no part in embeddings
        inside = names = [name for name in names if not name.startswith("pooler.")]
    if names and not inside:
        raise missing_head_error(source, task, f"{names[0]} is missing")
    if inside:
        number = "a weight" if len(inside) == 1 else f"{len(inside)} weights"
        raise UserError(
            f"The checkpoint '{source}' lacks {number} that its config.json asks for, such as "
            f"'{inside[0]}': copy or download it again."
        )


def _check_left_over(unexpected: Iterable[str], model: Any, source: str) -> None:
    """Weights of the layers that transformers would leave out: without them it is another model."""
    stacks = ARCHITECTURES[model.config.model_type].stacks
    layers = tuple(f"{model.base_model_prefix}.{stack.layers}." for stack in stacks)
    names = sorted(str(name) for name in unexpected if str(name).startswith(layers))
    if names:
        raise UserError(
            f"The checkpoint '{source}' holds '{names[0]}', for which a {model.config.model_type} "
            f"model of its config.json has no place: the two do not belong together, or an adapter "
            f"is to be merged first."
        )


def _load_processor(source: str) -> Any:
    """The image processor."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # each processor fails in its own way
        if not Path(source).is_dir() and isinstance(error, OSError):
            raise
        raise UserError(
            f"No image processor can be loaded from '{source}' ({reason(error)}): save it beside "
            f"the model, as preprocessor_config.json."
        ) from error


def _load_tokenizer(source: str, model: Any) -> Any:
    """The tokenizer, which must be a fast one and make no id that the model has no row for."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # each tokenizer fails in its own way
        if not Path(source).is_dir() and isinstance(error, OSError):
            raise
        raise UserError(
            f"No tokenizer can be loaded from '{source}' ({reason(error)}): save the "
            f"tokenizer beside the model."
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"The tokenizer of '{source}' is a slow one: save a fast tokenizer.json.")
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) <= len(tokenizer.all_special_tokens):  # made up where files are missing
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
    """Turn what hub and network raise into one sentence; answer at once where there is none."""
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
                f"The checkpoint {wanted} is neither a folder here nor to be had from the Hugging "
                f"Face hub ({reason(error)}): check the name and the connection, "
                f"{OTHER_CHECKPOINTS}."
            ) from error
