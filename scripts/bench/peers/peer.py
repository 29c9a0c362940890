"""A peer in the place of one of the package's methods; see `rfprune.methods.statistics`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from rfprune.cost.constraint import Constraint, CostModel
from rfprune.cost.sizes import Sizes
from rfprune.errors import UserError
from rfprune.methods.curvature import refit_weights
from rfprune.methods.problem import Problem
from rfprune.methods.statistics import Statistics
from rfprune.model.masks import Masks
from scripts.bench.peers import flap, kprune, wanda_sp
from scripts.bench.peers.choice import Choice

PEERS: Mapping[str, Callable[[Problem], Callable[[CostModel, float], Choice]]] = {
    "wanda-sp": wanda_sp.prepare,
    "flap": flap.prepare,
    "kprune": kprune.prepare,
}
"""From a problem to a function of costs and a budget (without `CostModel.constant`), by peer."""


def collector(asked: Mapping[str, Any]) -> Callable[[Problem], Statistics]:
    """What collects the statistics of a peer, for `rfprune.pruning.prune_to_each`.

    Args:
        asked: `peer`, one of `PEERS`, and `refitted`: use the least-squares fit of the package
            instead of the peer's own changes.
    """
    prepare = PEERS[asked["peer"]]
    return lambda problem: PeerStatistics(prepare(problem), asked.get("refitted", False))


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
