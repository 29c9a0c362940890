"""A Transformer pruned by rfprune: the architecture's own class with smaller projections.

This file travels with the weights, so that `from_pretrained(..., trust_remote_code=True)` needs no
other package than transformers. It reads the sizes of the pruned blocks from the entry "rfprune" of
config.json, checks them, gives the projections these sizes, and nothing else: it opens no file, no
connection, and runs no other code.
"""

from typing import Any

import torch
import transformers
from torch import nn

FORMAT_VERSION = 1

_FIELDS: dict[str, tuple[type, ...]] = {
    "kind": (str,),  # "head" or "neuron"
    "layer": (int,),
    "num_units": (int,),  # heads or neurons that are left; without any, the sublayer is bypassed
    "unit_width": (int,),  # features of one unit
    "units": (list, type(None)),  # which heads of the unpruned model these are
    "producers": (list,),  # paths of the linear maps whose output rows make the units
    "consumer": (str,),  # path of the linear map whose input columns are the units
    "inner": (str,),  # path of the module that holds the producers
    "inner_returns_tuple": (bool,),
    "shared_position_bias": (bool,),
}


def pruned_class(base: type) -> Any:
    """The pruned counterpart of a model class of transformers.

    It has the same name, by which pipelines and others tell what a model can do.
    """
    base = getattr(base, "pruned_from", base)
    name = base.__name__
    known = globals().get(name)
    if known is None or known.pruned_from is not base:
        _, found, head = name.partition("For")
        auto_class = f"AutoModelFor{head}" if found else "AutoModel"
        entries = {"pruned_from": base, "_auto_class": auto_class, "__module__": __name__}
        globals()[name] = type(name, (_Pruned, base), entries)
    return globals()[name]


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
        shrink(self, check_description(getattr(config, "rfprune", None)))


def check_description(description: Any) -> list[dict[str, Any]]:
    """The blocks of `description`, the entry "rfprune" of a config.json.

    Raises:
        ValueError: the entry is missing, malformed or of another format version.
    """
    if not isinstance(description, dict):
        raise ValueError("there is no entry 'rfprune', so this is not a pruned model")
    version, blocks = description.get("format_version"), description.get("blocks")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"the format version is {version!r}, not {FORMAT_VERSION}: upgrade rfprune"
        )
    if not isinstance(blocks, list):
        raise ValueError("there is no list of blocks")
    for block in blocks:
        _check_block(block)
    return blocks


def _check_block(block: Any) -> None:
    if not isinstance(block, dict) or block.keys() != _FIELDS.keys():
        raise ValueError(f"a block must have the fields {', '.join(_FIELDS)}; got {block!r:.80}")
    bad = [field for field, types in _FIELDS.items() if type(block[field]) not in types]
    if not bad:
        units, start = block["units"], block["inner"] + "."
        all_heads = units is None
        sound = {
            "kind": block["kind"] in ("head", "neuron"),
            "num_units": block["num_units"] >= 0,
            "unit_width": block["unit_width"] > 0,
            "units": all_heads
            or (
                len(units) == block["num_units"]
                and all(type(unit) is int and unit >= 0 for unit in units)
                and len(set(units)) == len(units)
            ),
            "producers": all(type(p) is str and p.startswith(start) for p in block["producers"]),
            "shared_position_bias": not (block["shared_position_bias"] and all_heads),
        }
        bad = [field for field, is_sound in sound.items() if not is_sound]
    if bad:
        raise ValueError(f"a block has a bad '{bad[0]}': {block[bad[0]]!r:.80}")


def shrink(model: nn.Module, blocks: list[dict[str, Any]]) -> None:
    """Give the projections of `model` the sizes of `blocks`, which `check_description` has checked.

    Raises:
        ValueError: a path is not that of a linear map at least as large.
    """
    for block in blocks:
        width = block["num_units"] * block["unit_width"]
        producers = {path: _linear(model, path) for path in block["producers"]}
        consumer = _linear(model, block["consumer"])
        if width > min(consumer.in_features, *(old.out_features for old in producers.values())):
            raise ValueError(f"'{block['consumer']}' is smaller than {width} features")
        if width == 0:
            _empty(model, block, consumer)
            continue
        for path, old in producers.items():
            _replace(model, path, _linear_like(old, old.in_features, width))
        _replace(model, block["consumer"], _linear_like(consumer, width, consumer.out_features))
        if block["kind"] == "head":
            _set_heads(model.get_submodule(block["inner"]), block, width)


def _linear(model: nn.Module, path: str) -> nn.Linear:
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"there is no module '{path}'") from error
    if not isinstance(module, nn.Linear):
        raise ValueError(f"'{path}' is a {type(module).__name__}, not a linear map")
    return module


def _linear_like(old: nn.Linear, in_features: int, out_features: int) -> nn.Linear:
    like = {"device": old.weight.device, "dtype": old.weight.dtype}
    return nn.Linear(in_features, out_features, bias=old.bias is not None, **like)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module.train(model.training))


def _set_heads(attention: Any, block: dict[str, Any], width: int) -> None:
    for name in ("num_attention_heads", "n_heads", "num_heads"):
        if hasattr(attention, name):
            setattr(attention, name, block["num_units"])
    if hasattr(attention, "all_head_size"):
        attention.all_head_size = width
    if block["shared_position_bias"]:
        if not hasattr(attention, "kept_heads"):
            attention.register_forward_pre_hook(_select_position_bias, with_kwargs=True)
        attention.kept_heads = list(block["units"])


def _select_position_bias(attention: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """From a position bias (B, H, S, S) that all layers share, take the kept heads of this one."""
    if len(args) > 2 and args[2] is not None:
        args = (*args[:2], args[2][:, attention.kept_heads], *args[3:])
    elif kwargs.get("position_bias") is not None:
        bias = kwargs["position_bias"][:, attention.kept_heads]
        kwargs = {**kwargs, "position_bias": bias}
    return args, kwargs


def _empty(model: nn.Module, block: dict[str, Any], consumer: nn.Linear) -> None:
    inner, output = block["inner"], ConstantOutput(consumer)
    name = block["consumer"].removeprefix(inner + ".")
    if "." in name and name != block["consumer"]:
        raise ValueError(f"'{block['consumer']}' is too deep inside of '{inner}'")
    if name != block["consumer"]:  # the consumer is inside: it stays there, under its name
        _replace(model, inner, EmptySublayer(block["inner_returns_tuple"], name, output))
    else:
        _replace(model, inner, EmptySublayer(block["inner_returns_tuple"]))
        _replace(model, block["consumer"], output)


class ConstantOutput(nn.Module):
    """An out-projection that lost all its inputs: its bias is what is left.

    Its weight of no columns is saved too, so that the unpruned class refuses to load the shape
    instead of making up a weight that it misses.
    """

    weight: torch.Tensor

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros_like(like.weight[:, 0]))
        self.register_buffer("weight", like.weight.new_empty(like.out_features, 0))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # a copy, for a view of a parameter confuses torch's own counters and in-place operations
        return self.bias.expand(*hidden_states.shape[:-1], -1).clone()


class EmptySublayer(nn.Module):
    """Stands where units were computed when none is left, and costs nothing."""

    def __init__(
        self, returns_tuple: bool, output_name: str = "", output: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple
        self.output_name = output_name
        if output is not None:
            self.add_module(output_name, output)

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        if self.output_name:
            hidden_states = self.get_submodule(self.output_name)(hidden_states)
        return (hidden_states, None) if self.returns_tuple else hidden_states
