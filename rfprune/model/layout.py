"""A Transformer as prunable blocks.

Every unit (head or neuron) is a run of input features of one out-projection, the block's consumer,
made by rows of its producers. Masking multiplies those features, folding scales the consumer's
columns, removing drops columns of the consumer and rows of the producers: all that pruning needs to
know of an architecture.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
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
        inner_returns_tuple: whether `inner` returns a tuple (attention does).
        shared_position_bias: whether `inner` is handed a position bias with one slice a head.
        num_units: how many heads or neurons there are now.
        unit_width: input features of the consumer per unit (1 for a neuron).
        units: of each head, its index in the model before any pruning; neurons are numbered as
            they are now.
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
    """All blocks of a model in the order in which they run; a sublayer without units has none."""

    model_type: str
    hidden_size: int
    layers: tuple[str, ...]
    blocks: tuple[Block, ...]

    def blocks_of_layer(self, layer: int) -> tuple[Block, ...]:
        return tuple(block for block in self.blocks if block.layer == layer)


def layout_of(model: PreTrainedModel) -> Layout:
    """See a model as blocks, whatever has already been pruned from it.

    Raises:
        UserError: the model type is not supported, its modules are not where the architecture has
            them, or they are not plain linear maps (adapters, quantisation, shared layers).
    """
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"a {type(model).__name__} is not a model of transformers; "
            "give the model itself, not what wraps it"
        )
    architecture = check_supported(model.config)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    layers_path = prefix + architecture.layers
    layers = tuple(f"{layers_path}.{i}" for i in range(_num_layers(model, layers_path)))
    unit_width = model.config.hidden_size // model.config.num_attention_heads
    blocks = [
        _block(model, sublayer, path, index, unit_width if sublayer.kind == "head" else 1)
        for index, path in enumerate(layers)
        for sublayer in architecture.sublayers
    ]
    present = tuple(block for block in blocks if block is not None)
    _check_unshared(model, present)
    return Layout(model.config.model_type, model.config.hidden_size, layers, present)


def check_supported(config: PretrainedConfig) -> Architecture:
    """The architecture row of a configuration.

    Raises:
        UserError: the model type has no row (the supported types are named), or the configuration
            asks for something that pruning does not handle.
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
            f"this {model_type} model has cross-attention (add_cross_attention=true), which is not "
            "supported; use an encoder without it"
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
            "config.json, which is no number of heads; save or download it again"
        )
    return ARCHITECTURES[model_type]


def linear(model: nn.Module, path: str) -> nn.Linear:
    """The linear map at `path`.

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
    if not (isinstance(module, nn.Linear) and module.weight.is_floating_point()):
        raise UserError(
            f"'{path}' is a {type(module).__name__}, which is not a plain linear map; merge "
            "adapters into the model, and load it without quantisation"
        )
    return module


def _num_layers(model: nn.Module, path: str) -> int:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    if not isinstance(module, nn.ModuleList):
        raise UserError(
            f"this {type(model).__name__} has no list of layers at '{path}'; load the model with a "
            "class of transformers for its model type"
        )
    return len(module)


def _block(
    model: PreTrainedModel, sublayer: Sublayer, layer_path: str, layer: int, unit_width: int
) -> Block | None:
    consumer_path = f"{layer_path}.{sublayer.consumer}"
    if is_empty(model, consumer_path):
        return None
    in_features = linear(model, consumer_path).in_features
    producers = tuple(f"{layer_path}.{path}" for path in sublayer.producers)
    features = {path: linear(model, path).out_features for path in producers}
    if any(width != in_features for width in features.values()):
        raise UserError(
            f"'{consumer_path}' reads {in_features} features but its producers make {features}; "
            "the checkpoint's shapes do not fit together"
        )
    num_units = in_features // unit_width
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


def is_empty(model: nn.Module, consumer: str) -> bool:
    """Whether the out-projection at path `consumer` has been pruned to nothing but its bias."""
    try:
        weight = model.get_submodule(consumer).weight
    except AttributeError:
        return False
    return isinstance(weight, Tensor) and weight.shape[-1] == 0


def _original_units(config: PretrainedConfig, consumer: str, num_units: int) -> tuple[int, ...]:
    for entry in (getattr(config, "rfprune", None) or {}).get("blocks", []):
        if entry["consumer"] == consumer and entry["units"] is not None:
            return tuple(entry["units"])
    return tuple(range(num_units))


def _check_unshared(model: nn.Module, blocks: tuple[Block, ...]) -> None:
    owners: dict[int, str] = {}
    for path in (path for block in blocks for path in (*block.producers, block.consumer)):
        other = owners.setdefault(id(linear(model, path).weight), path)
        if other != path:
            raise UserError(
                f"'{path}' and '{other}' share their weights, which cannot be pruned apart; "
                "give every layer weights of its own"
            )
