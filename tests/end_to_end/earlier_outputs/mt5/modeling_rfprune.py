"""A Transformer pruned by rfprune: the architecture's own class with smaller projections.

This file travels with the weights, so that `from_pretrained(..., trust_remote_code=True)` needs no
other package than transformers. It reads the sizes of the pruned blocks from the entry "rfprune" of
config.json, checks them, gives the projections these sizes, and nothing else: it opens no file, no
connection, and runs no other code.
"""

from functools import partial
from inspect import signature
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

FORMAT_VERSION = 2
BIAS_TABLE = "relative_attention_bias"  # in an attention, a number for each distance and each head

_FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,),  # such as "layer.0.heads"
    "kind": (str,),  # "head" or "neuron"
    "num_units": (int,),  # heads or neurons that are left; without any, the sublayer is bypassed
    "unit_width": (int,),  # input features of the consumer that one unit has
    "units": (list, type(None)),  # which heads of the unpruned model these are
    "producers": (list,),  # linear maps whose output rows make the units; see below
    "consumer": (str,),  # path of the linear map whose input columns are the units
    "inner": (str,),  # path of the module that holds the producers, or is the only one
    "inner_returns_tuple": (bool,),
    "head_bias": (str, type(None)),  # argument of `inner` with one slice a head
    "bypass": (str,),  # what `inner` does beside computing units: plain, normed or biased
    "has_bias_table": (bool,),  # whether `inner` looks up a position bias in a table of its own
}

_DEFAULTS: dict[str, Any] = {"bypass": "plain", "has_bias_table": False}  # of fields added later

_PRODUCER_FIELDS: dict[str, tuple[type, ...]] = {
    "path": (str,),
    "parts": (int,),  # how many times it holds all units, one part after the other
    "width": (int,),  # rows of one unit in one part
}


def pruned_class(base: type) -> Any:
    """The pruned counterpart of a model class of transformers.

    It has the same name, by which pipelines and others tell what a model can do.
    """
    base = getattr(base, "pruned_from", base)
    name = base.__name__
    known = globals().get(name)
    if known is None or known.pruned_from is not base:
        entries = {"pruned_from": base, "_auto_class": _auto_class(name), "__module__": __name__}
        globals()[name] = type(name, (_Pruned, base), entries)
    return globals()[name]


def _auto_class(name: str) -> str:
    """Of transformers' own Auto classes the one that makes models of a class."""
    _, found, head = name.removesuffix("WithTeacher").partition("For")
    if name.endswith("LMHeadModel"):
        return "AutoModelForCausalLM"
    if head == "ConditionalGeneration" or name.endswith("MTModel"):
        return "AutoModelForSeq2SeqLM"
    return f"AutoModelFor{head}" if found else "AutoModel"


