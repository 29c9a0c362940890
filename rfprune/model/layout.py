"""A Transformer as prunable blocks.

Every unit (head or neuron) is a run of input features of one out-projection, the block's consumer, made by
rows of its producers. Masking multiplies those features, folding scales the consumer's columns, removing drops
columns of the consumer and rows of the producers: all that pruning needs to know of an architecture.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from rfprune.errors import UserError
from rfprune.model.architectures import ARCHITECTURES, Architecture, BlockKind, Sublayer


@dataclass(frozen=True)
class Block:
    """The prunable units of one sublayer; module paths are full, from the model's root.

    Attributes:
        kind: heads or neurons.
        layer: index of the Transformer layer.
        producers: paths of the linear maps whose output rows make the units.
        consumer: path of the out-projection whose input columns are the units.
        inner: path of the module that computes the units from the hidden states.
        residual_sum: path of the module whose input is the consumer's output plus the residual.
        num_units: how many heads or neurons there are now.
        unit_width: input features of the consumer per unit (1 for a neuron).
        units: for each unit, its index in the model before any pruning.
    """

    kind: BlockKind
    layer: int
    producers: tuple[str, ...]
    consumer: str
    inner: str
    residual_sum: str
    inner_returns_tuple: bool
    shared_position_bias: bool
    num_units: int
    unit_width: int
    units: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"layer.{self.layer}.{self.kind}s"


@dataclass(frozen=True)
class Layout:
    """All blocks of a model in the order in which they run; sublayers without units have no block."""

    model_type: str
    hidden_size: int
    layers: tuple[str, ...]
    blocks: tuple[Block, ...]

    def blocks_of_layer(self, layer: int) -> tuple[Block, ...]:
        return tuple(block for block in self.blocks if block.layer == layer)


def check_supported(config: PretrainedConfig) -> Architecture:
    """The architecture row of a configuration.

    Raises:
        UserError: the model type has no row; the supported types are named.
    """
    model_type = str(config.model_type)
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UserError(
            f"model type '{model_type}' is not supported; the supported types are {known}: "
            "choose such a model, or add a row to rfprune/model/architectures.py"
        )
    if getattr(config, "add_cross_attention", False):
        raise UserError(
            f"this {model_type} model has cross-attention (add_cross_attention=true), which is not supported; "
            "use an encoder without it"
        )
    return ARCHITECTURES[model_type]


def layout_of(model: PreTrainedModel) -> Layout:
    """See a model as blocks, whatever has already been pruned from it.

    Raises:
        UserError: the model type is not supported, or its modules are not where the architecture has them.
    """
    architecture = check_supported(model.config)
    prefix = _prefix(model)
    layers_path = prefix + architecture.layers
    layers = tuple(f"{layers_path}.{i}" for i in range(len(_submodule(model, layers_path))))
    unit_width = model.config.hidden_size // model.config.num_attention_heads
    blocks = [
        _block(model, sublayer, path, index, unit_width if sublayer.kind == "head" else 1)
        for index, path in enumerate(layers)
        for sublayer in architecture.sublayers
    ]
    return Layout(
        model_type=model.config.model_type,
        hidden_size=model.config.hidden_size,
        layers=layers,
        blocks=tuple(block for block in blocks if block is not None),
    )


def _prefix(model: PreTrainedModel) -> str:
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _submodule(model: nn.Module, path: str) -> nn.ModuleList:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    if not isinstance(module, nn.ModuleList):
        raise UserError(
            f"this {type(model).__name__} has no list of layers at '{path}'; load the model with a class of "
            "transformers for its model type"
        )
    return module


def _block(
    model: PreTrainedModel, sublayer: Sublayer, layer_path: str, layer: int, unit_width: int
) -> Block | None:
    consumer_path = f"{layer_path}.{sublayer.consumer}"
    consumer = model.get_submodule(consumer_path)
    if not hasattr(consumer, "in_features"):  # already pruned to nothing: only its bias is left
        return None
    producers = tuple(f"{layer_path}.{path}" for path in sublayer.producers)
    features = {path: model.get_submodule(path).out_features for path in producers}
    if any(width != consumer.in_features for width in features.values()):
        raise UserError(
            f"'{consumer_path}' reads {consumer.in_features} features but its producers make {features}; "
            "the checkpoint's shapes do not fit together"
        )
    num_units = int(consumer.in_features) // unit_width
    return Block(
        kind=sublayer.kind,
        layer=layer,
        producers=producers,
        consumer=consumer_path,
        inner=f"{layer_path}.{sublayer.inner}",
        residual_sum=f"{layer_path}.{sublayer.residual_sum}",
        inner_returns_tuple=sublayer.inner_returns_tuple,
        shared_position_bias=sublayer.shared_position_bias,
        num_units=num_units,
        unit_width=unit_width,
        units=_original_units(model.config, consumer_path, num_units),
    )


def _original_units(config: PretrainedConfig, consumer: str, num_units: int) -> tuple[int, ...]:
    for entry in (getattr(config, "rfprune", None) or {}).get("blocks", []):
        if entry["consumer"] == consumer and entry.get("units") is not None:
            return tuple(entry["units"])
    return tuple(range(num_units))
