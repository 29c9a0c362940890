"""Where each model family keeps its prunable projections: data, one row a family.

To add a family, add a row. Paths of layers are relative to the base model (`model.base_model`),
paths of a sublayer are relative to its layer. `rfprune.model.layout.layout_of` turns a row and a
model into blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BlockKind = Literal["head", "neuron"]


@dataclass(frozen=True)
class Sublayer:
    """One attention or one FFN of every layer of a family.

    Attributes:
        kind: what its units are, heads or neurons.
        producers: linear maps whose output rows make the units.
        consumer: the linear map whose input columns are the units (the out-projection).
        inner: the module that computes the units; it is bypassed when no unit is left.
        residual_sum: the module whose input is the consumer's output plus the residual.
        inner_returns_tuple: whether `inner` returns a tuple (attention does).
        shared_position_bias: whether `inner` is handed a position bias with one slice a head.
    """

    kind: BlockKind
    producers: tuple[str, ...]
    consumer: str
    inner: str
    residual_sum: str
    inner_returns_tuple: bool = False
    shared_position_bias: bool = False


@dataclass(frozen=True)
class Architecture:
    """A family: where its layers are, and their sublayers in the order in which they run."""

    layers: str
    sublayers: tuple[Sublayer, ...]


_BERT_FFN = Sublayer(
    kind="neuron",
    producers=("intermediate.dense",),
    consumer="output.dense",
    inner="intermediate",
    residual_sum="output.LayerNorm",
)

_BERT = Architecture(
    layers="encoder.layer",
    sublayers=(
        Sublayer(
            kind="head",
            producers=("attention.self.query", "attention.self.key", "attention.self.value"),
            consumer="attention.output.dense",
            inner="attention.self",
            residual_sum="attention.output.LayerNorm",
            inner_returns_tuple=True,
        ),
        _BERT_FFN,
    ),
)

_DISTILBERT = Architecture(
    layers="transformer.layer",
    sublayers=(
        Sublayer(
            kind="head",
            producers=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            consumer="attention.out_lin",
            inner="attention",
            residual_sum="sa_layer_norm",
            inner_returns_tuple=True,
        ),
        Sublayer(
            kind="neuron",
            producers=("ffn.lin1",),
            consumer="ffn.lin2",
            inner="ffn",
            residual_sum="output_layer_norm",
        ),
    ),
)

_MPNET = Architecture(
    layers="encoder.layer",
    sublayers=(
        Sublayer(
            kind="head",
            producers=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
            consumer="attention.attn.o",
            inner="attention.attn",
            residual_sum="attention.LayerNorm",
            inner_returns_tuple=True,
            shared_position_bias=True,
        ),
        _BERT_FFN,
    ),
)

ARCHITECTURES: dict[str, Architecture] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "distilbert": _DISTILBERT,
    "mpnet": _MPNET,
}
