"""A model with fewer tokens: embeddings, output layers and their biases, and every id that its
configuration names."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rfprune.errors import UserError
from rfprune.model.unwrapped import remove_added_methods

_TOKEN_TABLES = ("embed_tokens", "word_embeddings", "shared", "wte", "tok_embeddings")
_POSITION_TABLES = ("position_embeddings", "embed_positions")
_ENDS_OF_IDS = ("_token_id", "_token_ids", "_token_index")
_LISTS_OF_IDS = (
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids"),
    "forced_decoder_ids",
)
_BIAS_OF_LOGITS = "final_logits_bias"


def num_tokens(model: PreTrainedModel) -> int:
    """Rows of the embeddings of tokens."""
    return int(model.get_input_embeddings().weight.shape[0])


def ids_to_keep(model: PreTrainedModel) -> set[int]:
    """The ids that a model needs whatever its texts are.

    These are the ids in its configurations. Models that count positions from the id of the padding
    (RoBERTa) also need every id below it, since that id must not change.
    """
    rows = num_tokens(model)
    needed = {number for config in _configs(model) for number in _ids_of(config)}
    for path, module in model.named_modules():
        start = getattr(module, "padding_idx", None)
        if path.rpartition(".")[2] in _POSITION_TABLES and isinstance(start, int):
            needed.update(range(start + 1))
    return {number for number in needed if 0 <= number < rows}


def with_rows(model: PreTrainedModel, rows: Sequence[int]) -> PreTrainedModel:
    """A copy of a model with some rows of its embeddings and output layers.

    Weights that are sliced are not copied first. Tied weights stay tied.

    Args:
        rows: the old id of every new id.

    Raises:
        UserError: a table of tokens has another number of rows than the input embeddings.
    """
    size, index = num_tokens(model), torch.tensor(rows)
    _check_resident(model)
    distinct = {id(tensor): tensor for tensor in _tensors(model, size)}
    sliced = {key: _sliced(tensor, index, size) for key, tensor in distinct.items()}
    small: PreTrainedModel = copy.deepcopy(model, dict(sliced))
    remove_added_methods(small)
    new_ids = {old: new for new, old in enumerate(rows)}
    made = {id(tensor) for tensor in sliced.values()}
    for path, module in small.named_modules():
        _resize(module, path, made, size, len(rows), new_ids)
    for config in _configs(small):
        _renumber(config, new_ids)
        if getattr(config, "vocab_size", None) is not None:
            config.vocab_size = len(rows)
    return small


def _check_resident(model: PreTrainedModel) -> None:
    """Refuse a model some of whose weights are elsewhere."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(
            "the vocabulary of a model with offloaded weights cannot be trimmed: trim it without "
            "offloading (on the CPU, in bfloat16 if memory is short), then offload the result"
        )


def _tensors(model: PreTrainedModel, size: int) -> list[Tensor]:
    """All weights with a row per token."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and path.rpartition(".")[2] in _TOKEN_TABLES:
            if module.num_embeddings != size:
                raise UserError(
                    f"'{path}' has {module.num_embeddings} rows and the input embeddings have "
                    f"{size}: a model with several vocabularies cannot be trimmed"
                )
            found.append(module.weight)
    found.append(model.get_input_embeddings().weight)
    head = model.get_output_embeddings()
    if head is not None:
        found.append(head.weight)
    inside = {id(parameter) for parameter in model.base_model.parameters()}
    biases = [
        parameter
        for parameter in model.parameters()
        if parameter.dim() == 1 and len(parameter) == size and id(parameter) not in inside
    ]
    buffers = [
        buffer
        for path, buffer in model.named_buffers()
        if path.rpartition(".")[2] == _BIAS_OF_LOGITS
    ]
    return [*found, *(biases if head is not None else []), *buffers]


def _sliced(tensor: Tensor, rows: Tensor, size: int) -> Tensor:
    """The entries of some tokens, in the dimension that has one for each."""
    dimension = 0 if tensor.shape[0] == size else tensor.dim() - 1
    chosen = tensor.detach().index_select(dimension, rows.to(tensor.device))
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(chosen, requires_grad=tensor.requires_grad)
    return chosen


def _resize(
    module: Any,
    path: str,
    made: set[int],
    before: int,
    after: int,
    new_ids: Mapping[int, int],
) -> None:
    """Correct what a module says of its own size, and the id of its padding."""
    weight = getattr(module, "weight", None)
    if id(weight) in made:
        for name in ("num_embeddings", "out_features"):
            if getattr(module, name, None) == before:
                setattr(module, name, after)
    if getattr(module, "vocab_size", None) == before:
        module.vocab_size = after
    padding = getattr(module, "padding_idx", None)
    if (
        isinstance(padding, int)
        and padding in new_ids
        and path.rpartition(".")[2] not in _POSITION_TABLES
    ):
        module.padding_idx = new_ids[padding]


def _configs(model: PreTrainedModel) -> list[Any]:
    """The configuration of the model and that of its generation, if it has one."""
    generation = getattr(model, "generation_config", None)
    return [model.config] if generation is None else [model.config, generation]


def _entries(config: Any) -> dict[str, Any]:
    """The entries of a configuration that are ids."""
    values = {name: getattr(config, name, None) for name in {**vars(config), **config.to_dict()}}
    return {
        name: value
        for name, value in values.items()
        if value is not None and (name.endswith(_ENDS_OF_IDS) or name in _LISTS_OF_IDS)
    }


def _ids_of(config: Any) -> list[int]:
    found: list[int] = []

    def add(number: int) -> int:
        found.append(number)
        return number

    for name, value in _entries(config).items():
        _mapped(name, value, add)
    return found


def _renumber(config: Any, new_ids: Mapping[int, int]) -> None:
    for name, value in _entries(config).items():
        setattr(config, name, _mapped(name, value, lambda old: new_ids.get(old, old)))


def _mapped(name: str, value: Any, change: Any) -> Any:
    """A value with its ids changed; of `forced_decoder_ids` the first of each pair is a place."""
    if isinstance(value, list | tuple):
        if name == "forced_decoder_ids":
            return [[place, None if one is None else change(one)] for place, one in value]
        return [_mapped(name, one, change) for one in value]
    return change(value) if isinstance(value, int) and not isinstance(value, bool) else value
