"""Which density each linear map gets, from error curves of all of them.

The error curve of a map is its error at densities of 0, 1/K, 2/K, ... and 1. Errors are in nats, as
those of heads and neurons (see `rfprune.stages.curvature`): the mean square change of each output
is weighted by the second moment of the loss gradient at that output. Between the points of a curve
the error is interpolated, so a budget is met exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rfprune import distributed
from rfprune.stages.calibration import Calibration
from rfprune.stages.collection import passes
from rfprune.stages.float64 import to_float64
from rfprune.stages.least_squares import Moments
from rfprune.stages.output_gradients import LinearOutputs
from rfprune.stages.sparsify import Pattern, mean_square_change, sparsify

STEPS = 10
"""Steps of an error curve, K."""


def error_curve(
    weight: Tensor, bias: Tensor | None, inputs: Moments, criterion: str, importance: Tensor
) -> NDArray[np.float64]:
    """The error of a linear map by its density.

    Args:
        weight: (d, p); see `rfprune.stages.sparsify.sparsify` for the first four.
        importance: (d,), weight of the mean square change of each output.

    Returns:
        (K + 1,): the error at density 0, 1/K, ..., 1.
    """
    nothing = mean_square_change(weight, bias, inputs)
    errors = [float(nothing @ importance)]
    for step in range(1, STEPS):
        sparse = sparsify(weight, bias, inputs, Pattern(step / STEPS), criterion)
        errors.append(float(sparse.errors @ importance))
    return np.array([*errors, 0.0])


def allocate_weights(
    errors: Sequence[NDArray[np.float64]], sizes: Sequence[int], budget: int
) -> tuple[int, ...]:
    """How many weights of each map stay, for the least total error.

    Each curve is replaced by its lower convex hull, on which the best allocation takes one step
    after the other, in the order of the error that a weight of the step saves.

    Args:
        errors: per map (K + 1,), the error at density 0, 1/K, ..., 1.
        sizes: number of weights of each map.
        budget: number of weights that stay in all maps together.

    Returns:
        The number of weights that stay, per map; their sum is the budget.

    Example:
        >>> import numpy as np
        >>> steep, flat = np.array([9.0, 1.0, 0.0]), np.array([3.0, 1.0, 0.0])
        >>> allocate_weights([steep, flat], sizes=[10, 10], budget=8)
        (5, 3)
    """
    steps = []
    for number, (error, size) in enumerate(zip(errors, sizes, strict=True)):
        places = np.linspace(0, size, len(error))
        corners = _lower_hull(places, error)
        for left, right in pairwise(corners):
            width = places[right] - places[left]
            steps.append(((error[left] - error[right]) / max(width, 1e-300), number, width))
    kept, rest = np.zeros(len(sizes)), float(budget)
    for _, number, width in sorted(steps, key=lambda step: -step[0]):  # stable: in order of a map
        kept[number] += min(width, rest)
        rest -= min(width, rest)
    whole = np.floor(kept + 1e-6).astype(int)
    missing = budget - int(whole.sum())
    whole[np.argsort(whole - kept, kind="stable")[: max(0, missing)]] += 1
    return tuple(int(number) for number in whole)


def _lower_hull(places: NDArray[np.float64], values: NDArray[np.float64]) -> list[int]:
    """Indices of the corners of the lower convex hull of a curve, from left to right."""
    corners: list[int] = []
    for index in range(len(places)):
        while len(corners) > 1:
            before, last = corners[-2:]
            run, rise = places[last] - places[before], values[last] - values[before]
            if (values[index] - values[before]) * run > rise * (places[index] - places[before]):
                break
            corners.pop()
        corners.append(index)
    return corners


def output_importance(calibration: Calibration, paths: Sequence[str]) -> tuple[Tensor, ...]:
    """Half of the squared loss gradient at every output of linear maps, summed over tokens.

    A change with mean square e at an output changes the objective of an example by about e times
    the output's importance (the Fisher information, as in `rfprune.stages.curvature`).

    Args:
        calibration: the model, frozen, and its batches.
        paths: of the maps.

    Returns:
        (d,) float64 for each map, a mean over the examples.
    """
    layout, batches = calibration.layout, calibration.batches
    own: list[dict[int, list[Tensor]]] = [{} for _ in paths]
    with passes(calibration, "output gradients") as found:
        for one in found:
            inside = tuple(f"{layout.layers[layer]}." for layer in one.layers)
            numbers = [i for i, path in enumerate(paths) if path.startswith(inside)]
            for batch_number in one.own_batches:
                watch = LinearOutputs(calibration.model, [paths[i] for i in numbers])
                for gradients in one.gradients(batch_number, watch):
                    for i, runs in zip(numbers, watch.by_map(gradients), strict=True):
                        squares = own[i].setdefault(batch_number, [])
                        for gradient in runs:
                            squares.append(
                                to_float64(gradient.flatten(0, -2).float().square().sum(0))
                            )
    examples = sum(len(next(iter(batch.values()))) for batch in batches)
    ordered = (list(chain.from_iterable(distributed.all_gather(squares))) for squares in own)
    return tuple(
        sum(squares[1:], squares[0]) / (2 * examples)
        if squares
        else torch.zeros(1, dtype=torch.float64)
        for squares in ordered
    )
