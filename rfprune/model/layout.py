"""A Transformer as prunable blocks.

A block holds the units (heads or neurons) of one sublayer. Each unit is a run of input features of
the output projection, the block's consumer, made by rows of its producers. Masking multiplies those
features, folding scales the consumer's columns, removing drops columns of the consumer and rows of
the producers. Nothing else about an architecture matters to pruning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rfprune.errors import UserError
from rfprune.families.schema import Architecture, BlockKind, Stack, Sublayer
from rfprune.families.support import check_supported
from rfprune.model.linear import is_empty, linear, weight_of
from rfprune.model.modeling_rfprune import check_description
from rfprune.model.unwrapped import check_is_model

InputSource = Literal["tokens", "positions", "encoder"]
"""What a producer is applied to: the hidden states of the block's own tokens, embeddings of
relative positions, or the encoder's output."""


@dataclass(frozen=True)
class Producer:
    """A linear map whose output rows make the units of a block.

    Attributes:
        path: from the model's root.
        parts: how many copies of the units it holds, one after the other (fused queries, keys and
            values).
        width: rows of one unit in one part; in grouped-query attention keys and values have fewer
            than queries.
        inputs: what it is applied to.
        first_width: rows of one unit in the first part, where that is another number (queries that
            are fused with the keys and values which they share).
    """

    path: str
    parts: int
    width: int
    inputs: tuple[InputSource, ...] = ("tokens",)
    first_width: int | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """Rows of one unit in each part."""
        return (self.first_width or self.width, *[self.width] * (self.parts - 1))

    @property
    def unit_rows(self) -> int:
        """Rows of one unit, in all parts."""
        return sum(self.widths)

    def rows_of(self, units: Tensor, num_units: int) -> Tensor:
        """Row indices of `units` (n,) out of `num_units`."""
        starts = [num_units * sum(self.widths[:part]) for part in range(self.parts)]
        rows = (unit_features(units, width) for width in self.widths)
        return torch.cat([start + each for start, each in zip(starts, rows, strict=True)])


def unit_features(units: Tensor, unit_width: int) -> Tensor:
    """Feature indices of `units`: (n,) -> (n * width,)."""
    offsets = torch.arange(unit_width, device=units.device)
    return (units[:, None] * unit_width + offsets).flatten()


@dataclass(frozen=True)
class Block:
    """The prunable units of one sublayer.

    Attributes:
        layer: index of the Transformer layer in `Layout.layers`.
        sublayer: the family's row for this sublayer, with module paths from the model's root.
        producers: the linear maps whose output rows make the units.
        num_units: current number of units.
        unit_width: input features of the consumer per unit (1 for a neuron).
        head_width: features of one query head; a unit may hold several heads (1 for a neuron).
        original_units: for each head, its index in the model before any pruning; neurons are
            numbered as they are now.
        pre_norm: whether norms precede the sublayers of this stack.
        num_positions: number of relative-position embeddings that enter the producers.
    """

    layer: int
    sublayer: Sublayer
    producers: tuple[Producer, ...]
    num_units: int
    unit_width: int
    original_units: tuple[int, ...]
    pre_norm: bool = False
    num_positions: int = 0
    head_width: int = 1

    @property
    def kind(self) -> BlockKind:
        """Whether the units are heads or neurons."""
        return self.sublayer.kind

    @property
    def name(self) -> str:
        """Such as "layer.0.heads"."""
        return f"layer.{self.layer}.{self.sublayer.name}"

    @property
    def consumer(self) -> str:
        """Path of the output projection."""
        return self.sublayer.consumer

    @property
    def projections(self) -> tuple[str, ...]:
        """Paths of the producers and the consumer."""
        return (*(producer.path for producer in self.producers), self.consumer)

    @property
    def input_projections(self) -> tuple[str, ...]:
        """Paths of the producers that are applied to the block's hidden states alone."""
        return tuple(each.path for each in self.producers if each.inputs == ("tokens",))

    def rows_from(self, source: InputSource) -> int:
        """Rows of one unit in the producers that are applied to `source`."""
        return sum(each.unit_rows for each in self.producers if source in each.inputs)


