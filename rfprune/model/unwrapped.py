"""A model without the wrappers that training and serving libraries put around it.

`torch.compile`, accelerate and Trainer replace the method `forward` of a model or of its modules by
a closure over that very module. A copy of the module keeps the closure, so the copy computes what
the original computes, and mixed precision is hidden in it. Wrappers that do not change what a model
computes are removed from a copy that shares all weights; any other replaced method is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from transformers import PreTrainedModel

from rfprune.errors import UserError

_SAFE_WRAPPERS = ("torch._dynamo", "torch.amp", "torch.utils._contextlib", "accelerate")
"""Modules whose wrappers change precision, speed or gradients, but not what is computed."""

_ACCELERATE_ENTRIES = ("_original_forward", "_is_accelerate_prepared")
"""What `Accelerator.prepare` leaves on a model; with it, a copy would not be prepared again."""

_POSITIONS = "pos_conv_embed"
"""The convolution of audio models whose weight the class itself normalises, also when it loads."""

_COMPILED_CALL = "_compiled_call"
"""Where `generate` of transformers keeps a compiled call of the model."""

_COMPILED_MODULE = "_orig_mod"
"""Where the result of `torch.compile` keeps the module that was compiled."""

_WAYS_OUT = {
    "OptimizedModule": "pass `model._orig_mod`, and compile the pruned model",
    "DistributedDataParallel": "pass `model.module`",
    "DataParallel": "pass `model.module`",
    "FullyShardedDataParallel": "save the whole model, load it with from_pretrained, and pass that",
    "DeepSpeedEngine": "save the whole model, load it with from_pretrained, and pass that",
    "ScriptModule": "pass the model that was traced or scripted",
    "TopLevelTracedModule": "pass the model that was traced or scripted",
    "RecursiveScriptModule": "pass the model that was traced or scripted",
    "SentenceTransformer": "pass `model[0].auto_model`",
    "CrossEncoder": "pass `model.model`",
    "str": "load it with from_pretrained of an Auto class, and pass that",
}


def check_is_model(model: Any) -> None:
    """Check that a model is one of transformers, and not a wrapper around one.

    Raises:
        UserError: it is something else; the message says what to pass.
    """
    if isinstance(model, PreTrainedModel):
        return
    kind = type(model).__name__
    way_out = _WAYS_OUT.get(kind, "pass the model itself, not its wrapper")
    if kind.startswith("Peft"):
        way_out = "pass `model.merge_and_unload()`"
    elif kind.endswith("Pipeline"):
        way_out = "pass `pipeline.model`"
    raise UserError(f"a {kind} is not a model of transformers; {way_out}")


def unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself if nothing wraps it, or a copy that shares its weights and has no wrappers.

    The hooks by which accelerate places the modules of a model on several devices stay.

    Raises:
        UserError: a method was replaced by something that cannot be removed without changing what
            the model computes, or weights are masked or parametrised.
    """
    check_is_model(model)
    _check_weights_are_parameters(model)
    clean: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, method in _replaced_methods(module):
            found = _without_wrappers(module, name, method)
            if found is None:
                where = f"model.{path}.{name}" if path else f"model.{name}"
                raise UserError(
                    f"`{where}` was replaced on this model ({_described(method)}), so a pruned "
                    f"copy would compute something else; undo that (del {where}), or load the "
                    "model again"
                )
            if name == "forward" and found is not method:
                clean[path] = found
    if not clean and not any(map(_is_compiled, model.modules())):
        return model
    tensors = [*model.parameters(), *model.buffers()]
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for path, found in clean.items():
        module = copied.get_submodule(path)
        del module.forward
        if isinstance(found, partial):  # accelerate's placement on devices, which a wrapper hid
            module.forward = partial(found.func, module)
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            while _is_optimized(child):
                child = child.get_submodule(_COMPILED_MODULE)
                setattr(parent, name, child)
    remove_added_methods(copied)
    return copied


def remove_added_methods(copied: nn.Module) -> None:
    """Remove what other libraries have added to the original and is wrong on a copy of it.

    accelerate replaces `to` and `cuda` by closures that move the original, and `generate` keeps a
    compiled call of the original.
    """
    for module in copied.modules():
        for name, method in list(_replaced_methods(module)):
            if not _is_placement(method):
                delattr(module, name)
        for name in (*_ACCELERATE_ENTRIES, _COMPILED_CALL):
            vars(module).pop(name, None)


def _check_weights_are_parameters(model: nn.Module) -> None:
    """Refuse weights that are computed from other parameters when the model runs."""
    for path, module in model.named_modules():
        if is_parametrized(module) and _POSITIONS not in path.split("."):
            names = ", ".join(module.parametrizations.keys())
            raise UserError(
                f"'{path}' has a parametrised {names}, which no saved model would have; make it "
                "permanent with torch.nn.utils.parametrize.remove_parametrizations(module, name)"
            )
        for hook in module._forward_pre_hooks.values():
            kind = type(hook)
            if isinstance(hook, BasePruningMethod):
                name = getattr(hook, "_tensor_name", "weight")
                raise UserError(
                    f"'{path}.{name}' is masked by torch.nn.utils.prune, which no saved model "
                    "would have; make the masks permanent with "
                    f"torch.nn.utils.prune.remove(module, '{name}')"
                )
            if kind.__module__ in ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm"):
                raise UserError(
                    f"'{path}' has a weight that {kind.__name__} computes, which no saved model "
                    f"would have; make it permanent with the remove function of {kind.__module__}"
                )


def _replaced_methods(module: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The methods of a module's class that an attribute of the module hides."""
    for name, value in () if _is_optimized(module) else vars(module).items():
        if callable(value) and callable(getattr(type(module), name, None)):
            yield name, value


def _is_optimized(module: nn.Module) -> bool:
    """Whether a module is the result of `torch.compile`."""
    return _COMPILED_MODULE in module._modules


def _is_compiled(module: nn.Module) -> bool:
    """Whether compiled code runs instead of a module's own, which may miss hooks set later."""
    return _is_optimized(module) or vars(module).get("_compiled_call_impl") is not None


def _is_placement(method: Any) -> bool:
    """Whether a method is `forward` as accelerate replaces it to place a module on a device."""
    return isinstance(method, partial) and _defined_in(method) == "accelerate.hooks"


def _without_wrappers(module: nn.Module, name: str, method: Any) -> Any:
    """What is inside the known wrappers of a method: that of the module's class, or accelerate's
    placement on a device; None if it is neither."""
    while not _is_placement(method):
        if isinstance(method, MethodType):
            if method.__self__ is not module:
                return None
            method = method.__func__
        if method is getattr(type(module), name):
            return method
        if not _defined_in(method).startswith(_SAFE_WRAPPERS):
            return None
        inside = getattr(method, "_torchdynamo_orig_callable", None)
        method = getattr(method, "__wrapped__", None) if inside is None else inside
        if method is None:
            return None
    return method


def _defined_in(method: Any) -> str:
    """Name of the module whose code a callable runs; `functools.wraps` hides it in `__module__`."""
    function = method.func if isinstance(method, partial) else method
    function = getattr(function, "__func__", function)
    namespace = getattr(function, "__globals__", None)
    return str(type(function).__module__ if namespace is None else namespace["__name__"])


def _described(method: Any) -> str:
    return f"by {getattr(method, '__qualname__', type(method).__name__)} of {_defined_in(method)}"
