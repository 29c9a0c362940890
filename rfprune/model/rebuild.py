"""Whether a model can be made again from its class and its configuration, as loading does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping
from inspect import signature
from typing import Any

import torch
from transformers import PreTrainedModel

from rfprune.errors import RfpruneWarning, UserError, error_summary
from rfprune.model.modeling_rfprune import is_of_transformers

_OPTIONAL_WEIGHTS = {"add_pooling_layer": "pooler", "use_mask_token": "mask_token"}
"""Arguments of model classes that the configuration does not record, and the module or parameter
that a model has if they are true."""


def init_options(model_class: Any, names: Collection[str]) -> dict[str, bool]:
    """The arguments of a class, besides the configuration, that make a model with these weights.

    Args:
        names: of the weights, with or without the name of the Transformer in front.
    """
    parameters = signature(getattr(model_class, "pruned_from", model_class)).parameters
    parts = {part for name in names for part in name.split(".")}
    return {
        option: part in parts
        for option, part in _OPTIONAL_WEIGHTS.items()
        if names and option in parameters
    }


def check_rebuildable(model: PreTrainedModel) -> None:
    """Check that a model's class makes a model with the same weights from its configuration.

    Loading does just this. A head that was replaced, or layers that were taken out, would be saved
    and could not be loaded.

    Raises:
        UserError: it does not; the message names a weight, and what to do.
    """
    name, state = type(model).__name__, model.state_dict()
    try:
        with torch.device("meta"):
            config = copy.deepcopy(model.config)
            rebuilt = type(model)(config, **init_options(type(model), state.keys()))
    except Exception as error:  # classes raise errors of many types
        raise UserError(
            f"a {name} cannot be made from its configuration alone ({error_summary(error)}), so "
            "the pruned model could not be loaded again; give the other arguments of its __init__ "
            "defaults, or store them in the configuration"
        ) from error
    expected = {key: tuple(value.shape) for key, value in rebuilt.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    different = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
    if different:
        raise UserError(
            f"{_difference(different[0], found, expected)} a {name} made from this model's "
            "configuration, so the pruned model could not be loaded again; set the entries of "
            "model.config to what the model is (num_hidden_layers, num_labels, ...), or define a "
            f"subclass of {name} whose __init__(self, config) makes its modules, and move the "
            "weights there with load_state_dict"
        )


def warn_of_own_class(model: PreTrainedModel) -> None:
    """Say how a model of a class that is not one of transformers is loaded again."""
    name = type(model).__name__
    if not is_of_transformers(type(model)):
        warnings.warn(
            f"{name} is not a class of transformers; load the saved model with "
            f"rfprune.load_pruned(folder, model_class={name})",
            RfpruneWarning,
            stacklevel=4,
        )


def _difference(
    name: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> str:
    if name not in found:
        return f"'{name}' is missing from this model but is a weight of"
    if name not in expected:
        return f"'{name}' is a weight of this model but not of"
    return f"'{name}' has the shape {found[name]}, not the {expected[name]} of"
