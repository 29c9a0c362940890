"""What a report shows beside its totals: sizes before, error curves, and scores on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rfprune.model.compact import compact
from rfprune.model.layout import Layout
from rfprune.model.masks import masked, num_kept
from rfprune.result import PruneResult, kind_of_units, units_of_layers
from rfprune.tasks.evaluation import Evaluation, EvaluationSet, divergence, evaluate_model

MOST_POINTS = 64
"""Points of a curve that are written down; a picture shows no more."""


def original_layers(layout: Layout) -> list[dict[str, int]]:
    """Heads and neurons of every layer before the pruning."""
    return units_of_layers(layout, [block.num_units for block in layout.blocks])


def curve_points(result: PruneResult) -> list[dict[str, Any]]:
    """Per block its error curve, thinned out, and the number of units that it keeps.

    Where a method has the importance of single units, the error of keeping n is what all but the n
    most important ones are worth. Errors are in the method's own unit.
    """
    curves = []
    for index, (block, kept) in enumerate(
        zip(result.layout.blocks, num_kept(result.masks), strict=True)
    ):
        errors = _errors(result, index)
        if errors is None:
            return []
        units = _thinned(len(errors) - 1, kept)
        curves.append(
            {
                "kind": kind_of_units(block),
                "layer": block.layer,
                "units": units,
                "errors": [float(f"{float(errors[n]):.6g}") for n in units],
                "kept": kept,
            }
        )
    return curves


def _errors(result: PruneResult, index: int) -> Tensor | None:
    """(U + 1,): the error of keeping n units of a block."""
    if result.curves is not None:
        return result.curves[index].errors
    if result.importance is None:
        return None
    lost = result.importance[index].cpu().double().sort().values.cumsum(0)
    return torch.cat([lost.new_zeros(1), lost]).flip(0)


def _thinned(total: int, kept: int) -> list[int]:
    """At most MOST_POINTS numbers of units, evenly from none to all; `kept` is one of them."""
    steps = min(total, MOST_POINTS - 2)
    even = {round(step * total / steps) for step in range(steps + 1)} if steps else {0}
    return sorted(even | {kept})


def stage_scores(
    model: Any,
    result: PruneResult,
    evaluation_set: EvaluationSet,
    original: Evaluation,
    pruned: Evaluation,
    *,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Score and divergence of the original, of what was selected, and of what that was fitted to.

    Args:
        model: that was pruned; it is run once more, with everything masked that was removed.
    """
    chosen = tuple((mask != 0).to(mask.dtype) for mask in result.masks)
    if original.kind == "language-modeling":  # both at once, so that one cannot be the other
        alone = compact(model, result.layout, chosen)
        selected = evaluate_model(alone, evaluation_set, reference=model, progress=progress)
    else:
        with masked(model, result.layout, chosen):
            selected = evaluate_model(model, evaluation_set, progress=progress)
    stages = {"original": original, "selected": selected, "fitted": pruned}
    return [
        {"stage": name, "score": scored.score, "divergence": divergence(original, scored)}
        for name, scored in stages.items()
    ]
