"""The default method: error curves with correlations between units, and their exact allocation.

    collect   second moments of the inputs and of the output gradients of every consumer, in one
              forward and backward pass: a Kronecker approximation of its Fisher information
    order     greedy Optimal Brain Surgeon removes the units of a block one after the other; the
              other units compensate; the sum of errors is the block's error curve
    choose    the numbers of units with the least total error within the budget, by dynamic
              programming over all blocks
    fit       every out-projection by least squares against the original, and the projections that
              read hidden states

Sources: Kurtic et al. 2023 (ZipLM, arXiv 2302.04089) and van der Ouderaa et al. 2024 (LLM Surgeon,
arXiv 2312.17244) for the error curves; the allocation and the fit are our own, see
`rfprune.stages.allocate`, `rfprune.stages.tune` and `rfprune.stages.align`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from rfprune import distributed
from rfprune.cache import Tensors
from rfprune.cost.constraint import Constraint, CostModel
from rfprune.cost.sizes import Sizes
from rfprune.methods.allocation import divide_budget
from rfprune.methods.problem import Problem
from rfprune.methods.unfinished import UnfinishedCurves
from rfprune.model.batch import first_examples
from rfprune.model.frozen import frozen
from rfprune.model.masks import Masks
from rfprune.stages.curvature import collect_curvature, error_curve
from rfprune.stages.optimal_brain_surgeon import ErrorCurve
from rfprune.stages.tune import refit
from rfprune.stages.whole_blocks import errors_without

MEASURED_TOKENS = 1024
"""Tokens on which the error without a block is measured, at most."""


@dataclass(frozen=True)
class CurvatureStatistics:
    """The removal order and the error curve of every block."""

    curves: tuple[ErrorCurve, ...]
    importance: None = None

    def choose_units(self, problem: Problem, costs: CostModel, budget: float) -> Masks:
        """The numbers of units with the least total error; within a block by removal order."""
        with problem.timer.stage("search"):
            errors = [curve.errors.numpy() for curve in self.curves]
            kept = divide_budget(problem, errors, costs, budget)
            return tuple(curve.mask(n) for curve, n in zip(self.curves, kept, strict=True))

    def of_blocks(self, blocks: Sequence[int]) -> CurvatureStatistics:
        """The same for a model that has only these blocks."""
        return replace(self, curves=tuple(self.curves[b] for b in blocks))

    def fit(
        self,
        problem: Problem,
        student: PreTrainedModel,
        _: Constraint | Sizes,
        removed: Collection[int] = (),
    ) -> tuple[dict[str, Tensor], list[str]]:
        """All weights of every out-projection; no scales of units."""
        return {}, refit_weights(problem, student, removed)


def collect(problem: Problem) -> CurvatureStatistics:
    """Error curves of all blocks. They are cached, a few kilobytes, rather than the moments that
    they are made from, which may be gigabytes."""
    tensors = problem.load_or_collect(_orders_and_errors)
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return CurvatureStatistics(tuple(ErrorCurve(order, errors) for order, errors in pairs))


def _orders_and_errors(problem: Problem) -> Tensors:
    """Removal order (U,) and errors (U + 1,) of each block, in turn."""
    curves: dict[int, Tensors] = {}
    unfinished = UnfinishedCurves.of(problem)
    collection = problem.timer.timed("collect", collect_curvature(problem.calibration))
    with frozen(problem.model), closing(collection) as collected:
        for number, factors in collected:
            with problem.timer.stage("search"):
                found = unfinished.load(number)
                if found is None:
                    block = problem.layout.blocks[number]
                    curve = error_curve(problem.model, problem.layout, block, factors)
                    found = curve.order, curve.errors
                    unfinished.keep(number, found)
                curves[number] = found
            del factors  # before the next ones are collected
    unfinished.remove(len(problem.layout.blocks))
    pairs = distributed.all_gather(curves)
    with problem.timer.stage("search"):
        for number, error in _measured_errors(problem).items():
            _, errors = pairs[number]
            errors[0] = max(float(errors[0]), error)
    return tuple(tensor for pair in pairs for tensor in pair)


def _measured_errors(problem: Problem) -> dict[int, float]:
    """The error without each attention whose output passes a norm, by number of the block.

    An FFN keeps some of its thousands of neurons; an attention may have a single unit. Constraints
    leave the attentions of families with `one_unit` whole.
    """
    model, layout = problem.model, problem.layout
    numbers = [
        number
        for number, block in enumerate(layout.blocks)
        if block.sublayer.output_norm is not None
        and block.kind == "head"
        and not block.sublayer.one_unit
    ]
    if not numbers:
        return {}
    few = first_examples(problem.calibration.batches, MEASURED_TOKENS)
    with frozen(model):
        errors = distributed.broadcast_from_main(
            lambda: errors_without(model, layout, numbers, few, problem.loss)
        )
    return dict(zip(numbers, errors, strict=True))


def refit_weights(
    problem: Problem, student: PreTrainedModel, removed: Collection[int] = ()
) -> list[str]:
    """Fit every out-projection of a pruned model to the original, in place.

    Args:
        removed: layers of the original that the student lacks.

    Returns:
        A warning for each block that could not be fitted.
    """
    return refit(
        problem.model,
        student,
        problem.layout,
        problem.inputs,
        removed=removed,
        progress=problem.progress,
    )
