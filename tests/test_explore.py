"""`scripts/explore.py` and the variations that it measures, on tiny models.

Without these a verdict on a variation could rest on a model that breaks its budget, on a baseline
that is not the product's, or on a step that does not do what its name says.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rfprune.cost.constraint import Constraint
from rfprune.model.layout import layout_of
from rfprune.model.masks import full_masks, num_kept
from rfprune.pipeline import prune
from rfprune.result import Settings
from rfprune.stages.curvature import collect_curvature

TinyModel = Callable[..., Any]
TinyBatch = Callable[..., dict[str, Any]]
ROOT = Path(__file__).parents[1]
NAMES = (
    *(
        "plain",
        "product",
        "product+polish",
        "reselect",
        "swaps",
        "weights",
        "held-out",
        "summed-gradients",
        "weighted-inputs",
    ),
    *("refit-head", "refit-classifier", "refit-norms", "query-key", "query-key-0.75"),
    *("query-key-0.25", "product+query-key", "ridge-0.1"),
    *("reselect+ridge-0.1", "reselect+held-out", "reselect+swaps", "reselect+refit-norms"),
    "reselect+held-out+refit-norms",
)


@pytest.fixture(scope="module")
def scripts() -> Iterator[Callable[[str], ModuleType]]:
    """`scripts("explore")`: a script as a module."""
    sys.path.insert(0, str(ROOT))
    yield lambda name: importlib.import_module(f"scripts.{name}")
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def study(
    scripts: Callable[[str], ModuleType], tiny_model: TinyModel, tiny_batch: TinyBatch
) -> Any:
    """A tiny model with 64 examples in 8 batches."""
    vars(scripts("variations"))["SEARCHED"] = (
        6  # for speed: `weights` does with six what it does with more
    )
    batches = [tiny_batch(8, 9, seed=seed) for seed in range(8)]
    return scripts("variation_study").Study(tiny_model(), batches, 0)


def test_all_variations_are_tested(scripts: Callable[[str], ModuleType]) -> None:
    assert tuple(scripts("variations").VARIATIONS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_variation_meets_the_budget_and_leaves_the_model_alone(
    name: str, study: Any, scripts: Callable[[str], ModuleType]
) -> None:
    before = copy.deepcopy(study.model.state_dict())
    outcome = scripts("variations").VARIATIONS[name](study, 0.5)
    kept = tuple(  # an emptied block has a consumer without columns
        outcome.model.get_submodule(block.consumer).weight.shape[1] // block.unit_width
        for block in study.layout.blocks
    )
    assert kept == outcome.kept
    assert outcome.achieved(study) <= 0.5
    assert (study.costs.total(kept) <= 0.5 * study.costs.original) == (not outcome.saved_macs)
    assert torch.isfinite(outcome.model(**study.batches[0]).logits).all()
    json.dumps(dict(outcome.details), allow_nan=False)
    after = study.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("plain", "swaps")])
def test_a_variation_varies(name: str, study: Any, scripts: Callable[[str], ModuleType]) -> None:
    """swaps is apart: greedy selection is often the best on tiny blocks."""
    variations = scripts("variations").VARIATIONS
    ratios = (0.5, 0.35)  # not every ratio leaves every variation something to do
    outputs = [
        [variations[one](study, ratio).model(**study.batches[0]).logits for ratio in ratios]
        for one in ("plain", name)
    ]
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(*outputs, strict=True))


def test_product_is_the_product(study: Any, scripts: Callable[[str], ModuleType]) -> None:
    outcome = scripts("variations").product(study, 0.4)
    result = prune(study.model, study.batches, Constraint("mac", 0.4))
    assert outcome.kept == num_kept(result.masks)
    assert outcome.achieved(study) == pytest.approx(result.achieved["mac"])
    batch = study.batches[3]
    torch.testing.assert_close(outcome.model(**batch).logits, result.model(**batch).logits)


def test_plain_keeps_what_the_product_keeps_and_rebuilds_it(
    study: Any, scripts: Callable[[str], ModuleType]
) -> None:
    variations, distance = scripts("variations"), scripts("variation_rebuilding").divergence_of
    outcome = variations.plain(study, 0.4)
    masks = variations.select(study, study.curves, 0.4)
    untouched = prune(
        study.model, study.batches, Constraint("mac", 0.4), Settings(tune=False)
    ).model
    assert outcome.kept == num_kept(masks) == variations.product(study, 0.4).kept
    apart = [distance(study.model, one, study.batches) for one in (outcome.model, untouched)]
    assert apart[0] < 0.8 * apart[1]


def test_rebuilding_what_lost_nothing_changes_nothing(
    study: Any, scripts: Callable[[str], ModuleType]
) -> None:
    student = scripts("variations").rebuilt(study, full_masks(study.layout))
    for name, value in study.model.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, atol=1e-3, rtol=1e-3)


def random_block(units: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A, W and G of strongly correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    size = units * width
    made = [torch.randn(n, size, generator=generator).double() for n in (size + 2, 5, 5)]
    mixing = torch.eye(size) + 0.7 * torch.randn(size, size, generator=generator)
    features = made[0] @ mixing.double()
    return features.T @ features / len(features), made[1], made[2] @ made[2].T


def error_of(inputs: Tensor, weight: Tensor, gradients: Tensor, kept: Tensor) -> float:
    """tr((W - V)·A·(W - V)ᵀ·G) at the best V with the columns `kept` alone."""
    best = torch.zeros_like(weight)
    best[:, kept] = torch.linalg.solve(inputs[kept][:, kept], (weight @ inputs)[:, kept].T).T
    left = weight - best
    return float((left @ inputs @ left.T @ gradients).trace())


@given(
    units=st.integers(2, 7),
    width=st.integers(1, 2),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_swaps_end_where_no_single_swap_helps_and_never_raise_the_error(
    scripts: Callable[[str], ModuleType], units: int, width: int, seed: int, data: st.DataObject
) -> None:
    kept = data.draw(st.sets(st.integers(0, units - 1)))
    mask = torch.tensor([float(unit in kept) for unit in range(units)])
    block = random_block(units, width, seed)

    def error(mask: Tensor) -> float:
        return error_of(*block, mask.repeat_interleave(width).nonzero().flatten())

    better, before, after = scripts("variation_selection").swap_units(*block, mask, width)
    scale = error(torch.zeros(units))
    assert before == pytest.approx(error(mask), abs=1e-8 * scale)
    assert after == pytest.approx(error(better), abs=1e-8 * scale)
    assert after <= before
    assert better.sum() == mask.sum()
    for leaving, entering in itertools.product(range(units), repeat=2):
        if better[leaving] and not better[entering]:
            tried = better.clone()
            tried[leaving], tried[entering] = 0.0, 1.0
            assert error(tried) >= after - 1e-6 * scale


def test_swaps_undo_a_bad_selection(scripts: Callable[[str], ModuleType]) -> None:
    block = random_block(12, 1, 0)
    mask = torch.tensor([1.0] * 6 + [0.0] * 6)
    better, before, after = scripts("variation_selection").swap_units(*block, mask, 1)
    assert not torch.equal(better, mask)
    assert after < 0.8 * before


def test_other_moments_are_the_packages_where_they_should_be(
    study: Any, scripts: Callable[[str], ModuleType]
) -> None:
    """Summing changes G alone, weighting A alone; on one token an example summing does nothing."""
    variant = scripts("variation_selection").summed_and_weighted
    summed, weighted = variant(study.model, study.layout, study.batches, 0)
    for own, of_sums, of_weights in zip(study.collected, summed, weighted, strict=True):
        torch.testing.assert_close(of_sums.input_moment, own.input_moment)
        torch.testing.assert_close(of_weights.gradient_moment, own.gradient_moment)
        assert not torch.allclose(of_weights.input_moment, own.input_moment, rtol=0.01)
        assert (of_sums.tokens, of_weights.examples) == (own.tokens, own.examples)
    # (in the last FFN the first token alone has a gradient)
    assert not torch.allclose(
        summed[0].gradient_moment, study.collected[0].gradient_moment, rtol=0.1
    )
    single = [{"input_ids": torch.tensor([[7], [8], [9]])}]
    (summed, _), own = (
        variant(study.model, study.layout, single, 0),
        collect_curvature(study.model.requires_grad_(False), study.layout, single),
    )
    for one, other in zip(summed, own, strict=True):
        torch.testing.assert_close(one.gradient_moment, other.gradient_moment)


def test_full_rank_changes_no_score_and_half_rank_does(
    scripts: Callable[[str], ModuleType], tiny_model: TinyModel, tiny_batch: TinyBatch
) -> None:
    steps, model, batch = scripts("variation_selection"), tiny_model(), tiny_batch()
    layout = layout_of(model)
    moments = steps.query_key_moments(model, layout, [batch])
    expected = model(**batch).logits
    for left, lost_dimensions in ((1.0, 0), (0.5, 16)):
        student = copy.deepcopy(model)
        masks = full_masks(layout)
        removed, lost = steps.low_rank_scores(student, layout, masks, moments, left)
        assert removed == lost_dimensions
        close = torch.allclose(student(**batch).logits, expected, atol=1e-3)
        assert close == (lost_dimensions == 0)
        assert (lost > 0) == (lost_dimensions > 0)
    heads = [block for block in layout.blocks if block.kind == "head"]
    queries = [student.get_submodule(block.producers[0].path) for block in heads]
    rank = [int(torch.linalg.matrix_rank(query.weight, rtol=1e-4)) for query in queries]
    assert sum(rank) == sum(block.num_units * block.unit_width for block in heads) - 16


def test_a_norm_gets_back_what_a_planted_scale_and_shift_took(
    scripts: Callable[[str], ModuleType], study: Any
) -> None:
    rebuilding = scripts("variation_rebuilding")
    student = copy.deepcopy(study.model).requires_grad_(False)
    norm = student.get_submodule(study.layout.blocks[0].residual_sum)
    scale = torch.linspace(0.5, 2.0, len(norm.weight))
    norm.weight.mul_(scale)
    norm.bias.sub_(1.0)
    apart = rebuilding.divergence_of(study.model, student, study.batches)
    assert apart > 1e-3
    rebuilding.walk_blocks(
        study.model,
        student,
        study.layout,
        [study.batches],
        lambda _, __, weight, bias: (weight, bias),
        passed=rebuilding.fit_norm,
    )
    assert rebuilding.divergence_of(study.model, student, study.batches) < 1e-6


def test_the_head_follows_the_teacher_again(
    scripts: Callable[[str], ModuleType], study: Any
) -> None:
    rebuilding = scripts("variation_rebuilding")
    student = copy.deepcopy(study.model).requires_grad_(False)
    student.classifier.weight.mul_(0.5)
    apart = rebuilding.divergence_of(study.model, student, study.batches)
    chosen = rebuilding.refit_maps(
        study.model, student, study.layout, study.held_out(), [1e-4, 1e-2]
    )
    assert chosen == {"bert.pooler.dense": None, "classifier": 1e-4}
    assert rebuilding.divergence_of(study.model, student, study.batches) < 1e-3 * apart


@pytest.fixture
def explore(
    scripts: Callable[[str], ModuleType],
    tiny_folder: Callable[..., Path],
    tiny_data_dir: Path,
    tmp_path: Path,
) -> Callable[[str], tuple[int, list[dict[str, Any]]]]:
    """`explore("--seed 1")`: the exit code of main on a tiny model, and the lines of its file."""
    output = tmp_path / "exploration.jsonl"

    def run(flags: str) -> tuple[int, list[dict[str, Any]]]:
        always = f"--model {tiny_folder()} --task mrpc --data-dir {tiny_data_dir} --samples 16 "
        always += f"--batch-size 4 --constraint 0.5 --output {output} "
        code = scripts("explore").main((always + flags).split())
        return code, [json.loads(line) for line in output.read_text().splitlines()]

    return run


def test_lines_are_measured_once_and_say_what_they_are(
    explore: Callable[[str], tuple[int, list[dict[str, Any]]]],
) -> None:
    code, lines = explore("--variation plain held-out")
    assert code == 0
    assert [line["variation"] for line in lines] == ["plain", "held-out"]
    assert all(line["samples"] == 16 and line["achieved"]["mac"] <= 0.5 for line in lines)
    assert lines[1]["details"]["ridges"]
    code, more = explore("--variation plain held-out --seed 0 1")
    assert (code, more[:2]) == (0, lines)
    assert [(line["variation"], line["seed"]) for line in more[2:]] == [
        ("plain", 1),
        ("held-out", 1),
    ]
    assert more[0]["divergence"] != more[2]["divergence"]


def test_unknown_names_are_refused(
    explore: Callable[[str], tuple[int, list[dict[str, Any]]]],
    capsys: pytest.CaptureFixture[str],
    scripts: Callable[[str], ModuleType],
    tmp_path: Path,
) -> None:
    for flags in ("--task mrpc --variation bogus", "--task squad", "--task bogus"):
        output = ["--output", str(tmp_path / "none.jsonl")]
        assert scripts("explore").main(["--model", "demo", *flags.split(), *output]) == 2
        assert "explore: error: " in capsys.readouterr().err
