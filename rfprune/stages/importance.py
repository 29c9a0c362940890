"""Classical importance criteria: one number a unit, from its weights, its gradients, or a coin.

They are the baselines that structured pruning is measured against, here behind the same search,
compaction and refit as everything else. A unit's weights are its rows in the producers and its
columns in the consumer; biases are left out.

`search` fills a budget by importance, so what a head is worth must compare with what neurons of
the same cost are worth together. `fisher` adds up over parts that are independent, and does. The
others count as an average over the n weights of a unit, times n. A mask gradient is a sum over n
weights whose signs cancel, which grows as the root of n, so `taylor` counts √n times: as it was, it
gave every neuron precedence over any head, and the model failed. Within heads and within neurons
the order is that of the published criteria, and so is what `same_fraction` keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from rfprune.errors import UserError
from rfprune.model.batch import Batch
from rfprune.model.encoder_decoder import block_token_mask
from rfprune.model.layout import Block, Layout
from rfprune.model.linear import linear, weight_of
from rfprune.stages.fisher import Gradients, collect_gradients
from rfprune.stages.float64 import to_float64
from rfprune.stages.objective import PREDICTIONS, Objective
from rfprune.stages.output_gradients import output_gradients

Importance = tuple[Tensor, ...]
"""Per block of a layout one float64 (U,) on the CPU, not negative; more is more important."""


def compute_importance(
    criterion: str,
    model: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    *,
    objective: Objective = PREDICTIONS,
    seed: int = 0,
    progress: bool = False,
) -> Importance:
    """The importance of every unit by one of `rfprune.settings.CRITERIA`.

    Args:
        model: frozen (see `rfprune.model.masks.frozen`), so that no weight gradient is computed.
        batches: calibration batches; magnitudes and random numbers need none.
        objective: what is differentiated, see `rfprune.stages.objective.objective_values`.
        seed: of the random numbers, and of labels that are sampled.

    Raises:
        UserError: a gradient is not finite (the block is named), or labels are needed and missing.
    """
    if criterion in ("taylor", "fisher"):
        gradients = collect_gradients(
            model, layout, batches, objective=objective, seed=seed, progress=progress
        )
        if criterion == "fisher":
            return fisher(gradients)
        averages = tuple(
            values / math.sqrt(num_weights(model, block))
            for block, values in zip(layout.blocks, taylor(gradients), strict=True)
        )
    elif criterion == "gradient":
        averages = gradient(
            collect_gradient_norms(
                model, layout, batches, objective=objective, seed=seed, progress=progress
            )
        )
    elif criterion == "random":
        averages = random(layout, seed)
    else:
        average = {"magnitude-l1": magnitude_l1, "magnitude-l2": magnitude_l2}[criterion]
        averages = tuple(average(unit_weights(model, block)).cpu() for block in layout.blocks)
    return tuple(
        num_weights(model, block) * values
        for block, values in zip(layout.blocks, averages, strict=True)
    )


def unit_weights(model: nn.Module, block: Block) -> Tensor:
    """All weights of each unit, (U, n): its rows in the producers, its columns in the consumer."""
    units, columns = block.num_units, weight_of(linear(model, block.consumer)).T
    weights = [columns.reshape(units, -1)]
    for producer in block.producers:
        rows = weight_of(linear(model, producer.path))
        by_part = rows.unflatten(0, (producer.parts, units, producer.width))
        weights.append(by_part.transpose(0, 1).reshape(units, -1))
    return torch.cat(weights, dim=1).detach()


def num_weights(model: nn.Module, block: Block) -> int:
    """How many weights a unit of the block has, the n of `unit_weights`."""
    paths = (*(producer.path for producer in block.producers), block.consumer)
    return sum(int(linear(model, path).weight.numel()) for path in paths) // block.num_units


def magnitude_l1(weights: Tensor) -> Tensor:
    """Mean absolute weight of each unit, (U, n) -> (U,): its L1 norm by its number of weights.

    Li et al. 2017, "Pruning Filters for Efficient ConvNets" (arXiv 1608.08710).
    """
    return to_float64(weights).abs().mean(1)


def magnitude_l2(weights: Tensor) -> Tensor:
    """Root mean square weight of each unit, (U, n) -> (U,): its L2 norm by the root of n.

    Han et al. 2015, "Learning both Weights and Connections" (arXiv 1506.02626), for whole units.
    """
    return to_float64(weights).square().mean(1).sqrt()


def gradient(norms: Gradients) -> Importance:
    """Mean over examples and factors, (n, U) -> (U,) a block, of what `collect_gradient_norms`
    gives: how steeply the loss depends on a unit's weights, whatever they are."""
    return tuple(to_float64(norm).mean(0) for norm in norms)


