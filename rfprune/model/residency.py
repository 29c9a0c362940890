"""Weights that are not in memory: models that accelerate has offloaded to the CPU or to disk.

An offloaded weight is on the meta device, and a hook of accelerate loads it for each call of its
module. Forward passes need nothing else. Code that reads a weight, or calls a module many times,
makes it resident first. For a model in memory all of this does nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from rfprune.errors import UserError, error_summary

_CHANGED = "rfprune_changed"
"""A mark on a hook whose module is resident and is changed."""


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights of a model, or of a part of one, are outside the memory that it computes
    in."""
    return next(offloading_hooks(model), None) is not None


def execution_device(model: PreTrainedModel) -> torch.device:
    """The device on which a model computes; its first weight may be offloaded."""
    device: torch.device = model.device
    hook = next(offloading_hooks(model), None) if device.type == "meta" else None
    if hook is None:
        return device
    found = hook[1].execution_device
    return torch.device("cuda", found) if isinstance(found, int) else torch.device(found)


@contextmanager
def resident(module: nn.Module, *, write_back: bool = False) -> Iterator[None]:
    """Within, the weights of a module and of all modules in it are on the device that they compute
    on; afterwards they are freed. Contexts may be nested: the outermost one loads and frees.

    Args:
        module: such as a layer of an offloaded model. One that is in memory stays as it is.
        write_back: keep what is changed in place. The model must be a student, whose weights are
            in a `rfprune.model.weight_store.WeightStore`; changes of other models are lost.
    """
    loaded: list[tuple[nn.Module, Any]] = []
    try:
        for part, hook in list(offloading_hooks(module)):
            loaded.append((part, hook))
            with reading_errors():
                hook.pre_forward(part)
            hook.offload = False  # calls within neither load nor free
        if write_back:
            for part in module.modules():
                for hook in _hooks(part):
                    vars(hook)[_CHANGED] = True
        yield
        _write_back([(part, hook) for part, hook in loaded if vars(hook).get(_CHANGED)])
    finally:
        for part, hook in loaded:
            hook.offload = True
            hook.post_forward(part, None)
            vars(hook).pop(_CHANGED, None)


def stored_tensors(
    model: nn.Module, names: Collection[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The entries of a model's state by name; an offloaded weight is read when its turn comes.

    A weight without a hook that knows where it is stays on the meta device.

    Args:
        names: of the entries; None for all.
    """
    for name, tensor in model.state_dict().items():
        if names is None or name in names:
            yield name, read_weight(model, name) if tensor.is_meta else tensor


def read_weight(model: nn.Module, name: str) -> Tensor:
    """The value of an offloaded weight, from the module that loads it; else its placeholder."""
    parts = name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        for hook in _hooks(model.get_submodule(".".join(parts[:end]))):
            if getattr(hook, "weights_map", None) is not None:
                with suppress(KeyError), reading_errors():
                    value: Tensor = hook.weights_map[".".join(parts[end:])]
                    return value
    placeholder: Tensor = model.state_dict()[name]
    return placeholder


def offloaded_ties(model: nn.Module) -> set[str]:
    """Names of offloaded parameters that are other parameters of the model under another name.

    In memory both names have one parameter; offloaded, each may have a placeholder of its own.
    """
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    parameters = dict(model.named_parameters(remove_duplicate=False)) if ties else {}
    return {name for name in ties if name in parameters and parameters[name].is_meta}


@contextmanager
def reading_errors() -> Iterator[None]:
    """Turn an error of a file of weights into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"offloaded weights cannot be read ({error_summary(error)}): leave the files of a "
            "checkpoint as they are while it is pruned; copy or download it again"
        ) from error


def copy_without_offloading(model: PreTrainedModel, memo: dict[int, Any]) -> PreTrainedModel:
    """A deep copy without the hooks that load weights; offloaded weights are placeholders in it.

    Args:
        memo: what stands for an object of the original in the copy, by its id.
    """
    hooks = {id(hook): hook for _, hook in offloading_hooks(model)}
    copied: PreTrainedModel = copy.deepcopy(model, memo | hooks)
    if hooks:
        vars(copied).pop("hf_device_map", None)
    for part in copied.modules():
        if any(id(hook) in hooks for hook in _hooks(part)):
            for name in ("_hf_hook", "_old_forward", "forward"):
                vars(part).pop(name, None)
    return copied


def offloading_hooks(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """The modules whose weights are offloaded now, each with its hook."""
    for part in model.modules():
        for hook in _hooks(part):
            if getattr(hook, "offload", False):
                yield part, hook


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """The hooks of accelerate on a module."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def _write_back(loaded: list[tuple[nn.Module, Any]]) -> None:
    """Store the present values of loaded weights in their stores."""
    changed: dict[int, tuple[Any, dict[str, Tensor]]] = {}
    for part, hook in loaded:
        store, prefix = hook.weights_map.dataset, hook.weights_map.prefix
        tensors = changed.setdefault(id(store), (store, {}))[1]
        for name, parameter in part.named_parameters(recurse=hook.place_submodules):
            tensors[prefix + name] = parameter.detach()
    for store, tensors in changed.values():
        store.write(tensors)
