"""How many layers go whole, and which, before the widths of the others are chosen.

    distances   hidden states before and after every run of layers, in one forward pass
    candidates  sets of layers, ranked by the true divergence of the model without them
    finalists   a few of them, with the widths that the rest of the budget leaves; each is built
                and fitted on a part of the calibration batches
    choice      the finalist of the least divergence on held-out batches

`rfprune.stages.depth` has the mathematics. The divergence before a fit ranks sets of equal size
well, but not layers against widths: the fit repairs more of what the removal of layers breaks.

With `--method importance` the layers are those of the least block influence, the classical
criterion for layers (Men et al. 2024, ShortGPT, arXiv 2403.03853).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from rfprune import distributed
from rfprune.cost.constraint import Constraint, CostModel
from rfprune.errors import UserError
from rfprune.methods.budget import layers_to_choose_from, width_limits
from rfprune.methods.problem import Problem
from rfprune.methods.statistics import Statistics
from rfprune.model.batch import Batch, first_examples
from rfprune.model.compact import compact
from rfprune.model.depth import max_surplus_of_encoder, remove_layers
from rfprune.model.frozen import frozen
from rfprune.model.masks import Masks, full_masks, num_kept
from rfprune.stages.depth import (
    StackOfLayers,
    by_block_influence,
    mean_divergences,
    propose,
    state_distances,
)
from rfprune.stages.reconstruct import HELD_OUT_EVERY

NUM_FINALISTS = 3
"""How many sets of layers of equal size are fitted."""

SHARES = (0.0, 1 / 3, 2 / 3, 1.0)
"""For layers and widths together: the candidates' numbers of layers, as fractions of the number
that would meet the constraint without any change of widths."""

FIT_EVERY = 3
"""One of this many batches is used to fit the finalists."""

CANDIDATE_TOKENS = 2048
"""Tokens that the divergences of candidates are measured on, at most."""

MAX_TOKENS = 8192
"""Tokens that the finalists are fitted to, and that their divergences and the hidden states are
compared on, at most: with many calibration examples the search takes a small part of the time."""

_MODELS_AT_A_TIME = 8


@dataclass(frozen=True)
class Selection:
    """What is kept of a model.

    Attributes:
        masks: of its units; zeros in the layers that are removed.
        removed: indices of the layers that are removed whole.
    """

    masks: Masks
    removed: tuple[int, ...] = ()


@dataclass(frozen=True)
class DepthSearch:
    """The search for one constraint.

    Attributes:
        problem: of the model.
        statistics: of the model.
        stacks: of its layers, from `compare_layers`.
    """

    problem: Problem
    statistics: Statistics
    stacks: Sequence[StackOfLayers]

    def choose(self, constraint: Constraint, costs: CostModel, budget: float) -> Selection:
        """Layers and widths within a budget.

        Args:
            constraint: that the student is fitted for.
            costs: of the blocks of the model.
            budget: for all blocks together, without `costs.constant`.

        Raises:
            UserError: no candidate fits the budget.
        """
        if self.problem.settings.depth == "off":
            return Selection(self.statistics.choose_units(self.problem, costs, budget))
        finalists = self._finalists(costs, budget)
        if len(finalists) == 1:
            return finalists[0]
        with self.problem.timer.stage("depth"):
            found = [self._divergence_when_fitted(each, constraint) for each in finalists]
            return finalists[distributed.broadcast_from_main(lambda: int(np.argmin(found)))]

    def _finalists(self, costs: CostModel, budget: float) -> list[Selection]:
        """The selections that are fitted before one is chosen."""
        settings = self.problem.settings
        if settings.depth == "layers" and not settings.uniform:
            sets = self._least_divergent(self._sets_within(costs, budget), NUM_FINALISTS)
            return [Selection(self._masks_without(removed), removed) for removed in sets]
        if settings.depth.isdigit():
            sets = self._least_divergent(self._sets(int(settings.depth)), NUM_FINALISTS)
        else:
            sets = self._sets_of_several_sizes(costs, budget)
        found: list[Selection] = []
        failures: list[UserError] = []
        for removed in sets:
            try:
                found.append(self._with_widths(removed, costs, budget))
            except UserError as error:  # what the layers leave of the budget is too small
                failures.append(error)
        if not found:
            raise failures[0]
        return found

    def _sets_of_several_sizes(self, costs: CostModel, budget: float) -> list[tuple[int, ...]]:
        """The best set of each of the sizes that `SHARES` names."""
        try:
            enough = self._sets_within(costs, budget)
        except UserError:
            most = sum(stack.max_removed for stack in self.stacks)
            enough = next(filter(None, map(self._sets, range(most, -1, -1))))
        most = len(enough[0])
        numbers = sorted({round(share * most) for share in SHARES} - {most})
        candidates = [*(self._sets(number) for number in numbers), enough]
        return [best for sets in candidates for best in self._least_divergent(sets, 1)]

    def _sets(self, number: int) -> list[tuple[int, ...]]:
        """Sets of layers of a size, the most promising first."""
        stack = self.stacks[0]
        if self.problem.settings.method == "importance" and len(self.stacks) == 1:
            fits = number <= stack.max_removed
            return [by_block_influence(stack, number)] if fits else []
        surplus = max_surplus_of_encoder(self.problem.model, self.problem.layout)
        return propose(self.stacks, number, surplus)

    def _sets_within(self, costs: CostModel, budget: float) -> list[tuple[int, ...]]:
        """The smallest sets without which the model is within the budget.

        Raises:
            UserError: there are none.
        """
        allowed = (costs.constant + budget) * (1 + 1e-12)
        for number in range(1, len(self.problem.layout.layers)):
            found = [
                removed
                for removed in self._sets(number)
                if costs.total(num_kept(self._masks_without(removed)), removed) <= allowed
            ]
            if found:
                return found
        raise UserError(
            f"the constraint on {costs.metric} cannot be met by removing whole layers alone: one "
            "must stay; choose a larger one, or remove units as well (--depth joint, depth='joint')"
        )

    def _masks_without(self, removed: Sequence[int]) -> Masks:
        blocks, masks = self.problem.layout.blocks, full_masks(self.problem.layout)
        return tuple(
            torch.zeros_like(mask) if block.layer in removed else mask
            for block, mask in zip(blocks, masks, strict=True)
        )

    def _with_widths(self, removed: tuple[int, ...], costs: CostModel, budget: float) -> Selection:
        """The widths that the rest of a budget allows for the layers that stay."""
        problem, costs = self.problem, width_limits(self.problem, costs)
        if not removed:
            return Selection(self.statistics.choose_units(problem, costs, budget))
        short = problem.with_model(remove_layers(problem.model, problem.layout, removed))
        blocks = problem.layout.blocks
        there = [b for b, block in enumerate(blocks) if block.layer not in removed]
        fewer = costs.without_layers(removed)
        own = fewer.select_blocks(there, [blocks[b].num_units for b in there])
        left = budget + costs.constant - fewer.constant
        chosen = self.statistics.of_blocks(there).choose_units(short, own, left)
        masks = list(self._masks_without(removed))
        for b, mask in zip(there, chosen, strict=True):
            masks[b] = mask
        return Selection(tuple(masks), removed)

    def _least_divergent(self, sets: list[tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
        """The sets without which the model's predictions change least, before any fit."""
        if len(sets) <= count:
            return sets
        problem = self.problem
        batches = first_examples(self._held_out, CANDIDATE_TOKENS)
        with problem.timer.stage("depth"), frozen(problem.model):
            found: list[float] = []
            for start in range(0, len(sets), _MODELS_AT_A_TIME):
                students = [
                    remove_layers(problem.model, problem.layout, removed)
                    for removed in sets[start : start + _MODELS_AT_A_TIME]
                ]
                found += mean_divergences(problem.model, students, batches, problem.loss)
        order = distributed.broadcast_from_main(lambda: np.argsort(found, kind="stable").tolist())
        return [sets[i] for i in order[:count]]

    def _divergence_when_fitted(self, selection: Selection, constraint: Constraint) -> float:
        """The divergence of a finalist on held-out batches, after a fit on some of the others."""
        problem = self.problem
        student = compact(problem.model, problem.layout, selection.masks, selection.removed)
        with frozen(problem.model), frozen(student):
            if problem.settings.tune:
                few = replace(problem, batches=self._fitted_on, progress=False)
                self.statistics.fit(few, student, constraint, selection.removed)
            held_out = self._held_out
            return mean_divergences(problem.model, [student], held_out, problem.loss)[0]

    @property
    def _held_out(self) -> list[Batch]:
        """The batches that divergences are measured on; no finalist is fitted to them."""
        return held_out_batches(self.problem.batches)

    @property
    def _fitted_on(self) -> list[Batch]:
        """Some of the other batches, in at least `HELD_OUT_EVERY` parts, since the fit holds some
        out itself, and in one for each process."""
        batches = self.problem.batches
        others = [
            batch
            for number, batch in enumerate(batches)
            if number % HELD_OUT_EVERY != HELD_OUT_EVERY - 1 and number < len(batches) - 1
        ]
        few = first_examples((others or list(batches))[::FIT_EVERY], MAX_TOKENS)
        processes = distributed.world_size()
        parts = -(-max(HELD_OUT_EVERY, processes) // len(few))
        found = [part for batch in few for part in _split(batch, parts)]
        if len(found) >= processes:
            return found
        enough = others if len(others) >= processes else batches
        return [first_examples([batch], 0)[0] for batch in enough[:processes]]


def compare_layers(problem: Problem, statistics: Statistics) -> list[StackOfLayers]:
    """The hidden states before and after all runs of layers, for every constraint.

    Raises:
        UserError: the model cannot lose a layer.
    """
    model, layout = problem.model, problem.layout
    allowed = layers_to_choose_from(problem)
    with problem.timer.stage("depth"), frozen(model):
        distances = distributed.broadcast_from_main(
            lambda: state_distances(model, layout, held_out_batches(problem.batches))
        )
    errors = None
    if statistics.curves is not None:
        errors = np.zeros(len(layout.layers))
        for block, curve in zip(layout.blocks, statistics.curves, strict=True):
            errors[block.layer] += float(curve.errors[0])
    return [
        StackOfLayers(
            tuple(layer - indices.start for layer in allowed if layer in indices),
            distance,
            None if errors is None else errors[indices.start : indices.stop],
        )
        for indices, distance in zip(layout.stacks(), distances, strict=True)
    ]


def held_out_batches(batches: Sequence[Batch]) -> list[Batch]:
    """Every `HELD_OUT_EVERY`-th batch, up to `MAX_TOKENS` tokens; the last one if there are few."""
    return first_examples(batches[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or batches[-1:], MAX_TOKENS)


def _split(batch: Batch, parts: int) -> list[Batch]:
    """A batch in parts of about equally many examples."""
    rows = min(len(value) for value in batch.values())
    pieces = {name: value.tensor_split(min(parts, rows)) for name, value in batch.items()}
    return [dict(zip(pieces, piece, strict=True)) for piece in zip(*pieces.values(), strict=True)]
