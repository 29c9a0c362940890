"""Contexts in which a model is evaluated: of the model, and of torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without weight gradients; restores the model's modes and flags on exit.

    Decoders keep no key-value cache, since every call here runs on whole sequences.
    """
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    modes = [(module, module.training) for module in model.modules()]
    flags = {name: parameter.requires_grad for name, parameter in _named_parameters(model)}
    try:
        model.eval()
        model.requires_grad_(False)
        if use_cache:
            config.use_cache = False
        yield
    finally:
        if use_cache:
            config.use_cache = use_cache
        for module, training in modes:
            module.training = training
        for name, parameter in _named_parameters(model):  # offloaded ones are other objects by now
            parameter.requires_grad_(flags.get(name, parameter.requires_grad))  # if added meanwhile


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return model.named_parameters(remove_duplicate=False)


@contextmanager
def default_torch_state(device: torch.device) -> Iterator[None]:
    """Torch as it starts, whatever the caller has set: gradients, no inference mode, no autocast,
    float32 and the CPU as defaults. The caller's state is restored on exit.

    Args:
        device: of the model, for which autocast is turned off, and for the CPU.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in sorted({"cpu", device.type} - {"meta"}):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.set_default_dtype, dtype)
        yield
