"""Where each model family keeps its prunable projections: data, one row a family.

To add a family, add a row (`scripts/inspect_architecture.py` suggests one). Paths of layers are
relative to the base model (`model.base_model`), paths of a sublayer are relative to its layer.
`rfprune.model.layout.layout_of` turns a row and a model into blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

BlockKind = Literal["head", "neuron"]


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


@dataclass(frozen=True)
class Stack:
    """Layers that run one after the other, and their sublayers in the order in which they run.

    Attributes:
        layers: path of the list of layers.
        pre_norm: whether a sublayer's residual is its layer's hidden state as it is, and norms
            come only before what reads it; else a norm comes after every residual sum.
    """

    layers: str
    sublayers: tuple[Sublayer, ...]
    pre_norm: bool = False


@dataclass(frozen=True)
class Architecture:
    """A family.

    Attributes:
        stacks: one for encoders and decoders. (Two stacks, an encoder and a decoder that reads it,
            are not replayed yet: see `rfprune.model.replay.layer_calls`.)
        causal: whether a token sees none that comes later, and heads read the last one.
        refused: entries of the configuration, and their values for which the row is wrong.
    """

    stacks: tuple[Stack, ...]
    causal: bool = False
    refused: Mapping[str, Any] = field(default_factory=dict)


_BERT_FFN = Sublayer(
    kind="neuron",
    producers=("intermediate.dense",),
    consumer="output.dense",
    inner="intermediate",
    residual_sum="output.LayerNorm",
)

_BERT_ATTENTION = Sublayer(
    kind="head",
    producers=("attention.self.query", "attention.self.key", "attention.self.value"),
    consumer="attention.output.dense",
    inner="attention.self",
    residual_sum="attention.output.LayerNorm",
    inner_returns_tuple=True,
)

_BERT = Architecture((Stack("encoder.layer", (_BERT_ATTENTION, _BERT_FFN)),))

_DISTILBERT_ATTENTION = Sublayer(
    kind="head",
    producers=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    consumer="attention.out_lin",
    inner="attention",
    residual_sum="sa_layer_norm",
    inner_returns_tuple=True,
)

_DISTILBERT_FFN = Sublayer(
    kind="neuron",
    producers=("ffn.lin1",),
    consumer="ffn.lin2",
    inner="ffn",
    residual_sum="output_layer_norm",
)

_MPNET_ATTENTION = Sublayer(
    kind="head",
    producers=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    consumer="attention.attn.o",
    inner="attention.attn",
    residual_sum="attention.LayerNorm",
    inner_returns_tuple=True,
    head_bias="position_bias",
)

ARCHITECTURES: dict[str, Architecture] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "distilbert": Architecture(
        (Stack("transformer.layer", (_DISTILBERT_ATTENTION, _DISTILBERT_FFN)),)
    ),
    "mpnet": Architecture((Stack("encoder.layer", (_MPNET_ATTENTION, _BERT_FFN)),)),
}
