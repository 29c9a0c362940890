"""Zeros within the layers of a model: `--sparsity`, alone or after the removal of units.

allocate  with scope "global" first: error curves of all maps on the inputs of the dense model, and
          from them the density of every map, see `rfprune.stages.densities`
collect   moments of the inputs of every linear map, bottom up, so that each map is chosen and
          adjusted on inputs that the zeros below it have changed
align     with criterion "obs": each map is first multiplied by the regression of its inputs in the
          dense model on its present ones, which corrects the errors of the maps below it, see
          `rfprune.stages.align`; held-out tokens accept it
choose    the weights that stay, see `rfprune.stages.sparsify`

Embeddings, norms, poolers and the heads of tasks keep all weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from rfprune.cost.sparsity import MapSparsity
from rfprune.methods.problem import Problem
from rfprune.model.compact import unpruned_copy
from rfprune.model.layout import Layout, layout_of
from rfprune.model.linear import linear, weight_of
from rfprune.model.residency import is_offloaded, resident
from rfprune.stages.align import apply_regression_map, fit_regression_map
from rfprune.stages.curvature import depth_weight
from rfprune.stages.densities import allocate_weights, error_curve, output_importance
from rfprune.stages.least_squares import Moments, NumericalFailure
from rfprune.stages.map_inputs import maps_of_layers, visit_maps
from rfprune.stages.sparsify import Pattern, mean_square_change, sparsify


def add_zeros(
    problem: Problem, student: PreTrainedModel
) -> tuple[tuple[MapSparsity, ...], list[str]]:
    """Set weights of a model to zero, in place, as the settings say.

    Args:
        problem: of the original model; `settings.sparsity` is not None.
        student: the original's copy or a pruned model, frozen.

    Returns:
        The zeros of each linear map within the layers, and a warning for each map that failed.
    """
    settings, layout = problem.settings, layout_of(student)
    layers = maps_of_layers(student, layout)
    pattern = Pattern.of(str(settings.sparsity))
    patterns = dict.fromkeys(layers, pattern)
    if settings.sparsity_scope == "global":
        patterns = _allocated(problem.with_model(student), layers, pattern)
    found: dict[str, MapSparsity] = {}
    warnings = []

    # Offloaded models have no memory for a second one.
    corrects = settings.sparsity_criterion == "obs" and not layout.execution_order
    corrects = corrects and not is_offloaded(student)

    def visit(layer: int, paths: Sequence[str], train: Moments, held_out: Moments) -> None:
        inputs = train + held_out
        align = _aligner(train, held_out) if corrects else None
        for path in paths:
            module, error = linear(student, path), 0.0
            with resident(module, write_back=True):
                try:
                    if align is not None:
                        align(module)
                except NumericalFailure as failure:
                    warnings.append(f"'{path}' was not aligned before it got zeros: {failure}")
                try:
                    error = _sparsify(module, inputs, patterns[path], settings.sparsity_criterion)
                except NumericalFailure as failure:
                    warnings.append(f"'{path}' was left without zeros: {failure}")
                weight = weight_of(module)
                nonzeros = int(weight.count_nonzero())
                found[path] = MapSparsity(path, layer, weight.numel(), nonzeros, error)

    reference = unpruned_copy(student) if corrects else None
    visit_maps(
        student, layout, problem.inputs, visit, reference=reference, progress=problem.progress
    )
    return tuple(found[path] for path in layers if path in found), warnings


def _aligner(train: Moments, held_out: Moments) -> Callable[[Any], None]:
    """A function that multiplies maps of the same inputs, in place, by the regression of their
    dense inputs on their present ones. The regression is computed once."""
    regression = cache(partial(_regression_map, train, held_out))

    def align(module: Any) -> None:
        weight, bias = weight_of(module), module.bias
        new_weight, new_bias = apply_regression_map(weight, bias, *regression(bias is not None))
        weight.copy_(new_weight)
        if bias is not None and new_bias is not None:
            bias.copy_(new_bias)

    return align


def _regression_map(
    train: Moments, held_out: Moments, intercept: bool
) -> tuple[Tensor, Tensor | None]:
    return fit_regression_map(train, held_out, intercept=intercept)


def _sparsify(module: Any, inputs: Moments, pattern: Pattern, criterion: str) -> float:
    """Set weights of a linear map to zero, in place; returns the error as a fraction of the mean
    square of its outputs."""
    weight, bias = weight_of(module), module.bias
    energy = float(mean_square_change(weight, bias, inputs).sum())
    sparse = sparsify(weight, bias, inputs, pattern, criterion)
    weight.copy_(sparse.weight)
    if bias is not None and sparse.bias is not None:
        bias.copy_(sparse.bias)
    return float(sparse.errors.sum()) / energy if energy else 0.0


def _allocated(problem: Problem, layers: Mapping[str, int], pattern: Pattern) -> dict[str, Pattern]:
    """The pattern of every map, with densities allocated by error curves."""
    model, layout, paths = problem.model, problem.layout, list(layers)
    importance = dict(zip(paths, output_importance(problem.calibration, paths), strict=True))
    criterion = problem.settings.sparsity_criterion
    curves = {}

    def visit(layer: int, group: Sequence[str], train: Moments, held_out: Moments) -> None:
        inputs = train + held_out
        for path in group:
            module = linear(model, path)
            outputs = _layer_weight(layout, layer) * importance[path].to(inputs.gram.device)
            with resident(module):
                weight = weight_of(module)
                curves[path] = error_curve(weight, module.bias, inputs, criterion, outputs)

    visit_maps(model, layout, problem.inputs, visit, progress=problem.progress)
    sizes = [weight_of(linear(model, path)).numel() for path in paths]
    budget = round(pattern.density * sum(sizes))
    kept = allocate_weights([curves[path] for path in paths], sizes, budget)
    return {path: Pattern(n / size) for path, n, size in zip(paths, kept, sizes, strict=True)}


def _layer_weight(layout: Layout, layer: int) -> float:
    """The weight of errors in a layer."""
    return next((depth_weight(block, layout) for block in layout.blocks_of_layer(layer)), 1.0)