def taylor(gradients: Gradients) -> Importance:
    """Mean absolute mask gradient, (n, U) -> (U,) a block.

    The mask gradient of a unit is the sum over its output of activation times gradient, the
    first-order change of the loss when the unit goes: Molchanov et al. 2017 (arXiv 1611.06440) and
    2019 (arXiv 1906.10771); for heads Michel et al. 2019 (arXiv 1905.10650). The absolute value is
    taken example by example.
    """
    return tuple(to_float64(gradient).abs().mean(0) for gradient in gradients)


def fisher(gradients: Gradients) -> Importance:
    """Mean squared mask gradient, (n, U) -> (U,) a block: the diagonal of the Fisher information.

    The second-order change of the loss in the manner of Optimal Brain Damage (LeCun et al. 1989);
    the first stage of Kwon et al. 2022 (arXiv 2204.09656, section 4.1).
    """
    return tuple(to_float64(gradient).square().mean(0) for gradient in gradients)


def random(layout: Layout, seed: int) -> Importance:
    """Uniform random numbers in [0, 1), (U,) a block: what any criterion must beat."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.rand(block.num_units, dtype=torch.float64, generator=generator)
        for block in layout.blocks
    )


def collect_gradient_norms(
    model: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    *,
    objective: Objective = PREDICTIONS,
    seed: int = 0,
    progress: bool = False,
) -> Gradients:
    """Root mean square loss gradient of each unit's weights in the consumer, example by example.

    The weight gradient of an example is gᵀ·x, with x (S, p) what enters the consumer and g (S, d)
    the gradient at what leaves it. It is never made: the squared norm of its column for feature x_u
    is x_uᵀ·(g·gᵀ)·x_u.

    Args:
        model: frozen.

    Returns:
        Per block a float32 matrix (n, U) on the CPU, a row for each example and factor.

    Raises:
        UserError: a gradient is not finite (the block is named), or labels are needed and missing.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[Tensor]] = [[] for _ in layout.blocks]
    bar = tqdm(batches, desc="weight gradients", unit="batch", disable=not progress, leave=False)
    for batch in bar:
        with torch.inference_mode(False), torch.enable_grad():
            _add_norms(model, layout, batch, objective, generator, rows)
    collected = tuple(torch.cat(block_rows) for block_rows in rows)
    for block, norms in zip(layout.blocks, collected, strict=True):
        if not torch.isfinite(norms).all():
            raise UserError(
                f"the weight gradients of {block.name} are not finite; check the checkpoint's "
                "weights, or calibrate in float32 (--dtype float32)"
            )
    return collected


def _add_norms(
    model: PreTrainedModel,
    layout: Layout,
    batch: Batch,
    objective: Objective,
    generator: torch.Generator,
    rows: Sequence[list[Tensor]],
) -> None:
    entering: list[list[Tensor]] = [[] for _ in layout.blocks]
    record_inputs = [runs.append for runs in entering]
    for gradients in output_gradients(
        model, layout, batch, record_inputs, generator, objective=objective
    ):
        for block, block_rows, xs, gs in zip(layout.blocks, rows, entering, gradients, strict=True):
            tokens = block_token_mask(layout, block, batch)
            # a weight's gradient is the sum over the runs, as it is over the tokens of each
            x = torch.cat([x.float().reshape(*tokens.shape, -1) for x in xs], 1)
            # padding is no part of an example
            g = torch.cat([g.float().reshape(*tokens.shape, -1) * tokens[..., None] for g in gs], 1)
            squares = (x * ((g @ g.transpose(1, 2)) @ x)).sum(1)  # (B, p), one a column
            norms = squares.unflatten(1, (block.num_units, -1)).sum(-1).clamp_min(0).sqrt()
            size = block.unit_width * g.shape[-1]
            block_rows.append((norms / math.sqrt(size)).cpu())
