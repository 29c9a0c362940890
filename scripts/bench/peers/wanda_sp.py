"""Wanda-sp: Wanda (Sun et al. 2024, arXiv 2306.11695) for whole units, as the FLAP paper has it.

An et al. 2023 (arXiv 2312.11983, experiments) extend Wanda to structured pruning for a baseline: a
weight has the importance |W_ij|·‖x_j‖, with the norm of its input feature over all calibration
tokens; a feature has the mean over the outputs i, and a unit the sum over its features. The same
fraction of the units of every sublayer is removed. Layers are pruned bottom up, and the norms in a
layer are those of the hidden states that the pruned layers below it give. Weights are not changed.

Departures:

- The fraction is the largest that the constraint allows, by the package's count of the cost; a
  sublayer keeps ceil(fraction x units), so none is emptied (`rfprune.stages.uniform`).
- With grouped queries a unit is a key-value head with all its queries. The paper has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rfprune.cost.constraint import CostModel
from rfprune.methods.problem import Problem
from rfprune.model.batch import Batch, pack
from rfprune.model.encoder_decoder import block_token_mask
from rfprune.model.frozen import frozen
from rfprune.model.layerwise import layer_calls, run_layer, trace_block
from rfprune.model.layout import Block, Layout
from rfprune.model.linear import linear, weight_of
from rfprune.model.masks import Masks, masked
from rfprune.stages.search import keep_most_important
from rfprune.stages.uniform import same_fraction_counts
from scripts.bench.peers.choice import Choice, require_one_stack


def prepare(problem: Problem) -> Callable[[CostModel, float], Choice]:
    """Nothing can be collected before the constraint is known: it decides the pruned inputs."""
    layout = problem.layout
    require_one_stack(layout, "Wanda-sp")

    def choose(costs: CostModel, budget: float) -> Choice:
        kept = same_fraction_counts([block.num_units for block in layout.blocks], costs, budget)
        with frozen(problem.model):
            return Choice(choose_bottom_up(problem.model, layout, problem.inputs, kept))

    return choose


@torch.no_grad()
def choose_bottom_up(
    model: PreTrainedModel, layout: Layout, batches: Sequence[Batch], kept: Sequence[int]
) -> Masks:
    """Masks that keep `kept[b]` units of each block b, layer by layer from the first.

    Args:
        model: frozen.
        layout: its blocks.
        batches: calibration batches with token masks.
    """
    masks: list[Tensor] = []
    states = [layer_calls(model, layout, batch)[0] for batch in batches]
    for layer, path in enumerate(layout.layers):
        blocks = layout.blocks_of_layer(layer)
        squares = [torch.zeros(()) for _ in blocks]
        for state, batch in zip(states, batches, strict=True):
            calls = layer_calls(model, layout, batch)[1]
            for number, block in enumerate(blocks):
                features = trace_block(model, path, state, calls, block).features
                assert features is not None, "no block is empty yet"
                rows = pack(features, block_token_mask(layout, block, batch))
                squares[number] = squares[number] + rows.double().square().sum(0)
        scores = [
            unit_scores(weight_of(linear(model, block.consumer)), one.sqrt(), block)
            for block, one in zip(blocks, squares, strict=True)
        ]
        own = keep_most_important(scores, kept[len(masks) :][: len(blocks)])
        masks += own
        with masked(model, replace(layout, blocks=tuple(blocks)), own):
            states = [
                run_layer(model, path, state, layer_calls(model, layout, batch)[1])
                for state, batch in zip(states, batches, strict=True)
            ]
    return tuple(masks)


def unit_scores(weight: Tensor, norms: Tensor, block: Block) -> Tensor:
    """Importance (U,) of units from a weight (d, p) and the norms (p,) of its input features."""
    features = weight.detach().double().abs().mean(0).to(norms) * norms
    return features.view(block.num_units, -1).sum(1)
