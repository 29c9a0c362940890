"""prune() under rules for sizes: the same in every layer, and neurons in multiples.

Deleting this lets `--uniform` give models that need code of ours, exceed the budget, or be worse
than need be, and `--round-to` be forgotten by a method or in a later round.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from rfprune.cost.constraint import Constraint
from rfprune.cost.macs import mac_costs
from rfprune.cost.metrics import cost_model, mean_tokens
from rfprune.errors import UserError
from rfprune.model.layout import layout_of
from rfprune.model.masks import num_kept
from rfprune.model.plain_entries import ENTRIES
from rfprune.pipeline import prune, prune_family
from rfprune.result import CHOICES, Settings
from rfprune.selection import least_possible

Tiny = Callable[..., Any]
Batch = dict[str, Tensor]
METHODS = CHOICES["method"]


@pytest.fixture
def batches(tiny_batch: Tiny) -> list[Batch]:
    return [tiny_batch(6, 7 + seed, seed=seed) for seed in range(2)]


def logits_of(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(**batch)[0]  # type: ignore[no-any-return]


def sizes(result: Any, kind: str) -> list[int]:
    return [layer[kind] for layer in result.layers]


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_uniform_gives_a_plain_model_that_anything_loads(
    model_type: str,
    method: str,
    rounds: int,
    tiny_model: Tiny,
    batches: list[Batch],
    tmp_path: Path,
) -> None:
    model = tiny_model(model_type)
    settings = Settings(method=method, uniform=True, rounds=rounds)
    result = prune(model, batches, Constraint("mac", 0.8), settings)
    assert sizes(result, "heads") == [4, 4], "a configuration of this family has no fewer"
    kept = sizes(result, "neurons")
    assert kept[0] == kept[1] < 12
    assert result.achieved["mac"] <= 0.8
    assert type(result.model) is type(model)
    result.model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert getattr(again.config, ENTRIES[model_type].neurons) == kept[0]
    assert torch.equal(logits_of(again, batches[0]), logits_of(result.model, batches[0]))
    assert not torch.allclose(logits_of(again, batches[0]), logits_of(model, batches[0]), atol=1e-3)
    smaller = prune(again, batches, Constraint("mac", 0.5), Settings(method=method))
    assert smaller.achieved["mac"] <= 0.5, "it can be pruned again"


@pytest.mark.parametrize("method", ["curvature", "importance"])
def test_no_other_number_of_neurons_within_the_budget_has_a_smaller_error(
    method: str, tiny_model: Tiny, batches: list[Batch]
) -> None:
    model = tiny_model()
    settings = Settings(method=method, uniform=True, tune=False)
    result = prune(model, batches, Constraint("mac", 0.85), settings)
    layout = layout_of(model)
    costs = mac_costs(layout, mean_tokens(batches))
    fitting = [
        n
        for n in range(1, 13)
        if costs.total([4 if b.kind == "head" else n for b in layout.blocks])
        <= 0.85 * costs.original
    ]
    assert sizes(result, "neurons") == [max(fitting)] * 2
    for block, mask, index in zip(layout.blocks, result.masks, itertools.count(), strict=False):
        if block.kind == "neuron" and result.importance is not None:
            own = result.importance[index]
            assert float(own[mask != 0].min()) >= float(own[mask == 0].max())


def test_uniform_below_what_heads_alone_cost_is_refused_before_anything_is_collected(
    tiny_model: Tiny, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()

    def collect(*_: Any, **__: Any) -> Any:
        raise AssertionError("it must not come to that")

    monkeypatch.setattr("rfprune.selection.collect_curvature", collect)
    settings = Settings(uniform=True)
    with pytest.raises(UserError, match=r"all heads stay.*leave out --uniform") as raised:
        prune(model, batches, Constraint("mac", 0.3), settings)
    monkeypatch.undo()
    named = float(re.findall(r"at least ([\d.]+\d)", str(raised.value))[0])
    layout = layout_of(model)
    costs = cost_model("mac", model, layout, batches)
    assert least_possible(model, layout, costs, settings) == named
    assert least_possible(model, layout, costs, Settings()) < 0.3
    result = prune(model, batches, Constraint("mac", named), settings)
    assert sizes(result, "neurons") == [1, 1]


def test_a_model_whose_layers_have_fewer_heads_cannot_become_plain(
    tiny_model: Tiny, batches: list[Batch]
) -> None:
    first = prune(tiny_model(), batches, Constraint("mac", 0.5))
    assert sizes(first, "heads") != [4, 4], "heads were pruned"
    with pytest.raises(UserError, match="leave out --uniform"):
        prune(first.model, batches, Constraint("mac", 0.9), Settings(uniform=True))


@pytest.mark.parametrize("metric", ["mac", "params", "memory"])
@pytest.mark.parametrize("method", METHODS)
def test_neurons_are_kept_in_multiples(
    method: str, metric: str, tiny_model: Tiny, batches: list[Batch]
) -> None:
    model = tiny_model(intermediate_size=44)
    constraints = [Constraint(metric, ratio) for ratio in (0.95, 0.93, 0.91)]
    free, rounded = (
        [sizes(result, "neurons") for result in prune_family(model, batches, constraints, settings)]
        for settings in (
            Settings(method=method, tune=False),
            Settings(method=method, tune=False, round_to=8, rounds=2),
        )
    )
    assert any(n % 8 and n != 44 for kept in free for n in kept), "without it they are not"
    assert all(n % 8 == 0 or n == 44 for kept in rounded for n in kept)
    assert any(kept != [44, 44] for kept in rounded)


def test_the_classical_fraction_and_the_uniform_sizes_keep_to_multiples_too(
    tiny_model: Tiny, batches: list[Batch]
) -> None:
    model = tiny_model(intermediate_size=44)
    layout = layout_of(model)
    for settings in (
        Settings(uniform=True, round_to=16),
        Settings(method="importance", allocation="uniform", round_to=16),
    ):
        result = prune(model, batches, Constraint("mac", 0.8), settings)
        assert result.achieved["mac"] <= 0.8
        kept = dict(zip(layout.blocks, num_kept(result.masks), strict=True))
        assert {n for block, n in kept.items() if block.kind == "neuron"} <= {16, 32}


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UserError, match="leave one of them out"):
        Settings(method="importance", allocation="uniform", uniform=True)
    with pytest.raises(UserError, match="round_to 7 is not possible; choose one of 8, 16, 32, 64"):
        Settings(round_to=7)
    assert Settings(round_to=8, uniform=True).round_to == 8
