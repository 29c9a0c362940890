"""Variations of `--method curvature`, a small function each; `scripts/explore.py` measures them.

A variation takes a `Study` (a model with its calibration data and all that is collected from them)
and the fraction of the MACs that may stay, and gives a pruned model. What it needs of the method is
built from the package's stages. `plain` is the recipe that the variations start from: curves, exact
allocation, least squares of the out-projections at one ridge. `product` is what `rfprune.prune`
has become since.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rfprune.cost.constraint import CostModel
from rfprune.model.compact import compact
from rfprune.model.layout import Block, unit_features
from rfprune.model.masks import Masks, frozen, num_kept
from rfprune.model.replay import Batch
from rfprune.stages.allocate import allocate
from rfprune.stages.curvature import DAMPING, Curvature, error_curves
from rfprune.stages.least_squares import Moments, solve_weights
from rfprune.stages.obs import Curve, removal_curve
from rfprune.stages.tune import refit
from scripts.variation_polish import polish
from scripts.variation_rebuilding import (
    Passed,
    added,
    divergence_of,
    features_of,
    fit_norm,
    refit_maps,
    solve_at_best,
    walk_blocks,
)
from scripts.variation_selection import (
    low_rank_scores,
    query_key_moments,
    swap_units,
)
from scripts.variation_study import Outcome, Study

RIDGE = 1e-2
"""Of `plain` and all that does not say otherwise, as a fraction of the mean diagonal."""

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""What `held-out` and the refits of the head choose from, as fractions of the mean diagonal."""

SEARCHED = 16
"""Models that `weights` prunes and compares on held-out samples, for one result."""


Variation = Callable[[Study, float], Outcome]


def select(
    study: Study,
    curves: Sequence[Curve],
    ratio: float,
    *,
    factors: Sequence[float] | None = None,
    costs: CostModel | None = None,
) -> Masks:
    """Masks of the exact allocation; `factors` weigh the blocks' curves, 1 if None."""
    costs = costs or study.costs
    factors = factors or [1.0] * len(curves)
    errors = [factor * curve.errors.numpy() for factor, curve in zip(factors, curves, strict=True)]
    kept = allocate(errors, costs, ratio * study.costs.original)
    return tuple(curve.mask(n) for curve, n in zip(curves, kept, strict=True))


def rebuilt(study: Study, masks: Masks, batches: Sequence[Batch] | None = None) -> PreTrainedModel:
    """The compact model, its out-projections refitted to the dense model at a ridge of `RIDGE`."""
    student = compact(study.model, study.layout, masks)
    _refit(study, student, [batches or study.batches], (RIDGE,))
    return student


