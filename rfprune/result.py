"""What `prune()` returns."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from rfprune.cost.constraint import Constraint
from rfprune.latency.promise import LatencyPromise
from rfprune.model.layout import Block, Layout
from rfprune.model.masks import Masks
from rfprune.stages.optimal_brain_surgeon import ErrorCurve


@dataclass(frozen=True)
class PruneResult:
    """A pruned model and how it came to be.

    Attributes:
        model: physically smaller; saves itself with `save_pretrained`.
        masks: one (U,) per block of `layout`; zeros were removed, other values are tuned scales.
        layout: of the model that was given.
        achieved: pruned/original by metric: "mac" (Transformer layers, at the mean length),
            "params" (all), "memory" (bytes of weights), "latency" (where that was constrained).
        seconds: by stage (collect, search, rearrange, compact, verify, tune), and in all
            (prune_total).
        warnings: a sentence for whatever did not go as planned.
        layers: units of every kind kept in every layer; see `units_of_layers`.
        mean_tokens: mean length of the calibration examples, at which MACs are counted.
        importance: per block the importance (U,) of its units, where the method has one.
        curves: per block of `layout` its error curve, where the method has one.
        promise: of a constraint on latency, what was promised, predicted and measured.
        cached: stages whose outcome was on disk already; their seconds are those of reading it.
    """

    model: PreTrainedModel
    masks: Masks
    layout: Layout
    constraint: Constraint
    achieved: dict[str, float]
    seconds: dict[str, float]
    warnings: tuple[str, ...]
    layers: tuple[dict[str, int], ...]
    mean_tokens: float
    importance: tuple[Tensor, ...] | None = None
    curves: tuple[ErrorCurve, ...] | None = None
    cached: tuple[str, ...] = ()
    promise: LatencyPromise | None = None


def kind_of_units(block: Block) -> str:
    """What a block has many of: "heads", "cross_heads" (which read an encoder) or "neurons"."""
    return block.name.rpartition(".")[2]


def units_of_layers(layout: Layout, counts: Sequence[int]) -> list[dict[str, int]]:
    """Units of every kind in every layer; `counts`: one per block of `layout`.

    What was emptied by an earlier pruning has none.
    """
    decoder = layout.layer_indices(decoder=True)
    layers = [
        {"heads": 0, **({"cross_heads": 0} if place in decoder else {}), "neurons": 0}
        for place in range(len(layout.layers))
    ]
    for block, count in zip(layout.blocks, counts, strict=True):
        layers[block.layer][kind_of_units(block)] = count
    return layers


@dataclass
class StageTimer:
    """Seconds by stage, and the stages that were not computed, since a cache had them."""

    seconds: dict[str, float] = field(default_factory=dict)
    cached: set[str] = field(default_factory=set)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def fork(self) -> StageTimer:
        """A timer that goes on from what this one has."""
        return StageTimer(dict(self.seconds), set(self.cached))

    def report(self) -> dict[str, float]:
        """Seconds by stage and their sum as "prune_total"."""
        return {**self.seconds, "prune_total": sum(self.seconds.values())}
