"""A peer in the place of one of the package's methods; see `rfprune.methods.statistics`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from rfprune.cost.constraint import Constraint, CostModel
from rfprune.cost.sizes import Sizes
from rfprune.errors import UserError
from rfprune.methods import kwon
from rfprune.methods.curvature import refit_weights
from rfprune.methods.problem import Problem
from rfprune.methods.statistics import Statistics
from rfprune.model.masks import Masks
from rfprune.settings import Settings
from scripts.bench.models import settings_of
from scripts.bench.peers import flap, kprune, wanda_sp
from scripts.bench.peers.choice import Choice
from scripts.bench.peers.kwon_lsmr import solve_by_lsmr

PEERS: Mapping[str, Callable[[Problem], Callable[[CostModel, float], Choice]]] = {
    "wanda-sp": wanda_sp.prepare,
    "flap": flap.prepare,
    "kprune": kprune.prepare,
}
"""From a problem to a function of costs and a budget (without `CostModel.constant`), by peer."""


Variant = Mapping[str, Any]
"""Arguments of `rfprune.Settings`, and those of `NOT_SETTINGS`."""

NOT_SETTINGS = ("peer", "refitted", "lsmr")
"""One of `PEERS`; whether the package's fit replaces the peer's; whether the solver of Kwon et al.
replaces the package's closed form."""


def settings_of_variant(variant: Variant, seed: int) -> Settings:
    """Settings of a variant; those under which a peer takes the place of the package's method."""
    own = {name: value for name, value in variant.items() if name not in NOT_SETTINGS}
    return settings_of(**({"method": "importance"} if "peer" in variant else {}), **own, seed=seed)


def collector(variant: Variant) -> Callable[[Problem], Statistics] | None:
    """What collects the statistics of a variant, for `rfprune.pruning.prune_to_each`; None for the
    package's own methods."""
    if variant.get("lsmr"):
        return lambda problem: replace(kwon.collect(problem), solver=solve_by_lsmr)
    if "peer" not in variant:
        return None
    prepare = PEERS[variant["peer"]]
    return lambda problem: PeerStatistics(prepare(problem), variant.get("refitted", False))


@dataclass
class PeerStatistics:
    """The interface of a method, around a peer.

    Attributes:
        choose: of the peer.
        refitted: see `collector`.
        choice: the last one; its changes are applied to the student that is fitted next.
    """

    choose: Callable[[CostModel, float], Choice]
    refitted: bool
    importance: tuple[Tensor, ...] | None = None
    curves: None = None
    choice: Choice | None = field(default=None, init=False)

    def choose_units(self, problem: Problem, costs: CostModel, budget: float) -> Masks:
        """The units that the peer keeps."""
        with problem.timer.stage("search"):
            self.choice = self.choose(costs, budget)
        return self.choice.masks

    def of_blocks(self, blocks: Sequence[int]) -> Statistics:
        """Not possible."""
        raise UserError(f"peers remove no whole layers, but {len(blocks)} blocks are asked for")

    def fit(
        self,
        problem: Problem,
        student: PreTrainedModel,
        _: Constraint | Sizes,
        removed: Collection[int] = (),
    ) -> tuple[dict[str, Tensor], list[str]]:
        """The peer's own changes, or the package's fit."""
        if self.refitted:
            return {}, refit_weights(problem, student, removed)
        assert self.choice is not None, "units are chosen before they are removed"
        return {}, list(self.choice.recover(student))
