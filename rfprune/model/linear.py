"""Linear maps as matrices (outputs, inputs), whichever way round a module keeps its weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rfprune.errors import UserError
from rfprune.families.schema import LINEAR_MAPS


def linear(model: nn.Module, path: str) -> Any:
    """The linear map at `path`, one of `LINEAR_MAPS`.

    Raises:
        UserError: there is none, or its weights are not floating-point numbers.
    """
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise UserError(
            f"this {type(model).__name__} has no module '{path}'; load the model with a class of "
            "transformers for its model type"
        ) from error
    if not (isinstance(module, LINEAR_MAPS) and module.weight.is_floating_point()):
        raise UserError(
            f"'{path}' is a {type(module).__name__}, which is not a plain linear map; merge "
            "adapters into the model, and load it without quantisation"
        )
    return module


def weight_of(module: Any) -> Tensor:
    """The weight (outputs, inputs) of a linear map, a view that can be written to.

    Of an out-projection that was pruned to nothing but its bias it is (outputs, 0).
    """
    weight: Tensor = module.weight
    return weight.T if is_transposed(module) else weight


def is_transposed(module: Any) -> bool:
    """Whether a linear map keeps its weight as (inputs, outputs)."""
    return bool(getattr(module, "transposed", isinstance(module, Conv1D)))


def is_empty(model: nn.Module, consumer: str) -> bool:
    """Whether the out-projection at path `consumer` has been pruned to nothing but its bias."""
    try:
        weight = model.get_submodule(consumer).weight
    except AttributeError:
        return False
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.numel() == 0
