"""FLAP: An et al. 2023, "Fluctuation-based adaptive structured pruning for large language models"
(AAAI 2024, arXiv 2312.11983). The names of the steps are those of the paper's sections, which have
no numbers.

    importance metric     of an input feature j of an output projection: its variance over the
                          calibration tokens times ‖W_·j‖² (the authors' metric WIFV)
    structure search      importance is standardised within every sublayer, so that one threshold
                          serves the whole model; a head has the mean over its features
    bias compensation     W·(mean of the removed features) is added to the bias

Statistics are those of the original model, collected in one forward pass. As in the authors' code
(structure AL-AM), but not in the paper, the importance of features of an attention is squared
before it is standardised.

Departures:

- The threshold is the lowest that the constraint allows, by the package's count of the cost. The
  authors take the nearest one, with 512/3 neurons for a head.
- With grouped queries a unit is a key-value head with all its queries. The paper has none.
- Means and variances are over tokens in float64. The authors' running averages are the same up to
  factors that the standardisation removes, and the mean is stored in float16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rfprune.cost.constraint import CostModel
from rfprune.methods.problem import Problem
from rfprune.model.batch import model_inputs, pack
from rfprune.model.encoder_decoder import block_token_mask
from rfprune.model.frozen import frozen
from rfprune.model.layout import Block, Layout
from rfprune.model.linear import linear, weight_of
from rfprune.model.masks import Masks
from scripts.bench.peers.choice import Choice, keep_highest, require_units


@dataclass(frozen=True)
class FeatureMoments:
    """Mean (p,) and variance (p,) of the input features of an output projection, in float64."""

    mean: Tensor
    variance: Tensor


def prepare(problem: Problem) -> Callable[[CostModel, float], Choice]:
    """Collect moments and scores, which serve every constraint."""
    model, layout = problem.model, problem.layout
    with problem.timer.stage("collect"), frozen(model):
        moments = collect_moments(problem)
    scores = [
        unit_scores(feature_importance(one, weight_of(linear(model, block.consumer)), block), block)
        for block, one in zip(layout.blocks, moments, strict=True)
    ]

    def choose(costs: CostModel, budget: float) -> Choice:
        masks = require_units(keep_highest(scores, costs, budget))

        def recover(student: PreTrainedModel) -> Sequence[str]:
            compensate(model, student, layout, masks, moments)
            return ()

        return Choice(masks, recover)

    return choose


@torch.no_grad()
def collect_moments(problem: Problem) -> list[FeatureMoments]:
    """Moments of the features of every block, over the tokens of the calibration batches."""
    model, layout = problem.model, problem.layout
    sizes = [block.num_units * block.unit_width for block in layout.blocks]
    sums = [torch.zeros(2, size, dtype=torch.float64, device=model.device) for size in sizes]
    counts = [0 for _ in layout.blocks]
    tokens: list[Tensor] = []

    def hook_of(number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = pack(inputs[0], tokens[number]).double()
            sums[number] += torch.stack([rows.sum(0), rows.square().sum(0)])
            counts[number] += len(rows)

        return hook

    hooks = [
        model.get_submodule(block.consumer).register_forward_pre_hook(hook_of(number))
        for number, block in enumerate(layout.blocks)
    ]
    try:
        for batch in problem.inputs:
            tokens = [block_token_mask(layout, block, batch) for block in layout.blocks]
            model(**model_inputs(batch))
    finally:
        for one in hooks:
            one.remove()
    return [
        FeatureMoments(total / count, (squares / count - (total / count).square()).clamp_min(0))
        for (total, squares), count in zip(sums, counts, strict=True)
    ]


def feature_importance(moments: FeatureMoments, weight: Tensor, block: Block) -> Tensor:
    """Variance times squared column norm, (p,), for a weight (d, p); squared for attention."""
    found = moments.variance * weight.detach().double().square().sum(0).to(moments.variance)
    return found.square() if block.kind == "head" else found


def unit_scores(importance: Tensor, block: Block) -> Tensor:
    """Scores (U,) of units: the mean over their features of the standardised importance (p,)."""
    spread = importance.std().clamp_min(torch.finfo(importance.dtype).tiny)
    standard = (importance - importance.mean()) / spread
    return standard.view(block.num_units, -1).mean(1)


@torch.no_grad()
def compensate(
    model: PreTrainedModel,
    student: PreTrainedModel,
    layout: Layout,
    masks: Masks,
    moments: Sequence[FeatureMoments],
) -> None:
    """Add W·(mean of the removed features) to the bias of every output projection of a student.

    A projection without a bias gets one.

    Args:
        model: the original.
        student: a compact copy of it under `masks`.
        layout: the blocks of the original.
        masks: zeros and ones.
        moments: of the original.
    """
    for block, mask, one in zip(layout.blocks, masks, moments, strict=True):
        weight = weight_of(linear(model, block.consumer)).detach().double()
        removed = (1 - mask).repeat_interleave(block.unit_width).to(one.mean)
        added = (weight @ (removed * one.mean)).to(model.dtype)
        consumer = student.get_submodule(block.consumer)
        bias = consumer.bias
        consumer.bias = nn.Parameter(added if bias is None else bias + added, requires_grad=False)
