"""What goes into `prune()` besides model and data, and what comes out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from rfprune.cost.constraint import Constraint
from rfprune.cost.rounding import MULTIPLES
from rfprune.errors import UserError
from rfprune.latency.promise import Promise
from rfprune.model.layout import Block, Layout
from rfprune.model.masks import Masks
from rfprune.stages.importance import CRITERIA
from rfprune.stages.optimal_brain_surgeon import ErrorCurve

CHOICES = {
    "method": ("curvature", "kwon", "importance"),
    "importance": CRITERIA,
    "allocation": ("global", "uniform"),
    "gradients": ("per-example", "per-batch"),
    "teacher": ("dense", "scheduled"),
}
"""What the settings of the same names may be; the first is the default."""


@dataclass(frozen=True)
class Settings:
    """How to prune.

    Attributes:
        method: "curvature", or "kwon", the published method that it goes past, or "importance":
            a classical criterion for the selection, and the refit of "curvature".
        importance: the criterion of method "importance"; see `rfprune.stages.importance`.
        allocation: of method "importance": "global", the most important units for the budget
            wherever they are, or "uniform", the same fraction of every sublayer.
        use_labels: importance from the loss on labels, as the authors' code; else label-free.
        gradients: "per-example", or "per-batch" as the authors' code.
        rearrange: refine the searched masks with the block Fisher information.
        tune: fit what is left to the teacher by least squares.
        teacher: "dense" (the model as it is, which measures better), or "scheduled" (masked at the
            square root of the constraint, as the authors' code).
        uniform: the same number of heads and of neurons in every layer, chosen for the least error,
            so that the result is a plain architecture (see `rfprune.model.plain`) without code of
            its own. (`allocation="uniform"` is a classical baseline: the same fraction of both.)
        round_to: keep neurons in multiples of 8, 16, 32 or 64 (or none, or all); None: any number.
        rounds: prune in so many steps; after each, what is left is fitted and looked at afresh.
        seed: of the labels that are sampled where the exact Fisher is too costly.

    Raises:
        UserError: an unknown choice, one that belongs to another method, or fewer than one round.
    """

    method: str = CHOICES["method"][0]
    importance: str = CHOICES["importance"][0]
    allocation: str = CHOICES["allocation"][0]
    use_labels: bool = False
    gradients: str = CHOICES["gradients"][0]
    rearrange: bool = True
    tune: bool = True
    teacher: str = CHOICES["teacher"][0]
    uniform: bool = False
    round_to: int | None = None
    rounds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"{name} '{value}' is unknown; choose one of {', '.join(known)}")
        for name in ("importance", "allocation"):
            value = getattr(self, name)
            if self.method != "importance" and value != CHOICES[name][0]:
                raise UserError(
                    f"{name} '{value}' belongs to the method importance and does nothing for "
                    f"{self.method}; leave it out, or choose method='importance'"
                )
        if self.uniform and self.allocation == "uniform":
            raise UserError(
                "allocation 'uniform' keeps the same fraction everywhere, and uniform=True chooses "
                "sizes itself; leave one of them out"
            )
        if self.round_to is not None and self.round_to not in MULTIPLES:
            raise UserError(
                f"round_to {self.round_to} is not possible; choose one of "
                f"{', '.join(str(multiple) for multiple in MULTIPLES)}, or None"
            )
        if self.rounds < 1:
            raise UserError(f"rounds {self.rounds} is not possible; choose 1 or more")


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
    promise: Promise | None = None


def kind_of_units(block: Block) -> str:
    """What a block has many of: "heads", "cross_heads" (which read an encoder) or "neurons"."""
    return block.name.rpartition(".")[2]


def units_of_layers(layout: Layout, counts: Sequence[int]) -> list[dict[str, int]]:
    """Units of every kind in every layer; `counts`: one per block of `layout`.

    What was emptied by an earlier pruning has none.
    """
    decoder = range(0) if layout.decoder is None else layout.stack(decoder=True)
    layers = [
        {"heads": 0, **({"cross_heads": 0} if place in decoder else {}), "neurons": 0}
        for place in range(len(layout.layers))
    ]
    for block, count in zip(layout.blocks, counts, strict=True):
        layers[block.layer][kind_of_units(block)] = count
    return layers


@dataclass
class Clock:
    """Seconds by stage, and the stages that were not computed, since a cache had them."""

    seconds: dict[str, float] = field(default_factory=dict)
    cached: set[str] = field(default_factory=set)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def fork(self) -> Clock:
        """A clock that goes on from what this one has."""
        return Clock(dict(self.seconds), set(self.cached))

    def report(self) -> dict[str, float]:
        """Seconds by stage and their sum as "prune_total"."""
        return {**self.seconds, "prune_total": sum(self.seconds.values())}
