"""A Transformer as prunable blocks.

Every unit (head or neuron) is a run of input features of one out-projection, the block's consumer,
made by rows of its producers. Masking multiplies those features, folding scales the consumer's
columns, removing drops columns of the consumer and rows of the producers: all that pruning needs to
know of an architecture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rfprune.errors import UserError
from rfprune.families.architectures import ARCHITECTURES, REFUSED
from rfprune.families.schema import Architecture, BlockKind, Bypass, Stack, Sublayer
from rfprune.model.linear import is_empty, linear
from rfprune.model.shapes import (
    bias_table,
    head_width,
    original_units,
    positional_maps,
    producers_of,
    shapes,
)


@dataclass(frozen=True)
class Producer:
    """A linear map whose output rows make the units of a block.

    Attributes:
        path: from the model's root.
        parts: how many times it holds all units, one part after the other (queries, keys, values).
        width: rows of one unit in one part; where query heads share keys and values, there are
            fewer rows of these.
    """

    path: str
    parts: int
    width: int

    @property
    def unit_rows(self) -> int:
        """Rows of one unit, in all parts."""
        return self.parts * self.width

    def rows_of(self, units: Tensor, num_units: int) -> Tensor:
        """Indices of the rows of `units` (n,), of which there are `num_units`."""
        starts = torch.arange(self.parts, device=units.device) * (num_units * self.width)
        return (starts[:, None] + unit_features(units, self.width)).flatten()


def unit_features(units: Tensor, unit_width: int) -> Tensor:
    """Indices of the features of `units` (n,) -> (n * width,)."""
    offsets = torch.arange(unit_width, device=units.device)
    return (units[:, None] * unit_width + offsets).flatten()


@dataclass(frozen=True)
class Block:
    """The prunable units of one sublayer; module paths are full, from the model's root.

    Attributes:
        kind: heads or neurons.
        layer: index of the Transformer layer.
        name: such as "layer.0.heads".
        producers: the linear maps whose output rows make the units.
        consumer: path of the out-projection whose input columns are the units.
        inner: path of the module that computes the units from the hidden states.
        residual_sum: path of the module whose input is the consumer's output plus the residual;
            None where that is the layer's output.
        pre_norm: whether the residual is the hidden state itself; see `Stack`.
        inner_returns_tuple: whether `inner` returns a tuple (attention does).
        head_bias: argument of `inner` with one slice a head, such as a position bias.
        scale: path of a vector (d,) that multiplies what leaves the consumer.
        num_units: how many heads or neurons there are now; query heads that share a key and a
            value are one.
        unit_width: input features of the consumer per unit (1 for a neuron).
        units: of each head, its index in the model before any pruning; neurons are numbered as
            they are now.
        bypass: what `inner` does beside computing units; see `rfprune.families.schema.Bypass`.
        readers: paths of the producers that read the hidden state and nothing else.
        token_rows: how many rows of a unit in the producers the block's own tokens enter, and
            position_rows: how many the embeddings of relative positions, of which there are
            `positions`, and encoder_rows: how many what comes out of the encoder.
        bias_table: path of an embedding with a number for each head, which may be that of another
            layer in a model that was never pruned.
    """

    kind: BlockKind
    layer: int
    name: str
    producers: tuple[Producer, ...]
    consumer: str
    inner: str
    residual_sum: str | None
    pre_norm: bool
    inner_returns_tuple: bool
    head_bias: str | None
    scale: str | None
    num_units: int
    unit_width: int
    units: tuple[int, ...]
    bypass: Bypass = "plain"
    readers: tuple[str, ...] = ()
    token_rows: int = 0
    position_rows: int = 0
    positions: int = 0
    encoder_rows: int = 0
    bias_table: str | None = None

    @property
    def num_others(self) -> int:
        """How many things `inner` returns beside the hidden states."""
        return self.inner_returns_tuple + (self.bypass == "biased")


@dataclass(frozen=True)
class Layout:
    """All blocks of a model in the order in which they run; a sublayer without units has none.

    Attributes:
        layers: paths of all layers, of one stack after the other.
        causal: whether a token sees none that comes later.
        order: numbers of the layers in the order in which they run, where some run several times
            (their blocks are pruned once, and cost as often as they run); else empty.
        returns: length of the tuple that a layer returns, hidden states first; None: a tensor.
        decoder: number of the first layer of a decoder that reads an encoder; None without one.
    """

    model_type: str
    hidden_size: int
    layers: tuple[str, ...]
    blocks: tuple[Block, ...]
    causal: bool = False
    order: tuple[int, ...] = ()
    returns: int | None = None
    decoder: int | None = None

    def in_decoder(self, block: Block) -> bool:
        """Whether a block is in a decoder that reads an encoder."""
        return self.decoder is not None and block.layer >= self.decoder

    def stack(self, *, decoder: bool = False) -> range:
        """Numbers of the layers of an encoder, or, of an encoder-decoder, of the decoder."""
        split = len(self.layers) if self.decoder is None else self.decoder
        return range(split, len(self.layers)) if decoder else range(split)

    def runs_of(self, block: Block) -> int:
        """How many times a block runs in one forward pass."""
        return self.order.count(block.layer) if self.order else 1

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
    layers: list[str] = []
    order: list[int] = []
    starts: list[int] = []
    blocks: list[Block] = []
    for stack in _stacks(model, architecture):
        num_layers = _num_layers(model, prefix + stack.layers)
        starts.append(len(layers))
        if stack.shared:
            runs = model.config.num_hidden_layers
            order += [int(run / (runs / num_layers)) for run in range(runs)]
        for number in range(num_layers):
            path = f"{prefix}{stack.layers}.{number}"
            found = (_block(model, stack, each, path, len(layers)) for each in stack.sublayers)
            blocks += [block for block in found if block is not None]
            layers.append(path)
    _check_unshared(model, blocks)
    config = model.config
    return Layout(
        config.model_type,
        config.hidden_size,
        tuple(layers),
        tuple(blocks),
        architecture.causal,
        tuple(order),
        architecture.stacks[0].returns,
        starts[1] if len(starts) > 1 else None,
    )


def check_supported(config: PretrainedConfig) -> Architecture:
    """The architecture row of a configuration.

    Raises:
        UserError: the model type has no row (the supported types are named), or the configuration
            asks for something that pruning does not handle.
    """
    model_type = str(config.model_type)
    if model_type in REFUSED:
        raise UserError(
            f"model type '{model_type}' is not supported: {REFUSED[model_type]}; choose another "
            "model"
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
    for entry, value in architecture.needed.items():
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
            "config.json, which is no number of heads; save or download it again"
        )
    return architecture


def _stacks(model: PreTrainedModel, architecture: Architecture) -> tuple[Stack, ...]:
    """Those that a model has: of an encoder-decoder it may be the encoder alone."""
    decoder = getattr(model.base_model, "decoder", None)
    return architecture.stacks[: 1 if decoder is None else None]


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
    model: PreTrainedModel, stack: Stack, sublayer: Sublayer, layer_path: str, layer: int
) -> Block | None:
    def full(path: str | None) -> str | None:
        return None if path is None else f"{layer_path}.{path}"

    consumer = f"{layer_path}.{sublayer.consumer}"
    if is_empty(model, consumer):
        return None
    inner = f"{layer_path}.{sublayer.inner}"
    own = [f"{layer_path}.{path}" for path in producers_of(sublayer, model.config)]
    positional, positions = positional_maps(model, sublayer, layer_path, own)
    from_encoder = [f"{layer_path}.{path}" for path in sublayer.from_encoder]
    paths = [*own, *(path for path in positional if path not in own)]
    width = 1
    if sublayer.kind == "head":  # those of a decoder may be of another width than the encoder's
        width = getattr(model.get_submodule(inner), "head_dim", None) or head_width(model.config)
    num_units, features, rows = shapes(model, sublayer, consumer, paths, width)
    producers = tuple(
        Producer(path, sublayer.fused, size // (sublayer.fused * num_units))
        for path, size in zip(paths, rows, strict=True)
    )

    def rows_of(chosen: set[str]) -> int:
        return sum(each.unit_rows for each in producers if each.path in chosen)

    return Block(
        kind=sublayer.kind,
        layer=layer,
        name=f"layer.{layer}.{sublayer.label or sublayer.kind + 's'}",
        producers=producers,
        consumer=consumer,
        inner=inner,
        residual_sum=full(sublayer.residual_sum),
        pre_norm=stack.pre_norm,
        inner_returns_tuple=sublayer.inner_returns_tuple,
        head_bias=sublayer.head_bias,
        scale=full(sublayer.scale),
        num_units=num_units,
        unit_width=features // num_units,
        units=original_units(model.config, consumer, num_units),
        bypass=sublayer.bypass,
        readers=tuple(path for path in own if path not in (*positional, *from_encoder)),
        token_rows=rows_of(set(own) - set(from_encoder)),
        position_rows=rows_of(set(positional)),
        encoder_rows=rows_of(set(from_encoder)),
        positions=positions,
        bias_table=bias_table(model, sublayer, layer_path),
    )


def _check_unshared(model: nn.Module, blocks: list[Block]) -> None:
    owners: dict[int, str] = {}
    for block in blocks:
        for path in (*(producer.path for producer in block.producers), block.consumer):
            other = owners.setdefault(id(linear(model, path).weight), path)
            if other != path:
                raise UserError(
                    f"'{path}' and '{other}' share their weights, which cannot be pruned apart; "
                    "give every layer weights of its own"
                )
