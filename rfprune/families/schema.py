"""The schema of a family's row in `rfprune.families.architectures`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

LINEAR_MAPS = (nn.Linear, Conv1D)
"""The classes of linear maps. A Conv1D (GPT-2) stores its weight as (inputs, outputs)."""

BlockKind = Literal["head", "neuron"]


@dataclass(frozen=True)
class Sublayer:
    """One attention or one FFN of every layer of a family; module paths are relative to the layer.

    Attributes:
        kind: whether its units are heads or neurons. In grouped-query attention a unit is a
            key-value head with all query heads that share it.
        producers: linear maps whose output rows make the units.
        consumer: the output projection: the linear map whose input columns are the units.
        module: the attention or FFN module that computes the units, or, where there is none, the
            linear map. It is bypassed when no unit is left.
        next_norm: the norm whose input is the consumer's output plus the residual, or the module of
            the next sublayer if no norm precedes it (OLMo 2); None where that sum is the layer's
            output.
        fused: how many copies of the units each producer holds, one after the other: 3 for fused
            queries, keys and values, 2 for the two halves of a gated FFN. The first makes the
            consumer's features; the others may be smaller (keys and values that queries share).
        one_unit: whether all heads of the attention make one unit, where a norm is computed over
            the queries of all heads: without some of them it would change the others (OLMo 2).
            Constraints leave it whole.
        returns_tuple: whether `module` returns a tuple (attentions return their weights too).
        head_bias: the argument of `module` with one slice per head, such as a position bias.
        output_norm: an RMS norm of the consumer's output, before the residual is added (Gemma 2).
        parallel: the next sublayer has the same input as this one, and both outputs are added to
            the residual at once (GPT-NeoX).
        layer_scale: a vector (d,) or a number that multiplies the consumer's output (LayerScale).
        label: the last part of the block's name; "heads" or "neurons" unless two sublayers of a
            layer have the same kind.
        includes_residual: whether `module` also adds the residual and applies the norm (ALBERT).
        returns_position_bias: whether `module` also returns a position bias with one slice per
            head, which later layers use (T5).
        position_producers: linear maps of relative position embeddings, where the configuration
            has them; not in `producers`.
        encoder_producers: those of `producers` that take the encoder's output (cross-attention).
        gated_producers: replace `producers` if the configuration has `is_gated_act`.
        position_bias_table: an embedding of relative positions with one number per head. Only the
            first layer has one; it serves all layers.
    """

    kind: BlockKind
    producers: tuple[str, ...]
    consumer: str
    module: str
    next_norm: str | None
    fused: int = 1
    one_unit: bool = False
    returns_tuple: bool = False
    head_bias: str | None = None
    output_norm: str | None = None
    parallel: bool = False
    layer_scale: str | None = None
    label: str = ""
    includes_residual: bool = False
    returns_position_bias: bool = False
    position_producers: tuple[str, ...] = ()
    encoder_producers: tuple[str, ...] = ()
    gated_producers: tuple[str, ...] = ()
    position_bias_table: str | None = None

    @property
    def name(self) -> str:
        """The last part of a block's name, such as "heads"."""
        return self.label or f"{self.kind}s"

    @property
    def num_extra_outputs(self) -> int:
        """How many values `module` returns after the hidden states."""
        return self.returns_tuple + self.returns_position_bias

    def in_layer(self, layer_path: str, config: PretrainedConfig) -> Sublayer:
        """The row of one layer: with the producers of a configuration and paths from the root."""

        def full(paths: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(f"{layer_path}.{path}" for path in paths)

        gated = self.gated_producers and getattr(config, "is_gated_act", False)
        return replace(
            self,
            producers=full(self.gated_producers if gated else self.producers),
            consumer=f"{layer_path}.{self.consumer}",
            module=f"{layer_path}.{self.module}",
            next_norm=self.next_norm and f"{layer_path}.{self.next_norm}",
            output_norm=self.output_norm and f"{layer_path}.{self.output_norm}",
            layer_scale=self.layer_scale and f"{layer_path}.{self.layer_scale}",
            position_producers=full(self.position_producers),
            encoder_producers=full(self.encoder_producers),
            gated_producers=(),
            position_bias_table=self.position_bias_table
            and f"{layer_path}.{self.position_bias_table}",
        )


@dataclass(frozen=True)
class Stack:
    """A list of layers, and the sublayers of each layer in execution order.

    Attributes:
        layers: path of the list of layers, relative to the base model.
        sublayers: the prunable sublayers.
        pre_norm: whether norms precede the sublayers (pre-norm), or follow the residual sums
            (post-norm).
        shared: whether layers share weights (ALBERT): there are fewer of them than
            `num_hidden_layers`, and each runs several times in a row.
        layer_output_length: length of the tuple that a layer returns, hidden states first; None
            where a layer returns the hidden states as a tensor.
        num_layers_entry: the entry of the configuration with the number of layers.
        first_layer_stays: whether the first layer is unlike the others (a norm that it lacks, a
            table that serves all layers), so that no other can take its place.
    """

    layers: str
    sublayers: tuple[Sublayer, ...]
    pre_norm: bool = False
    shared: bool = False
    layer_output_length: int | None = None
    num_layers_entry: str = "num_hidden_layers"
    first_layer_stays: bool = False


@dataclass(frozen=True)
class SizeEntries:
    """The entries of a family's configuration that hold the sizes that pruning changes.

    Attributes:
        neurons: the number of FFN neurons of every layer.
        heads: first the number of attention units of every layer, then the entries that stay in
            proportion to it. Empty where the configuration has no entry for the width of a head,
            since fewer heads would then become wider ones.
    """

    neurons: str = "intermediate_size"
    heads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """A family of models.

    Attributes:
        stacks: one for encoders and decoders, two (encoder first) for encoder-decoders.
        stable_stacks: replace `stacks` if the configuration has `do_stable_layer_norm` (Wav2Vec2).
        causal: whether attention is causal, in which case heads of models use the last token.
        required_config: configuration entries and the only values that the row is right for.
        size_entries: configuration entries for plain models (see `rfprune.model.plain`); None
            where there is no single entry for the number of neurons, or two of them, one for the
            encoder and one for the decoder.
        has_pooled_embeddings: whether a model without a head embeds an example by its pooler or
            its projection (CLIP), not by the mean of its last hidden states.
    """

    stacks: tuple[Stack, ...]
    stable_stacks: tuple[Stack, ...] = ()
    causal: bool = False
    required_config: Mapping[str, Any] = field(default_factory=dict)
    size_entries: SizeEntries | None = None
    has_pooled_embeddings: bool = False

    def stacks_of(self, config: PretrainedConfig) -> tuple[Stack, ...]:
        """The stacks of a model with this configuration."""
        stable = self.stable_stacks and getattr(config, "do_stable_layer_norm", False)
        return self.stable_stacks if stable else self.stacks
