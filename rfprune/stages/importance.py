"""Classical importance criteria: one number per unit, from its weights, its gradients or at random.

These are the baselines of structured pruning. They share the search, compaction and least-squares
fit with the other methods. The weights of a unit are its rows in the producers and its columns in
the consumer; biases are left out.

`rfprune.stages.search` fills a budget by importance, so the importance of a head must compare with
that of neurons of the same cost. The criterion `fisher` is additive over independent units and
compares as it is. All others are averages over the n weights of a unit, times n. `taylor` is
divided by √n first: a mask gradient is a sum over n weights with varying signs, which grows with
√n. Without that division every neuron would have precedence over every head. None of this changes
the order within heads or within neurons, which is that of the published criteria.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from rfprune import distributed
from rfprune.model.encoder_decoder import block_token_mask
from rfprune.model.layout import Block, Layout
from rfprune.model.linear import linear, weight_of
from rfprune.model.residency import resident
from rfprune.stages.calibration import Calibration, require_finite
from rfprune.stages.collection import passes
from rfprune.stages.fisher import Gradients, collect_gradients
from rfprune.stages.float64 import to_float64
from rfprune.stages.output_gradients import LinearOutputs
from rfprune.stages.passes import Pass

Importance = tuple[Tensor, ...]
"""One float64 vector (U,) on the CPU per block; not negative, larger is more important."""


def compute_importance(criterion: str, calibration: Calibration) -> Importance:
    """Importance of every unit by a classical criterion.

    Args:
        criterion: one of `rfprune.settings.CRITERIA`.
        calibration: the model and its batches; magnitudes and random numbers need no batches.

    Returns:
        A float64 vector (U,) per block.

    Raises:
        UserError: a gradient is not finite (the block is named), or labels are needed and missing.
    """
    if criterion == "fisher":
        return fisher(collect_gradients(calibration))
    sizes = [num_weights(calibration.model, block) for block in calibration.layout.blocks]
    averages = _averages_over_weights(criterion, calibration, sizes)
    return tuple(size * values for size, values in zip(sizes, averages, strict=True))


def _averages_over_weights(
    criterion: str, calibration: Calibration, sizes: Sequence[int]
) -> Importance:
    model, layout = calibration.model, calibration.layout
    if criterion == "taylor":
        importance = taylor(collect_gradients(calibration))
        return tuple(
            values / math.sqrt(size) for size, values in zip(sizes, importance, strict=True)
        )
    if criterion == "gradient":
        return gradient(collect_gradient_norms(calibration))
    if criterion == "random":
        return random(layout, calibration.seed)
    magnitude = {"magnitude-l1": magnitude_l1, "magnitude-l2": magnitude_l2}[criterion]
    found = []
    for block in layout.blocks:
        with resident(model.get_submodule(layout.layers[block.layer])):
            found.append(magnitude(unit_weights(model, block)).cpu())
    return tuple(found)


def unit_weights(model: nn.Module, block: Block) -> Tensor:
    """All weights of each unit, (U, n): rows in the producers and columns in the consumer."""
    units, columns = block.num_units, weight_of(linear(model, block.consumer)).T
    weights = [columns.reshape(units, -1)]
    for producer in block.producers:
        rows = weight_of(linear(model, producer.path))
        parts = rows.split([units * width for width in producer.widths])
        weights += [part.reshape(units, -1) for part in parts]
    return torch.cat(weights, dim=1).detach()


def num_weights(model: nn.Module, block: Block) -> int:
    """Number of weights of one unit, the n of `unit_weights`."""
    paths = (*(producer.path for producer in block.producers), block.consumer)
    return sum(int(linear(model, path).weight.numel()) for path in paths) // block.num_units


def magnitude_l1(weights: Tensor) -> Tensor:
    """Mean absolute weight of each unit, (U, n) -> (U,): its L1 norm divided by n.

    Li et al. 2017, "Pruning Filters for Efficient ConvNets" (arXiv 1608.08710).
    """
    return to_float64(weights).abs().mean(1)


def magnitude_l2(weights: Tensor) -> Tensor:
    """Root mean square weight of each unit, (U, n) -> (U,): its L2 norm divided by √n.

    Han et al. 2015, "Learning both Weights and Connections" (arXiv 1506.02626), for whole units.
    """
    return to_float64(weights).square().mean(1).sqrt()


def gradient(norms: Gradients) -> Importance:
    """Mean gradient norm of each unit's weights, (n, U) -> (U,) per block.

    The mean is over examples and objective values; see `collect_gradient_norms`. The weights
    themselves have no part in it.
    """
    return tuple(to_float64(norm).mean(0) for norm in norms)


def taylor(gradients: Gradients) -> Importance:
    """Mean absolute mask gradient, (n, U) -> (U,) per block.

    The mask gradient of a unit is activation times gradient, summed over the unit's outputs: the
    first-order change of the loss when the unit is removed. Molchanov et al. 2017 (arXiv
    1611.06440) and 2019 (arXiv 1906.10771); for heads Michel et al. 2019 (arXiv 1905.10650). The
    absolute value is taken for each example.
    """
    return tuple(to_float64(gradient).abs().mean(0) for gradient in gradients)


def fisher(gradients: Gradients) -> Importance:
    """Mean squared mask gradient, (n, U) -> (U,) per block: the diagonal of the Fisher information.

    The second-order change of the loss, as in Optimal Brain Damage (LeCun et al. 1989). It is the
    first stage of Kwon et al. 2022 (arXiv 2204.09656, section 4.1).
    """
    return tuple(to_float64(gradient).square().mean(0) for gradient in gradients)


def random(layout: Layout, seed: int) -> Importance:
    """Uniform random numbers in [0, 1), (U,) per block: the lower bound for every criterion."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.rand(block.num_units, dtype=torch.float64, generator=generator)
        for block in layout.blocks
    )