def _refit(
    study: Study,
    student: PreTrainedModel,
    parts: Sequence[Sequence[Batch]],
    ridges: Sequence[float],
    passed: Passed | None = None,
) -> list[float | None]:
    """Refit all out-projections at the best of `ridges`, which come back block by block."""
    chosen: list[float | None] = []

    def solve(
        _: Block, parts: Sequence[Moments], weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        weight, bias, ridge = solve_at_best(parts, weight, bias, ridges)
        chosen.append(ridge)
        return weight, bias

    with frozen(study.model), frozen(student):
        walk_blocks(study.model, student, study.layout, parts, solve, passed=passed)
    return chosen


def product(study: Study, ratio: float) -> Outcome:
    """What `rfprune.prune` does by now, for comparison: exactly its model."""
    masks = select(study, study.curves, ratio)
    student = compact(study.model, study.layout, masks)
    with frozen(study.model), frozen(student):
        refit(study.model, student, study.layout, study.batches)
    return Outcome(student, num_kept(masks))


def product_and_polish(study: Study, ratio: float) -> Outcome:
    """And then norms and biases trained for a moment on the dense model's predictions; kept in any
    case, so that it shows what it does beyond the samples."""
    outcome = product(study, ratio)
    with frozen(study.model):
        held_out = polish(study.model, outcome.model, study.batches, keep_anyway=True)
    return Outcome(outcome.model, outcome.kept, {"held_out": list(held_out)})


def plain(study: Study, ratio: float) -> Outcome:
    """The recipe without any variation; some variations go on from its model."""
    masks = select(study, study.curves, ratio)
    if ratio not in study.cache:
        study.cache[ratio] = rebuilt(study, masks)
    return Outcome(copy.deepcopy(study.cache[ratio]), num_kept(masks))


def reselect(
    study: Study,
    ratio: float,
    *,
    ridges: Sequence[float] = (RIDGE,),
    swap: bool = False,
    passed: Passed | None = None,
) -> Outcome:
    """Units are selected again when a block's turn comes: by its inputs in the student, for the
    residual-corrected target. How many there are is as before; options as in other variations."""
    kept = num_kept(select(study, study.curves, ratio))
    wanted = dict(zip((block.consumer for block in study.layout.blocks), kept, strict=True))
    gradients = {
        block.consumer: moments.gradient_moment
        for block, moments in zip(study.layout.blocks, study.collected, strict=True)
    }
    found: dict[str, Tensor] = {}
    chosen: list[float | None] = []

    def solve(
        block: Block, parts: Sequence[Moments], weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        moments, of_outputs = added(parts), gradients[block.consumer]
        best, _ = solve_weights(moments, RIDGE, prior=weight)
        inputs = moments.centred()[0] / moments.count
        inputs.diagonal().add_(DAMPING * inputs.diagonal().mean())
        curve = removal_curve(inputs, best, of_outputs, block.unit_width)
        mask = curve.mask(wanted[block.consumer])
        if swap:
            mask, *_ = swap_units(inputs, best, of_outputs, mask, block.unit_width)
        found[block.consumer] = mask
        features = unit_features(torch.nonzero(mask).flatten(), block.unit_width)
        of_kept = [features_of(part, features) for part in parts]
        columns, bias, ridge = solve_at_best(of_kept, weight[:, features], bias, ridges)
        chosen.append(ridge)
        full = torch.zeros_like(weight)
        full[:, features] = columns.to(weight)
        return full, bias

    student = copy.deepcopy(study.model)
    parts = [study.batches] if len(ridges) == 1 else study.held_out()
    with frozen(study.model), frozen(student):
        walk_blocks(study.model, student, study.layout, parts, solve, passed=passed)
    masks = tuple(found[block.consumer] for block in study.layout.blocks)
    changed = [
        int((mask < curve.mask(n)).sum())
        for mask, curve, n in zip(masks, study.curves, kept, strict=True)
    ]
    details = {"changed_units": changed, "ridges": chosen}
    return Outcome(compact(student, study.layout, masks), kept, details)


def swaps(study: Study, ratio: float) -> Outcome:
    """After the greedy selection, kept and removed units change places while the exact error of
    the block falls (in the manner of OSSCAR, Meng et al. 2024)."""
    masks, fallen = [], []
    greedy = select(study, study.curves, ratio)
    for block, mask, moments in zip(study.layout.blocks, greedy, study.collected, strict=True):
        weight = study.model.get_submodule(block.consumer).weight.detach()
        better, before, after = swap_units(
            moments.input_covariance(), weight, moments.gradient_moment, mask, block.unit_width
        )
        masks.append(better)
        fallen.append(round(1 - after / before, 4) if before > 0 else 0.0)
    return Outcome(rebuilt(study, tuple(masks)), num_kept(masks), {"error_fallen_by_block": fallen})


def weights(study: Study, ratio: float) -> Outcome:
    """Weights of the blocks' curves by true divergence on held-out samples (in the manner of SPDY,
    Frantar & Alistarh 2022): first a slope over the depth and a factor for heads, then random
    steps. A model that is compared is rebuilt on a quarter of the samples and judged on half."""
    fitted, judged = study.every(0, 4), [*study.every(1, 4), *study.every(3, 4)]
    blocks, known = study.layout.blocks, dict[tuple[int, ...], float]()
    generator = torch.Generator().manual_seed(study.seed)
    depth = torch.tensor([block.layer / max(1, len(study.layout.layers) - 1) for block in blocks])
    heads = torch.tensor([float(block.kind == "head") for block in blocks])

    def masks_for(logs: Tensor) -> Masks:
        return select(study, study.curves, ratio, factors=logs.exp().tolist())

    def judge(logs: Tensor) -> float:
        masks = masks_for(logs)
        if (kept := num_kept(masks)) not in known:
            student = rebuilt(study, masks, fitted)
            known[kept] = divergence_of(study.model, student, judged)
        return known[kept]

    best = torch.zeros(len(blocks))
    least = first = judge(best)
    steps = [sign * 0.7 * way for way in (depth, heads) for sign in (1, -1)]
    steps += [2 * step for step in steps[:2]]
    for _ in range(4 * SEARCHED):  # some steps change no number of units and cost nothing
        if len(known) == SEARCHED:
            break
        step = steps.pop(0) if steps else 0.5 * torch.randn(len(blocks), generator=generator)
        if (seen := judge(best + step)) < least:
            best, least = best + step, seen
    masks = masks_for(best)
    logs = [round(value, 3) for value in best.tolist()]
    details = {"models": len(known), "held_out": [first, least], "log_weights": logs}
    return Outcome(rebuilt(study, masks), num_kept(masks), details)


def held_out(study: Study, ratio: float) -> Outcome:
    """The ridge of every block is chosen on held-out samples; a block changes only if the error on
    them falls, and is then solved on all samples."""
    return _rebuilt_at(study, ratio, RIDGES)


def ridge_of_a_tenth(study: Study, ratio: float) -> Outcome:
    """Ten times the ridge, since `held-out` chooses about that."""
    return _rebuilt_at(study, ratio, (0.1,))


def refit_norms(study: Study, ratio: float) -> Outcome:
    """Every LayerNorm behind a block gets, channel by channel, the scale and shift that fit its
    output to the dense model's, right after the block's reconstruction."""
    return _rebuilt_at(study, ratio, (RIDGE,), fit_norm)


def _rebuilt_at(
    study: Study, ratio: float, ridges: Sequence[float], passed: Passed | None = None
) -> Outcome:
    """The method, rebuilt at the best of `ridges` and told of every block that is `passed`."""
    masks = select(study, study.curves, ratio)
    student = compact(study.model, study.layout, masks)
    parts = [study.batches] if len(ridges) == 1 else study.held_out()
    chosen = _refit(study, student, parts, ridges, passed)
    return Outcome(student, num_kept(masks), {"ridges": chosen})


def summed_gradients(study: Study, ratio: float) -> Outcome:
    """G from gradients that are summed over an example's tokens before their second moment."""
    return _by(study, ratio, study.variants[0])


def weighted_inputs(study: Study, ratio: float) -> Outcome:
    """A with every token weighted by its squared gradient."""
    return _by(study, ratio, study.variants[1])


def _by(study: Study, ratio: float, collected: Sequence[Curvature]) -> Outcome:
    masks = select(study, error_curves(study.model, study.layout, collected), ratio)
    return Outcome(rebuilt(study, masks), num_kept(masks))


def refit_head(study: Study, ratio: float, *, last: int | None = None) -> Outcome:
    """After the reconstruction the linear maps behind the layers (pooler, classifier) are fitted
    to what they give in the dense model, at a ridge that held-out samples choose; only where the
    error on those falls. `last`: so many from the end alone, 1 for the classifier."""
    outcome = plain(study, ratio)
    chosen = refit_maps(study.model, outcome.model, study.layout, study.held_out(), RIDGES, last)
    return Outcome(outcome.model, outcome.kept, {"ridges": chosen})


def query_key(
    study: Study, ratio: float, *, left: float = 0.5, as_product: bool = False
) -> Outcome:
    """A part of the dimensions of queries and keys goes, what that saves is spent on other units.

    Each head's bilinear form q·k gets its best approximation of lower rank, by the second moments
    of queries and keys; the ranks are cut where that costs least over all kept heads. The savings
    are counted, not made: the form is replaced by one of lower rank, of the shape it had. With
    `as_product` the rest is rebuilt as `product` does.
    """
    size, tokens = study.layout.hidden_size, study.mean_tokens
    dimension_macs = 2 * tokens * size + tokens**2  # its rows of query and key, its part of scores
    tables = tuple(
        table - (1 - left) * block.unit_width * dimension_macs * np.arange(len(table))
        if block.kind == "head"
        else table
        for block, table in zip(study.layout.blocks, study.costs.tables, strict=True)
    )
    masks = select(study, study.curves, ratio, costs=CostModel("mac", tables))
    moments = query_key_moments(study.model, study.layout, study.batches)
    student = compact(study.model, study.layout, masks)
    removed, lost = low_rank_scores(student, study.layout, masks, moments, left)
    if as_product:
        with frozen(study.model), frozen(student):
            refit(study.model, student, study.layout, study.batches)
    else:
        _refit(study, student, [study.batches], (RIDGE,))
    details = {"removed_dimensions": removed, "lost_of_scores": lost}
    return Outcome(student, num_kept(masks), details, removed * dimension_macs)


VARIATIONS: Mapping[str, Variation] = {
    "plain": plain,
    "product": product,
    "product+polish": product_and_polish,
    "reselect": reselect,
    "swaps": swaps,
    "weights": weights,
    "held-out": held_out,
    "summed-gradients": summed_gradients,
    "weighted-inputs": weighted_inputs,
    "refit-head": refit_head,
    "refit-classifier": partial(refit_head, last=1),
    "refit-norms": refit_norms,
    "query-key": query_key,
    "query-key-0.75": partial(query_key, left=0.75),
    "query-key-0.25": partial(query_key, left=0.25),
    "product+query-key": partial(query_key, as_product=True),
    "ridge-0.1": ridge_of_a_tenth,
    "reselect+ridge-0.1": partial(reselect, ridges=(0.1,)),
    "reselect+held-out": partial(reselect, ridges=RIDGES),
    "reselect+swaps": partial(reselect, swap=True),
    "reselect+refit-norms": partial(reselect, passed=fit_norm),
    "reselect+held-out+refit-norms": partial(reselect, ridges=RIDGES, passed=fit_norm),
}
