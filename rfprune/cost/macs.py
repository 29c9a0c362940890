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


def unit_macs(block: Block, hidden_size: int, sequence_length: float) -> float:
    """MACs of one unit of `block` on one sequence of `sequence_length` tokens (a mean: a float)."""
    projections = sequence_length * hidden_size * (block.token_rows + block.unit_width)
    if block.kind == "neuron":
        return projections
    positions = block.positions * block.position_rows * (hidden_size + sequence_length)
    return projections + positions + 2 * sequence_length**2 * block.unit_width


def mac_costs(layout: Layout, sequence_length: float) -> CostModel:
    """MACs of a forward pass over one sequence, by how many units each block keeps."""
    return linear_costs(
        "mac",
        [
            layout.runs_of(block) * unit_macs(block, layout.hidden_size, sequence_length)
            for block in layout.blocks
        ],
        [block.num_units for block in layout.blocks],
    )


def total_macs(layout: Layout, sequence_length: float) -> float:
    """MACs of the layers of a model as it stands, for one sequence of `sequence_length` tokens."""
    return mac_costs(layout, sequence_length).original