def __getattr__(name: str) -> Any:
    """Make a pruned class when transformers or pickle ask for it by its name."""
    base = None if name.startswith("_") else getattr(transformers, name, None)
    if not (isinstance(base, type) and issubclass(base, transformers.PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pruned_class(base)


class _Pruned(nn.Module):
    """Stands before a model class and shrinks the model when that has built it."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        blocks = check_description(getattr(config, "rfprune", None))
        config.rfprune = {"format_version": FORMAT_VERSION, "blocks": blocks}
        shrink(self, blocks)


def check_description(description: Any) -> list[dict[str, Any]]:
    """The blocks of `description`, the entry "rfprune" of a config.json, as this version has them.

    Raises:
        ValueError: the entry is missing, malformed or of another format version.
    """
    if not isinstance(description, dict):
        raise ValueError("there is no entry 'rfprune', so this is not a pruned model")
    version, blocks = description.get("format_version"), description.get("blocks")
    if version not in (1, FORMAT_VERSION):
        raise ValueError(
            f"the format version is {version!r}, not {FORMAT_VERSION}: upgrade rfprune"
        )
    if not isinstance(blocks, list):
        raise ValueError("there is no list of blocks")
    if version == 1:
        blocks = [_upgraded(block) for block in blocks]
    blocks = [_DEFAULTS | block if type(block) is dict else block for block in blocks]
    for block in blocks:
        _check_block(block)
    return blocks


def _upgraded(block: Any) -> Any:
    """A block as this version describes it, from one of version 1."""
    try:
        paths, bias = block["producers"], block["shared_position_bias"]
        producers = [{"path": path, "parts": 1, "width": block["unit_width"]} for path in paths]
        kept = {name: value for name, value in block.items() if name in _FIELDS}
        return kept | {
            "name": f"layer.{block['layer']}.{block['kind']}s",
            "producers": producers,
            "head_bias": "position_bias" if bias else None,
        }
    except (TypeError, KeyError):
        return block


def _check_block(block: Any) -> None:
    _check_fields(block, _FIELDS)
    units, inner = block["units"], block["inner"]
    for producer in block["producers"]:
        _check_fields(producer, _PRODUCER_FIELDS)
    sound = {
        "kind": block["kind"] in ("head", "neuron"),
        "num_units": block["num_units"] >= 0,
        "unit_width": block["unit_width"] > 0,
        "units": units is None
        or (
            len(units) == block["num_units"]
            and all(type(unit) is int and unit >= 0 for unit in units)
            and len(set(units)) == len(units)
        ),
        "producers": all(
            (p["path"].startswith(f"{inner}.") or p["path"] == inner)
            and p["parts"] > 0
            and p["width"] > 0
            for p in block["producers"]
        ),
        "head_bias": block["head_bias"] is None or units is not None,
        "bypass": block["bypass"] in ("plain", "normed", "biased"),
    }
    for field, is_sound in sound.items():
        if not is_sound:
            raise ValueError(f"a block has a bad '{field}': {block[field]!r:.80}")


def _check_fields(entry: Any, fields: dict[str, tuple[type, ...]]) -> None:
    if not isinstance(entry, dict) or entry.keys() != fields.keys():
        what = "block" if fields is _FIELDS else "producer of a block"
        raise ValueError(f"a {what} must have the fields {', '.join(fields)}; got {entry!r:.80}")
    for field, types in fields.items():
        if type(entry[field]) not in types:
            raise ValueError(f"a block has a bad '{field}': {entry[field]!r:.80}")


def shrink(model: nn.Module, blocks: list[dict[str, Any]]) -> None:
    """Give the projections of `model` the sizes of `blocks`, which `check_description` has checked.

    Raises:
        ValueError: a path is not that of a linear map at least as large.
    """
    for block in blocks:
        width = block["num_units"] * block["unit_width"]
        consumer = _linear(model, block["consumer"])
        inputs, outputs = _sizes(consumer)
        if width > inputs:
            raise ValueError(f"'{block['consumer']}' is smaller than {width} features")
        rows = {}
        for producer in block["producers"]:
            path = producer["path"]
            rows[path] = producer["parts"] * block["num_units"] * producer["width"]
            if rows[path] > _sizes(_linear(model, path))[1]:
                raise ValueError(f"'{path}' is smaller than {rows[path]} features")
        if width == 0:
            _empty(model, block, consumer)
            continue
        for path, size in rows.items():
            old = _linear(model, path)
            _replace(model, path, _linear_like(old, _sizes(old)[0], size))
        _replace(model, block["consumer"], _linear_like(consumer, width, outputs))
        if block["kind"] == "head":
            _set_heads(model.get_submodule(block["inner"]), block, width)


def _linear(model: nn.Module, path: str) -> nn.Linear | Conv1D:
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"there is no module '{path}'") from error
    if not isinstance(module, nn.Linear | Conv1D):
        raise ValueError(f"'{path}' is a {type(module).__name__}, not a linear map")
    return module


def _sizes(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """Inputs and outputs of a linear map; a Conv1D keeps its weight the other way round."""
    first, second = module.weight.shape
    return (first, second) if isinstance(module, Conv1D) else (second, first)


def _linear_like(old: nn.Linear | Conv1D, inputs: int, outputs: int) -> Any:
    if isinstance(old, Conv1D):
        with old.weight.device:
            return Conv1D(outputs, inputs).to(old.weight.dtype)
    like = {"device": old.weight.device, "dtype": old.weight.dtype}
    return nn.Linear(inputs, outputs, bias=old.bias is not None, **like)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module.train(model.training))


def _set_heads(attention: Any, block: dict[str, Any], width: int) -> None:
    """Tell an attention how many heads it has left; several may share one key and one value."""
    head_width = min(producer["width"] for producer in block["producers"])
    sizes = {
        **dict.fromkeys(("num_attention_heads", "n_heads", "num_heads"), width // head_width),
        **dict.fromkeys(("all_head_size", "split_size", "inner_dim"), width),
        "num_key_value_heads": block["num_units"],
    }
    for name, size in sizes.items():
        if hasattr(attention, name):
            setattr(attention, name, size)
    if block["bypass"] == "biased":
        _make_own_bias(attention, block)
    if block["head_bias"] is not None:
        if not hasattr(attention, "kept_heads"):
            position = list(signature(attention.forward).parameters).index(block["head_bias"])
            hook = partial(_select_bias, name=block["head_bias"], position=position)
            attention.register_forward_pre_hook(hook, with_kwargs=True)
        attention.kept_heads = list(block["units"])


def _make_own_bias(attention: Any, block: dict[str, Any]) -> None:
    """Let an attention look up the position bias of its heads; the layer below hands on others."""
    if block["has_bias_table"]:
        shape = attention.relative_attention_num_buckets, block["num_units"]
        table = nn.Embedding.from_pretrained(attention.o.weight.new_zeros(shape), freeze=False)
        setattr(attention, BIAS_TABLE, table)
        attention.has_relative_attention_bias = True
    if not hasattr(attention, "makes_own_bias"):
        attention.register_forward_pre_hook(_without_bias, with_kwargs=True)
        attention.makes_own_bias = True


def _without_bias(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, kwargs | {"position_bias": None}


def _select_bias(
    attention: Any, args: Any, kwargs: dict[str, Any], *, name: str, position: int
) -> Any:
    """From a bias (B, H, S, S) for all heads, take those that are kept; (B, 1, S, S) fits any."""
    bias = args[position] if len(args) > position else kwargs.get(name)
    if bias is None or bias.shape[1] == 1:
        return args, kwargs
    bias = bias[:, attention.kept_heads]
    if len(args) > position:
        return (*args[:position], bias, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: bias}


def _empty(model: nn.Module, block: dict[str, Any], consumer: nn.Linear | Conv1D) -> None:
    path, output = block["inner"], ConstantOutput(consumer)
    num_others = block["inner_returns_tuple"] + (block["bypass"] == "biased")
    name = block["consumer"].removeprefix(path + ".")
    before = model.get_submodule(path)
    layer_index = getattr(before, "layer_idx", None)
    if "." in name and name != block["consumer"]:
        raise ValueError(f"'{block['consumer']}' is too deep inside of '{path}'")
    if name != block["consumer"]:  # the consumer is inside: it stays there, under its name
        inner = EmptySublayer(num_others, layer_index, name, output)
        if block["bypass"] == "normed":
            inner.LayerNorm = before.get_submodule("LayerNorm")
        _replace(model, path, inner)
    else:
        _replace(model, path, EmptySublayer(num_others, layer_index))
        _replace(model, block["consumer"], output)


class ConstantOutput(nn.Module):
    """An out-projection that lost all its inputs: its bias is what is left, or zeros.

    Its weight of no columns is saved too, so that the unpruned class refuses to load the shape
    instead of making up a weight that it misses.
    """

    weight: torch.Tensor

    def __init__(self, like: nn.Linear | Conv1D) -> None:
        super().__init__()
        outputs, weight = _sizes(like)[1], like.weight
        self.transposed = isinstance(like, Conv1D)
        shape = (0, outputs) if self.transposed else (outputs, 0)
        self.register_buffer("weight", weight.new_empty(shape))
        self.bias = None if like.bias is None else nn.Parameter(weight.new_zeros(outputs))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        outputs = self.weight.shape[self.transposed]
        if self.bias is None:
            return hidden_states.new_zeros(*hidden_states.shape[:-1], outputs)
        # a copy, for a view of a parameter confuses torch's own counters and in-place operations
        return self.bias.expand(*hidden_states.shape[:-1], -1).clone()


class EmptySublayer(nn.Module):
    """Stands where units were computed when none is left, and costs nothing.

    A residual sum and the norm after it that were inside stay.
    """

    def __init__(
        self,
        num_others: int,
        layer_index: int | None = None,
        output_name: str = "",
        output: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.num_others = num_others  # of what an attention returns beside the hidden states
        self.layer_idx = layer_index
        self.output_name = output_name
        self.LayerNorm: nn.Module | None = None
        if output is not None:
            self.add_module(output_name, output)

    def forward(self, hidden_states: torch.Tensor, *_: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        cache = getattr(cache, "self_attention_cache", cache)
        crosses = kwargs.get("key_value_states") is not None
        if cache is not None and self.layer_idx is not None and not crosses:
            # a cache must know how many tokens it has seen: keys of one head, one number each
            nothing = hidden_states.new_zeros(*hidden_states.shape[:-1], 1).unsqueeze(1)
            cache.update(nothing, nothing, self.layer_idx)
        residual = hidden_states
        if self.output_name:
            hidden_states = self.get_submodule(self.output_name)(hidden_states)
        if self.LayerNorm is not None:
            hidden_states = self.LayerNorm(residual + hidden_states)
        return (hidden_states, *[None] * self.num_others) if self.num_others else hidden_states
