"""Linear maps as matrices (outputs, inputs), also where a module stores its weight transposed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rfprune.errors import UserError
from rfprune.families.schema import LINEAR_MAPS


def linear(model: nn.Module, path: str) -> Any:
    """The linear map at `path`, an instance of `LINEAR_MAPS`.

    Raises:
        UserError: the path has no module, or one that is not a linear map of floating-point
            weights, such as an adapter or a quantised layer.
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
            f"'{path}' is a {type(module).__name__}, not a linear map with floating-point weights; "
            "merge adapters into the model, and load it without quantisation"
        )
    return module


def weight_of(module: Any) -> Tensor:
    """The weight (outputs, inputs) of a linear map, as a writable view.

    The weight of an emptied output projection is (outputs, 0).
    """
    weight: Tensor = module.weight
    return weight.T if is_transposed(module) else weight


def is_transposed(module: Any) -> bool:
    """Whether a linear map stores its weight as (inputs, outputs)."""
    return bool(getattr(module, "transposed", isinstance(module, Conv1D)))


def is_empty(model: nn.Module, consumer: str) -> bool:
    """Whether the output projection at path `consumer` has lost all input features."""
    try:
        weight = model.get_submodule(consumer).weight
    except AttributeError:
        return False
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.numel() == 0
