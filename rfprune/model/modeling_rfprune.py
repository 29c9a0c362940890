"""A Transformer pruned by rfprune: the architecture's own class with smaller projections.

This file travels with the weights, so that `from_pretrained(..., trust_remote_code=True)` needs no other package
than transformers. It reads the sizes of the pruned blocks from the entry "rfprune" of config.json, gives the
projections these sizes, and nothing else: it opens no file, no connection, and runs no other code.
"""

from typing import Any

import torch
import transformers
from torch import nn

FORMAT_VERSION = 1
_PREFIX = "Pruned"


class ConstantOutput(nn.Module):
    """An out-projection that lost all its inputs: its bias is what is left."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros_like(like.weight[:, 0]))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.bias.expand(*hidden_states.shape[:-1], -1)


class EmptySublayer(nn.Module):
    """Stands where units were computed when none is left, and costs nothing."""

    def __init__(self, returns_tuple: bool, output_name: str = "", output: nn.Module | None = None) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple
        self.output_name = output_name
        if output is not None:
            self.add_module(output_name, output)

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        if self.output_name:
            hidden_states = self.get_submodule(self.output_name)(hidden_states)
        return (hidden_states, None) if self.returns_tuple else hidden_states


def shrink(model: nn.Module, description: dict[str, Any]) -> None:
    """Give the projections of `model` the sizes of `description`, the entry "rfprune" of a config.json."""
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"this pruned checkpoint has format version {version!r} but this file reads version {FORMAT_VERSION}: "
            "use the modeling_rfprune.py that came with the checkpoint, or a newer rfprune"
        )
    for block in description["blocks"]:
        if block["num_units"] == 0:
            _empty(model, block)
        else:
            _resize(model, block)


def _resize(model: nn.Module, block: dict[str, Any]) -> None:
    width = block["num_units"] * block["unit_width"]
    for path in block["producers"]:
        old = model.get_submodule(path)
        _replace(model, path, _linear_like(old, old.in_features, width))
    old = model.get_submodule(block["consumer"])
    _replace(model, block["consumer"], _linear_like(old, width, old.out_features))
    if block["kind"] == "head":
        inner = model.get_submodule(block["inner"])
        for name in ("num_attention_heads", "n_heads", "num_heads"):
            if hasattr(inner, name):
                setattr(inner, name, block["num_units"])
        if hasattr(inner, "all_head_size"):
            inner.all_head_size = width
        if block["shared_position_bias"]:
            if not hasattr(inner, "kept_heads"):
                inner.register_forward_pre_hook(_select_position_bias, with_kwargs=True)
            inner.kept_heads = list(block["units"])


def _empty(model: nn.Module, block: dict[str, Any]) -> None:
    consumer, inner = block["consumer"], block["inner"]
    old = model.get_submodule(consumer)
    output = old if isinstance(old, ConstantOutput) else ConstantOutput(old)
    if consumer.startswith(inner + "."):
        name = consumer.removeprefix(inner + ".")
        _replace(model, inner, EmptySublayer(block["inner_returns_tuple"], name, output))
    else:
        _replace(model, inner, EmptySublayer(block["inner_returns_tuple"]))
        _replace(model, consumer, output)


def _select_position_bias(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hand a layer the slices of the shared position bias (B, H, S, S) that belong to its kept heads."""
    if len(args) > 2 and args[2] is not None:
        args = (*args[:2], args[2][:, module.kept_heads], *args[3:])
    elif kwargs.get("position_bias") is not None:
        kwargs = {**kwargs, "position_bias": kwargs["position_bias"][:, module.kept_heads]}
    return args, kwargs


def _linear_like(old: nn.Linear, in_features: int, out_features: int) -> nn.Linear:
    weight = old.weight
    return nn.Linear(in_features, out_features, old.bias is not None, device=weight.device, dtype=weight.dtype)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    module.train(model.training)
    setattr(model.get_submodule(parent), name, module)


def pruned_class(base: type) -> type:
    """The pruned counterpart of a model class of transformers, for example PrunedBertForSequenceClassification."""
    if base.__name__.startswith(_PREFIX):
        return base
    name = _PREFIX + base.__name__
    if name not in globals():

        def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            base.__init__(self, config, *args, **kwargs)
            shrink(self, config.rfprune)

        new = type(name, (base,), {"__init__": __init__, "__module__": __name__, "__doc__": __doc__})
        _, found, head = base.__name__.partition("For")
        new._auto_class = f"AutoModelFor{head}" if found else "AutoModel"
        globals()[name] = new
    return globals()[name]


def __getattr__(name: str) -> type:
    base = getattr(transformers, name.removeprefix(_PREFIX), None) if name.startswith(_PREFIX) else None
    if not isinstance(base, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pruned_class(base)
