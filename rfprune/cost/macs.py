"""Multiply-accumulates of the Transformer layers, as Kwon et al. 2022 count them.

Embeddings, norms, biases, pooler and the task's head are not counted. For S tokens, hidden size d
and head width D, a head costs 3·S·d·D (query, key, value) + 2·S²·D (scores and their product with
the values) + S·D·d (output), and a neuron 2·S·d. Heads that share a key and a value have one of
these together, and a gated neuron costs 3·S·d. A mask that hides tokens saves nothing. Where heads
attend to P relative positions beside the tokens, these are projected too, P·d·D by each map that
they enter, and compared with the tokens, P·S·D. A layer that runs several times costs as often.
"""

from __future__ import annotations

from rfprune.cost.constraint import CostModel, linear_costs
from rfprune.model.layout import Block, Layout


def unit_macs(
    block: Block, hidden_size: int, sequence_length: float, encoder_length: float = 0.0
) -> float:
    """MACs of one unit of `block` on one sequence of `sequence_length` tokens (a mean: a float),
    where it reads an encoder on what that made of `encoder_length` others."""
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
    """MACs of a forward pass over one sequence, by how many units each block keeps.

    Args:
        decoder_length: of the sequence that a decoder makes of it, where there is one; as long, if
            it is not given.
    """
    made = sequence_length if decoder_length is None else decoder_length
    return linear_costs(
        "mac",
        [
            layout.num_runs(block)
            * unit_macs(
                block,
                layout.hidden_size,
                made if layout.in_decoder(block) else sequence_length,
                sequence_length,
            )
            for block in layout.blocks
        ],
        [block.num_units for block in layout.blocks],
    )


def total_macs(
    layout: Layout, sequence_length: float, decoder_length: float | None = None
) -> float:
    """MACs of the layers of a model as it stands, for one sequence; see `mac_costs`."""
    return mac_costs(layout, sequence_length, decoder_length).original
