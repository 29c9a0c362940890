"""What the variations of `scripts/variations.py` take and give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from rfprune.cost.constraint import CostModel
from rfprune.cost.macs import mac_costs
from rfprune.model.layout import Layout, layout_of
from rfprune.model.replay import Batch, token_mask
from rfprune.stages.curvature import Curvature, collect_curvature, error_curves
from rfprune.stages.obs import Curve
from scripts.variation_selection import summed_and_weighted


@dataclass(frozen=True)
class Study:
    """A frozen model, its label-free calibration batches, and what is collected from them once."""

    model: PreTrainedModel
    batches: Sequence[Batch]
    seed: int
    cache: dict[float, PreTrainedModel] = field(default_factory=dict)

    @cached_property
    def layout(self) -> Layout:
        return layout_of(self.model)

    @cached_property
    def mean_tokens(self) -> float:
        masks = [token_mask(batch) for batch in self.batches]
        return float(sum(int(mask.sum()) for mask in masks) / sum(len(mask) for mask in masks))

    @cached_property
    def costs(self) -> CostModel:
        return mac_costs(self.layout, self.mean_tokens)

    @cached_property
    def collected(self) -> tuple[Curvature, ...]:
        return collect_curvature(self.model, self.layout, self.batches, seed=self.seed)

    @cached_property
    def variants(self) -> tuple[tuple[Curvature, ...], tuple[Curvature, ...]]:
        return summed_and_weighted(self.model, self.layout, self.batches, self.seed)

    @cached_property
    def curves(self) -> tuple[Curve, ...]:
        return error_curves(self.model, self.layout, self.collected)

    def every(self, first: int, parts: int) -> Sequence[Batch]:
        """Every `parts`-th batch from `first` on: batches are sorted by length, slices alike."""
        return self.batches[first::parts] or self.batches

    def held_out(self) -> tuple[list[Batch], Sequence[Batch]]:
        """Three quarters of the batches to fit on, and the rest to judge by."""
        rest = [batch for i, batch in enumerate(self.batches) if i % 4 != 3]
        return rest, self.every(3, 4)


@dataclass(frozen=True)
class Outcome:
    """A pruned model, the units that it keeps, and what else a line of the results should say.

    `saved_macs`: what it computes less than `kept` alone would say.
    """

    model: PreTrainedModel
    kept: tuple[int, ...]
    details: Mapping[str, Any] = field(default_factory=dict)
    saved_macs: float = 0.0

    def achieved(self, study: Study) -> float:
        """The fraction of the MACs that is left."""
        return (study.costs.total(self.kept) - self.saved_macs) / study.costs.original
