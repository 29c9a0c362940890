"""prune() under rules for sizes: the same in every layer, and neurons in multiples.

Deleting this lets `--uniform` give models that need code of ours, exceed the budget, or be worse
than need be, and `--round-to` be forgotten by a method or in a later round.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from rfprune.cost.constraint import Constraint
from rfprune.cost.macs import mac_costs
from rfprune.errors import UserError
from rfprune.families.architectures import ARCHITECTURES
from rfprune.main import main
from rfprune.methods.budget import min_ratio
from rfprune.methods.problem import prepare_problem
from rfprune.model.batch import mean_tokens
from rfprune.model.layout import layout_of
from rfprune.model.masks import num_kept
from rfprune.pruning import prune, prune_family
from rfprune.settings import METHODS, Settings

Tiny = Callable[..., Any]
Batch = dict[str, Tensor]


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
    settings = Settings(method=method, uniform=True, round_to=None, rounds=rounds)
    result = prune(model, batches, Constraint("mac", 0.8), settings)
    assert sizes(result, "heads") == [4, 4], "a configuration of this family has no fewer"
    kept = sizes(result, "neurons")
    assert kept[0] == kept[1] < 12
    assert result.achieved["mac"] <= 0.8
    assert type(result.model) is type(model)
    result.model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    entries = ARCHITECTURES[model_type].size_entries
    assert entries is not None
    assert getattr(again.config, entries.neurons) == kept[0]
    assert torch.equal(logits_of(again, batches[0]), logits_of(result.model, batches[0]))
    assert not torch.allclose(logits_of(again, batches[0]), logits_of(model, batches[0]), atol=1e-3)
    smaller = prune(again, batches, Constraint("mac", 0.5), Settings(method=method))
    assert smaller.achieved["mac"] <= 0.5, "it can be pruned again"


def test_uniform_prunes_heads_where_the_configuration_has_their_width(
    tiny_model: Tiny, batches: list[Batch], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    result = prune(model, batches, Constraint("mac", 0.4), Settings(uniform=True))
    heads, neurons = sizes(result, "heads"), sizes(result, "neurons")
    assert heads[0] == heads[1] < 4
    assert neurons[0] == neurons[1]
    result.model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert (again.config.num_key_value_heads, again.config.intermediate_size) == (
        heads[0],
        neurons[0],
    )
    assert torch.equal(logits_of(again, batches[0]), logits_of(result.model, batches[0]))


@pytest.mark.parametrize("method", ["curvature", "importance"])
def test_no_other_number_of_neurons_within_the_budget_has_a_smaller_error(
    method: str, tiny_model: Tiny, batches: list[Batch]
) -> None:
    model = tiny_model()
    settings = Settings(method=method, uniform=True, round_to=None, tune=False)
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

    monkeypatch.setattr("rfprune.methods.curvature.collect_curvature", collect)
    settings = Settings(uniform=True, round_to=None)
    with pytest.raises(UserError, match=r"all heads stay.*leave out --uniform") as raised:
        prune(model, batches, Constraint("mac", 0.3), settings)
    monkeypatch.undo()
    named = float(re.findall(r"at least ([\d.]+\d)", str(raised.value))[0])
    assert min_ratio(prepare_problem(model, batches, settings), "mac") == named
    assert min_ratio(prepare_problem(model, batches, replace(settings, uniform=False)), "mac") < 0.3
    result = prune(model, batches, Constraint("mac", named), settings)
    assert sizes(result, "neurons") == [1, 1]


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
            Settings(method=method, tune=False, round_to=None),
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


def test_rules_for_sizes_need_no_new_collection(
    tiny_model: Tiny, batches: list[Batch], tmp_path: Path
) -> None:
    model, constraint = tiny_model(intermediate_size=44), Constraint("mac", 0.8)
    first = prune(model, batches, constraint, Settings(), cache=tmp_path)
    ruled = prune(model, batches, constraint, Settings(uniform=True, round_to=8), cache=tmp_path)
    assert not first.cached
    assert "collect" in ruled.cached


@pytest.fixture(scope="module")
def ran(tiny_folder: Tiny, tiny_data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a command with --uniform and --round-to."""
    output = tmp_path_factory.mktemp("sizes") / "out"
    flags = ["--model", str(tiny_folder(intermediate_size=44)), "--task", "sst2"]
    flags += ["--data-dir", str(tiny_data_dir), "--constraint", "0.7", "--samples", "16"]
    flags += ["--uniform", "--round-to", "8", "--output-dir", str(output), "--quiet", "--no-cache"]
    assert main(flags) == 0
    return output


def test_the_command_leaves_a_plain_folder_and_says_so(
    ran: Path, tiny_data_dir: Path, tmp_path: Path
) -> None:
    report = json.loads((ran / "report.json").read_text())
    assert (report["settings"]["uniform"], report["settings"]["round_to"]) == (True, 8)
    config = json.loads((ran / "config.json").read_text())
    assert not {"rfprune", "auto_map"} & config.keys()
    assert report["layers"] == [{"heads": 4, "neurons": config["intermediate_size"]}] * 2
    assert config["intermediate_size"] % 8 == 0
    assert not list(ran.rglob("*.py"))
    assert (ran / "pruning/masks.safetensors").is_file()
    for name in ("README.md", "log.txt", "report.html"):
        text = (ran / name).read_text(encoding="utf-8")
        assert "from_pretrained" in text
        assert "trust_remote_code" not in text
    flags = ["--model", str(ran), "--task", "sst2", "--data-dir", str(tiny_data_dir)]
    flags += ["--constraint", "0.5", "--samples", "16", "--output-dir", str(tmp_path / "again")]
    assert main([*flags, "--quiet", "--no-cache"]) == 0, "it can be pruned again"
    assert json.loads((tmp_path / "again" / "report.json").read_text())["achieved"]["mac"] <= 0.5


def test_what_the_command_leaves_loads_in_a_fresh_process_and_scores_the_same(
    ran: Path, tiny_batch: Tiny
) -> None:
    from rfprune import load_pruned

    batch = tiny_batch()
    expected = logits_of(load_pruned(ran), batch)
    torch.save((batch, expected), ran.parent / "expected.pt")
    program = f"""
import sys, torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained({str(ran)!r})
batch, expected = torch.load({str(ran.parent / "expected.pt")!r})
with torch.no_grad():
    assert torch.equal(model(**batch).logits, expected)
assert "rfprune" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, cwd=ran.parent
    )
    assert done.returncode == 0, done.stderr
