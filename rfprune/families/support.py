"""Which models are supported, and why others are not."""

from __future__ import annotations

from transformers import PretrainedConfig

from rfprune.errors import UserError
from rfprune.families.architectures import ARCHITECTURES
from rfprune.families.schema import Architecture

REFUSED: dict[str, str] = {
    "mobilebert": (
        "its layers carry two hidden states, one of 512 features and one of 128 inside a "
        "bottleneck, and cannot be fitted one sublayer at a time"
    ),
    "deberta": (
        "its attention keeps queries, keys and values of a head side by side in one projection, "
        "and their biases apart from it"
    ),
    "swin": "its hidden states change their size from stage to stage",
    "clip": (
        "it consists of two models with sizes of their own, one for texts and one for images; load "
        "one of them (CLIPTextModelWithProjection, CLIPVisionModelWithProjection) and prune it"
    ),
    "siglip": (
        "it consists of two models with sizes of their own, one for texts and one for images; load "
        "one of them (SiglipTextModel, SiglipVisionModel) and prune it"
    ),
}
"""Model types that do not fit a row, and why."""

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Configuration entries with the number of experts of a layer."""


def check_supported(config: PretrainedConfig) -> Architecture:
    """Return the row of a configuration's family.

    Raises:
        UserError: the model type has no row (the supported types are listed), or the configuration
            has a value that the row is not right for.
    """
    model_type = str(config.model_type)
    if model_type in REFUSED:
        raise UserError(
            f"model type '{model_type}' is not supported: {REFUSED[model_type]}; choose another "
            "model"
        )
    if model_type not in ARCHITECTURES and any(getattr(config, each, None) for each in _EXPERTS):
        raise UserError(
            f"model type '{model_type}' is a mixture of experts, which is not supported: few "
            "calibration tokens reach each expert; choose a model without experts"
        )
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UserError(
            f"model type '{model_type}' is not supported; the supported types are {known}: "
            "choose such a model, or add a row to rfprune/families/architectures.py "
            f"('python scripts/inspect_architecture.py {model_type}' suggests it)"
        )
    architecture = ARCHITECTURES[model_type]
    if getattr(config, "add_cross_attention", False):
        raise UserError(
            f"this {model_type} model has cross-attention (add_cross_attention=true), which is not "
            "supported; use an encoder or a decoder without it"
        )
    for entry, value in architecture.required_config.items():
        found = getattr(config, entry, value)
        if found != value:
            raise UserError(
                f"this {model_type} model has {entry}={found} in its config.json, which is not "
                f"supported; choose a model with {entry}={value}"
            )
    if getattr(config, "chunk_size_feed_forward", 0):
        raise UserError(
            f"this {model_type} model runs its FFNs in chunks (chunk_size_feed_forward="
            f"{config.chunk_size_feed_forward}), which is not supported; load it with "
            "chunk_size_feed_forward=0, which computes the same"
        )
    if config.num_attention_heads < 1:
        raise UserError(
            f"this {model_type} model has num_attention_heads={config.num_attention_heads} in its "
            "config.json, but needs at least one head; save or download it again"
        )
    return architecture
