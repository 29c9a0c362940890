"""The schema of a row of `rfprune.families.architectures`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

LINEAR_MAPS = (nn.Linear, Conv1D)
"""GPT-2 keeps the weights of its linear maps as (inputs, outputs), in a Conv1D."""

BlockKind = Literal["head", "neuron"]

Bypass = Literal["plain", "normed", "biased"]
"""What the inner module of a sublayer does beside computing units: nothing, or ("normed") the
residual sum and the norm after it, which it holds, or ("biased") handing a position bias to the
next layer, with one slice a head."""


@dataclass(frozen=True)
class Sublayer:
    """One attention or one FFN of every layer of a family.

    Attributes:
        kind: what its units are, heads or neurons. Where several query heads share a key and a
            value head, they are one unit together.
        producers: linear maps whose output rows make the units.
        consumer: the linear map whose input columns are the units (the out-projection).
        inner: the module that computes the units; it is bypassed when no unit is left.
        residual_sum: the module whose input is the consumer's output plus the residual; None where
            that is the layer's output.
        fused: how many times each producer holds all units, one after the other: 3 for queries,
            keys and values in one map, 2 for the two halves of a gated FFN.
        inner_returns_tuple: whether `inner` returns a tuple (attention does).
        head_bias: argument of `inner` with one slice a head, such as a position bias.
        scale: a vector (d,) that multiplies what leaves the consumer before the residual is added.
        label: of the block's name; "heads" or "neurons" where there is no other of that kind.
        bypass: what `inner` does beside computing units; see `Bypass`.
        positions: linear maps that read the embeddings of relative positions, and make rows of the
            units of them, where they are; not in `producers`.
        from_encoder: those of `producers` that read what comes out of the encoder.
        gated: the producers where the configuration says that the FFN is gated.
        bias_table: an embedding of relative positions, one number a head, which is that of the
            first layer in all others.
    """

    kind: BlockKind
    producers: tuple[str, ...]
    consumer: str
    inner: str
    residual_sum: str | None
    fused: int = 1
    inner_returns_tuple: bool = False
    head_bias: str | None = None
    scale: str | None = None
    label: str = ""
    bypass: Bypass = "plain"
    positions: tuple[str, ...] = ()
    from_encoder: tuple[str, ...] = ()
    gated: tuple[str, ...] = ()
    bias_table: str | None = None


@dataclass(frozen=True)
class Stack:
    """Layers that run one after the other, and their sublayers in the order in which they run.

    Attributes:
        layers: path of the list of layers.
        pre_norm: whether a sublayer's residual is its layer's hidden state as it is, and norms
            come only before what reads it; else a norm comes after every residual sum.
        shared: whether fewer layers than the configuration's `num_hidden_layers` are there, each
            of which runs several times in a row.
        returns: length of the tuple that a layer returns, hidden states first; None where it
            returns the hidden states alone, as a tensor.
    """

    layers: str
    sublayers: tuple[Sublayer, ...]
    pre_norm: bool = False
    shared: bool = False
    returns: int | None = None


@dataclass(frozen=True)
class Architecture:
    """A family.

    Attributes:
        stacks: one for encoders and for decoders; two where a decoder reads an encoder.
        causal: whether a token sees none that comes later, and heads read the last one.
        needed: entries of the configuration, and the only values for which the row is right.
    """

    stacks: tuple[Stack, ...]
    causal: bool = False
    needed: Mapping[str, Any] = field(default_factory=dict)