@dataclass(frozen=True)
class Layout:
    """All blocks of a model in execution order. A sublayer without units has no block.

    Attributes:
        model_type: of the configuration.
        hidden_size: features of a hidden state, d.
        layers: paths of all layers, the encoder's before the decoder's.
        blocks: of all layers.
        causal: whether attention is causal.
        execution_order: indices of the layers in execution order if some run several times (their
            blocks are pruned once, and their cost is multiplied by the number of runs); else empty.
        layer_output_length: length of the tuple that a layer returns; None if it returns a tensor.
        first_decoder_layer: index of the first decoder layer; None without a decoder.
    """

    model_type: str
    hidden_size: int
    layers: tuple[str, ...]
    blocks: tuple[Block, ...]
    causal: bool = False
    execution_order: tuple[int, ...] = ()
    layer_output_length: int | None = None
    first_decoder_layer: int | None = None

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether there are two stacks."""
        return self.first_decoder_layer is not None

    def in_decoder(self, block: Block) -> bool:
        """Whether a block is in the decoder of an encoder-decoder."""
        return self.first_decoder_layer is not None and block.layer >= self.first_decoder_layer

    def layer_indices(self, *, decoder: bool = False) -> range:
        """Indices of the layers of the only stack or the encoder, or of the decoder."""
        split = self.first_decoder_layer
        split = len(self.layers) if split is None else split
        return range(split, len(self.layers)) if decoder else range(split)

    def stacks(self) -> tuple[range, ...]:
        """Indices of the layers of each stack."""
        found = (self.layer_indices(), self.layer_indices(decoder=True))
        return found if self.is_encoder_decoder else found[:1]

    def num_runs(self, block: Block) -> int:
        """How many times a block runs in one forward pass."""
        return self.execution_order.count(block.layer) if self.execution_order else 1

    def blocks_of_layer(self, layer: int) -> tuple[Block, ...]:
        """The blocks of a layer in execution order."""
        return tuple(block for block in self.blocks if block.layer == layer)


def layout_of(model: PreTrainedModel) -> Layout:
    """Find the blocks of a model, pruned or not.

    Args:
        model: of a supported family (see `rfprune.families`), with any head.

    Raises:
        UserError: the model type is not supported, its modules are not where the family's row has
            them, or they are not plain linear maps (adapters, quantisation, shared layers).
    """
    check_is_model(model)
    architecture = check_supported(model.config)
    prefix = _path_of_transformer(model)
    known = {each["consumer"]: each["units"] for each in recorded_blocks(model)}
    layers: list[str] = []
    execution_order: list[int] = []
    first_layers: list[int] = []
    blocks: list[Block] = []
    for stack in _stacks(model, architecture):
        num_layers = _num_layers(model, prefix + stack.layers)
        first_layers.append(len(layers))
        if stack.shared:
            runs = model.config.num_hidden_layers
            execution_order += [int(run / (runs / num_layers)) for run in range(runs)]
        for number in range(num_layers):
            path = f"{prefix}{stack.layers}.{number}"
            found = (
                _block(model, stack, each, path, len(layers), known) for each in stack.sublayers
            )
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
        tuple(execution_order),
        architecture.stacks[0].layer_output_length,
        first_layers[1] if len(first_layers) > 1 else None,
    )


def _stacks(model: PreTrainedModel, architecture: Architecture) -> tuple[Stack, ...]:
    """The stacks that a model has: that of an encoder-decoder may be the encoder alone."""
    decoder = getattr(model.base_model, "decoder", None)
    return architecture.stacks_of(model.config)[: 1 if decoder is None else None]


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
    model: PreTrainedModel,
    stack: Stack,
    row: Sublayer,
    layer_path: str,
    layer: int,
    recorded_units: Mapping[str, list[int] | None],
) -> Block | None:
    sublayer = row.in_layer(layer_path, model.config)
    if is_empty(model, sublayer.consumer):
        return None
    if sublayer.position_bias_table is not None:
        table = _position_bias_table(model, sublayer.position_bias_table, layer_path)
        sublayer = replace(sublayer, position_bias_table=table)
    inputs, num_positions = _producer_inputs(model, sublayer)
    head_width = 1
    if sublayer.kind == "head":  # a decoder's heads may have another width than the encoder's
        own_width = getattr(model.get_submodule(sublayer.module), "head_dim", None)
        head_width = own_width or _head_width(model.config)
    num_units, features, rows = _sizes(model, sublayer, tuple(inputs), head_width)
    return Block(
        layer=layer,
        sublayer=sublayer,
        producers=tuple(
            _producer(path, [size // num_units for size in parts], inputs[path])
            for path, parts in zip(inputs, rows, strict=True)
        ),
        num_units=num_units,
        unit_width=features // num_units,
        original_units=tuple(recorded_units.get(sublayer.consumer) or range(num_units)),
        pre_norm=stack.pre_norm,
        num_positions=num_positions,
        head_width=head_width,
    )


def _producer(path: str, widths: Sequence[int], inputs: tuple[InputSource, ...]) -> Producer:
    first, width = widths[0], widths[-1]
    return Producer(path, len(widths), width, inputs, None if first == width else first)


def _position_bias_table(model: nn.Module, own: str, layer_path: str) -> str:
    """Path of the embedding that a layer's position bias comes from: its own or the first's."""
    if own in dict(model.named_modules()):
        return own
    return layer_path.rpartition(".")[0] + ".0" + own.removeprefix(layer_path)


def _producer_inputs(
    model: nn.Module, sublayer: Sublayer
) -> tuple[dict[str, tuple[InputSource, ...]], int]:
    """What each producer is applied to, by path, and how many relative positions there are.

    Without linear maps of their own, relative positions enter those of the queries and keys.
    """
    inputs: dict[str, tuple[InputSource, ...]] = {
        path: ("encoder",) if path in sublayer.encoder_producers else ("tokens",)
        for path in sublayer.producers
    }
    module = model.get_submodule(sublayer.module)
    size = 2 * getattr(module, "pos_ebd_size", 0) if sublayer.position_producers else 0
    if size:
        own = dict(model.named_modules()).keys() & set(sublayer.position_producers)
        for path in sorted(own) or sublayer.producers[:2]:
            inputs[path] = (*inputs.get(path, ()), "positions")
    return inputs, size


def _head_width(config: PretrainedConfig) -> int:
    """Features of one attention head."""
    for entry in ("head_dim", "d_kv"):
        width = getattr(config, entry, None)
        if isinstance(width, int) and width > 0:
            return width
    return int(config.hidden_size // config.num_attention_heads)


def _sizes(
    model: nn.Module, sublayer: Sublayer, producers: Sequence[str], head_width: int
) -> tuple[int, int, list[list[int]]]:
    """The number of units, the consumer's input features, and each producer's rows in each part.

    In grouped-query attention keys and values have fewer rows than queries, and their number of
    heads is the number of units. Of fused parts the first makes the consumer's features, and the
    others have equal sizes.
    """
    features = weight_of(linear(model, sublayer.consumer)).shape[1]
    rows = [weight_of(linear(model, path)).shape[0] for path in producers]
    others = sublayer.fused - 1
    parts: list[list[int]] = [[size] for size in rows]
    if others:
        parts = [[features, *[(size - features) // others] * others] for size in rows]
    sizes = [features, *(size for each in parts for size in each)]
    num_units = min(1 if sublayer.one_unit else min(sizes), min(sizes) // head_width)
    whole = [sum(each) for each in parts] == rows
    sound = whole and num_units > 0 and all(size % (num_units * head_width) == 0 for size in sizes)
    if not sound or (sublayer.kind == "neuron" and len(set(sizes)) > 1):
        found = dict(zip(producers, rows, strict=True))
        raise UserError(
            f"'{sublayer.consumer}' has {features} input features but its producers have the "
            f"output features {found}, which do not fit together; save or download the checkpoint "
            "again"
        )
    return num_units, features, parts


def recorded_blocks(model: PreTrainedModel) -> list[dict[str, Any]]:
    """The blocks that an earlier pruning has recorded, with paths from the model's root."""
    description = getattr(model.config, "rfprune", None)
    if description is None:
        return []
    start = _path_of_transformer(model)
    return [
        block
        | {
            "consumer": start + block["consumer"],
            "inner": start + block["inner"],
            "producers": [each | {"path": start + each["path"]} for each in block["producers"]],
        }
        for block in check_description(description, model.base_model_prefix)
    ]


def _path_of_transformer(model: PreTrainedModel) -> str:
    """What the paths of a Transformer's modules start with in a model that has it."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _check_unshared(model: nn.Module, blocks: list[Block]) -> None:
    owners: dict[int, str] = {}
    for block in blocks:
        for path in block.projections:
            other = owners.setdefault(id(linear(model, path).weight), path)
            if other != path:
                raise UserError(
                    f"'{path}' and '{other}' share their weights, and cannot be pruned separately; "
                    "give every layer weights of its own"
                )
