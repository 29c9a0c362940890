"""Multiply-accumulates (MACs) of the Transformer layers on one sequence (Kwon et al. 2022).

With S tokens, hidden size d and head width D:

    head       3·S·d·D (query, key, value) + 2·S²·D (scores, weighted values) + S·D·d (output)
    neuron     2·S·d (both projections of the FFN), or 3·S·d in a gated FFN

Query heads that share a key and a value count the shared projections once. Cross-attention reads
the S' tokens of the encoder: keys and values cost 2·S'·d·D, and scores 2·S·S'·D. With relative
positions (DeBERTa), P position embeddings go through the query and key projections, P·d·D each, and
are compared with the tokens, P·S·D each. MACs of a layer are multiplied by its number of runs.

Embeddings, norms, biases, pooler and the task's head are not counted. Masked-out tokens still cost.
"""

from __future__ import annotations

from rfprune.cost.constraint import CostModel, linear_costs
from rfprune.model.layout import Block, Layout


def unit_macs(
    block: Block, hidden_size: int, sequence_length: float, encoder_length: float = 0.0
) -> float:
    """MACs of one unit of `block` on one sequence, in one run of its layer.

    Args:
        hidden_size: features of a hidden state, d.
        sequence_length: tokens of the block's own stack, S; a mean may be fractional.
        encoder_length: tokens that cross-attention reads, S'.
    """
    projections = sequence_length * hidden_size * (block.rows_from("tokens") + block.unit_width)
    if block.kind == "neuron":
        return projections
    projections += encoder_length * hidden_size * block.rows_from("encoder")
    positions = block.num_positions * block.rows_from("positions") * (hidden_size + sequence_length)
    keys = encoder_length if block.rows_from("encoder") else sequence_length
    return projections + positions + 2 * sequence_length * keys * block.unit_width


def mac_costs(
    layout: Layout, sequence_length: float, decoder_length: float | None = None
) -> CostModel:
    """MACs of a forward pass on one sequence, by how many units each block keeps.

    Args:
        sequence_length: tokens of the only stack or the encoder.
        decoder_length: tokens of the decoder of an encoder-decoder (default: `sequence_length`).
    """
    if decoder_length is None:
        decoder_length = sequence_length
    return linear_costs(
        "mac",
        [
            layout.num_runs(block)
            * unit_macs(
                block,
                layout.hidden_size,
                decoder_length if layout.in_decoder(block) else sequence_length,
                sequence_length,
            )
            for block in layout.blocks
        ],
        [block.num_units for block in layout.blocks],
    )


def total_macs(
    layout: Layout, sequence_length: float, decoder_length: float | None = None
) -> float:
    """MACs of all layers on one sequence, with the units that the model has; see `mac_costs`."""
    return mac_costs(layout, sequence_length, decoder_length).original