def collect_gradient_norms(calibration: Calibration) -> Gradients:
    """Root mean square loss gradient of each unit's weights in the consumer, for each example.

    The weight gradient of an example is gᵀ·x, with inputs x (S, p) of the consumer and gradients g
    (S, d) at its outputs. It is never computed: the squared norm of its column for feature x_u is
    x_uᵀ·(g·gᵀ)·x_u.

    Args:
        calibration: the model and its batches.

    Returns:
        A float32 matrix (n, U) on the CPU for every block, one row per example and objective value.

    Raises:
        UserError: a gradient is not finite (the block is named), or labels are needed and missing.
    """
    layout = calibration.layout
    own: list[dict[int, Tensor]] = [{} for _ in layout.blocks]
    with passes(calibration, "weight gradients") as found:
        for one in found:
            for i in one.own_batches:
                for number, norms in zip(one.blocks, _norms(calibration, one, i), strict=True):
                    own[number][i] = norms
    collected = tuple(torch.cat(distributed.all_gather(by_batch)) for by_batch in own)
    for block, norms in zip(layout.blocks, collected, strict=True):
        require_finite(block, "weight gradients", norms)
    return collected


def _append_input(runs: list[Tensor], inputs: Tensor, _: Tensor) -> None:
    runs.append(inputs)


def _norms(calibration: Calibration, one: Pass, number: int) -> list[Tensor]:
    """Norms (examples and objective values, U) on a batch, for the blocks of a pass."""
    layout, batch = calibration.layout, calibration.batches[number]
    blocks = [layout.blocks[i] for i in one.blocks]
    inputs: list[list[Tensor]] = [[] for _ in blocks]
    rows: list[list[Tensor]] = [[] for _ in blocks]
    watch = LinearOutputs(
        calibration.model,
        [block.consumer for block in blocks],
        [partial(_append_input, runs) for runs in inputs],
    )
    for gradients in one.gradients(number, watch):
        by_block = watch.by_map(gradients)
        for block, block_rows, xs, gs in zip(blocks, rows, inputs, by_block, strict=True):
            tokens = block_token_mask(layout, block, batch)
            # The gradient of a weight is a sum over tokens and over the runs of its block.
            x = torch.cat([x.float().reshape(*tokens.shape, -1) for x in xs], 1)
            g = torch.cat([g.float().reshape(*tokens.shape, -1) * tokens[..., None] for g in gs], 1)
            squares = (x * ((g @ g.transpose(1, 2)) @ x)).sum(1)  # (B, p), one per column
            norms = squares.unflatten(1, (block.num_units, -1)).sum(-1).clamp_min(0).sqrt()
            size = block.unit_width * g.shape[-1]
            block_rows.append((norms / math.sqrt(size)).cpu())
    return [torch.cat(block_rows) for block_rows in rows]
