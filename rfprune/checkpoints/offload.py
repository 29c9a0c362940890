"""Where the weights of a checkpoint are placed: its layers on the CPU or on disk, the rest where it
computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from rfprune.errors import UserError, error_summary
from rfprune.families.support import check_supported
from rfprune.model.layout import layout_of


def without_weights(model_class: Any, config: PretrainedConfig) -> PreTrainedModel:
    """A model on the meta device: shapes without memory.

    Args:
        model_class: an Auto class.
        config: of the unpruned model, or of a pruned one, whose layers then have their first sizes.

    Raises:
        UserError: the model type is not supported, or no model can be made from the configuration.
    """
    check_supported(config)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = model_class.from_config(config)
    except Exception as error:  # models raise errors of many types
        raise UserError(
            f"no {config.model_type} model can be made from its configuration "
            f"({error_summary(error)}): download the checkpoint again"
        ) from error
    return model


def layers_elsewhere(model: PreTrainedModel, device: torch.device, place: str) -> dict[str, str]:
    """A device map that keeps the layers of a model in `place`, and all else on `device`.

    Args:
        model: with or without weights.
        place: "cpu" or "disk".
    """
    lists = {path.rpartition(".")[0] for path in layout_of(model).layers}
    found: dict[str, str] = {}

    def add(path: str, module: nn.Module) -> None:
        if path in lists:
            found[path] = place
        elif not any(one.startswith(f"{path}." if path else "") for one in lists):
            found[path] = str(device)
        else:
            start = f"{path}." if path else ""
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            found.update({start + name: str(device) for name, _ in own})
            for name, child in module.named_children():
                add(start + name, child)

    add("", model)
    return found
