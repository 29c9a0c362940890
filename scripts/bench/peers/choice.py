"""The units that a peer keeps, and what several peers do to choose them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rfprune.cost.constraint import CostModel
from rfprune.errors import UserError
from rfprune.model.layout import Layout
from rfprune.model.masks import Masks, num_kept


def _unchanged(_: PreTrainedModel) -> Sequence[str]:
    return ()


@dataclass(frozen=True)
class Choice:
    """Masks, and the changes of the weights that belong to them.

    Attributes:
        masks: zeros and ones (U,) per block.
        recover: changes the pruned model in place as the peer's paper does; returns warnings.
    """

    masks: Masks
    recover: Callable[[PreTrainedModel], Sequence[str]] = _unchanged


def keep_highest(scores: Sequence[Tensor], costs: CostModel, budget: float) -> Masks:
    """Masks of all units above one threshold, which is as low as a budget allows.

    Other than `rfprune.stages.search`, which maximises the sum of the scores, this does not weigh a
    score against the cost of its unit.

    Args:
        scores: (U,) per block; they may be negative. Of equal scores the first one is kept first.
        costs: of the same blocks.
        budget: of all blocks together, without `costs.constant`.

    Returns:
        A mask (U,) of zeros and ones per block; none but zeros where nothing fits.
    """
    values = np.concatenate([score.cpu().double().numpy() for score in scores])
    blocks = np.repeat(np.arange(len(scores)), [len(score) for score in scores])
    order = np.argsort(-values, kind="stable")
    kept, spent = [0] * len(scores), sum(float(table[0]) for table in costs.tables)
    masks = tuple(torch.zeros(len(score)) for score in scores)
    starts = np.concatenate([[0], np.cumsum([len(score) for score in scores])])
    for place in order.tolist():
        b = int(blocks[place])
        table = costs.tables[b]
        spent += float(table[kept[b] + 1] - table[kept[b]])
        if spent > budget * (1 + 1e-12):
            break
        kept[b] += 1
        masks[b][place - int(starts[b])] = 1.0
    return masks


def require_units(masks: Masks) -> Masks:
    """Masks as they are.

    Raises:
        UserError: they keep nothing.
    """
    if not any(num_kept(masks)):
        raise UserError("the constraint is too small for a single unit of this peer")
    return masks


def require_one_stack(layout: Layout, peer: str) -> None:
    """Check that every layer of a model runs once, one after the other.

    Raises:
        UserError: it is an encoder-decoder, or layers share their weights.
    """
    if layout.is_encoder_decoder or layout.execution_order:
        raise UserError(f"{peer} is written for one stack of layers that share no weights")
