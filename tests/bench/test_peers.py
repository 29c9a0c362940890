"""The peers against their papers' formulas, computed one example at a time.

Without these tests a peer could be weaker than its paper, which would flatter the package's method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rfprune.cost.constraint import Constraint, CostModel, linear_costs
from rfprune.errors import UserError
from rfprune.methods.budget import cost_model
from rfprune.methods.problem import Problem, prepare_problem
from rfprune.model.compact import compact, unpruned_copy
from rfprune.model.frozen import frozen
from rfprune.model.layout import layout_of
from rfprune.model.linear import weight_of
from rfprune.model.masks import Masks, full_masks, masked, num_kept
from rfprune.pruning import prune_to_each
from rfprune.settings import Settings
from scripts.bench.peers import flap, kprune, wanda_sp
from scripts.bench.peers.choice import keep_highest
from scripts.bench.peers.peer import PEERS, collector, settings_of_variant

Tiny = Callable[..., Any]
SETTINGS = Settings(method="importance", round_to=1)


@pytest.fixture
def problem_of(tiny_model: Tiny, tiny_batch: Tiny) -> Callable[..., Problem]:
    """`problem_of("llama", ...)`: a tiny model and two batches with padding."""

    def make(model_type: str, head: str = "sequence-classification", **config: Any) -> Problem:
        batches = [tiny_batch(seed=0), tiny_batch(seed=1, length=5)]
        return prepare_problem(tiny_model(model_type, head, **config), batches, SETTINGS)

    return make


def features_of(problem: Problem, masks: Masks) -> list[Tensor]:
    """Inputs (tokens, p) of every consumer under masks, one example without padding at a time."""
    model, layout = problem.model, problem.layout
    seen: list[list[Tensor]] = [[] for _ in layout.blocks]
    with frozen(model), masked(model, layout, masks):
        hooks = [  # before the masks multiply
            model.get_submodule(block.consumer).register_forward_pre_hook(
                lambda _, inputs, into=into: into.append(inputs[0][0]), prepend=True
            )
            for block, into in zip(layout.blocks, seen, strict=True)
        ]
        for batch in problem.inputs:
            for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
                model(input_ids=batch["input_ids"][row : row + 1, :length])
        for hook in hooks:
            hook.remove()
    return [torch.cat(rows).double() for rows in seen]


def budget_of(problem: Problem, ratio: float) -> tuple[CostModel, float]:
    costs = cost_model(problem, "mac")
    return costs, costs.budget(Constraint("mac", ratio))


@pytest.mark.parametrize("seed", range(20))
def test_one_threshold_serves_all_blocks(seed: int) -> None:
    random = np.random.default_rng(seed)
    scores = [torch.tensor(random.normal(size=size)) for size in (3, 5, 2)]
    costs = linear_costs("mac", random.uniform(1, 9, size=3).tolist(), [3, 5, 2])
    budget = float(random.uniform(0, costs.original))
    found = keep_highest(scores, costs, budget)
    fitting = [
        masks
        for threshold in [*torch.cat(scores).tolist(), np.inf]
        if costs.total(num_kept(masks := tuple((one >= threshold).float() for one in scores)))
        <= budget
    ]
    best = max(fitting, key=lambda masks: sum(num_kept(masks)))
    assert all(torch.equal(a, b) for a, b in zip(found, best, strict=True))


def test_flap_scores_are_standardised_fluctuations(problem_of: Callable[..., Problem]) -> None:
    problem = problem_of("bert")
    features = features_of(problem, full_masks(problem.layout))
    with frozen(problem.model):
        moments = flap.collect_moments(problem)
    expected = []
    for block, rows, one in zip(problem.layout.blocks, features, moments, strict=True):
        mean, variance = rows.mean(0).numpy(), rows.var(0, unbiased=False).numpy()
        np.testing.assert_allclose(one.mean, mean, atol=1e-5)
        np.testing.assert_allclose(one.variance, variance, atol=1e-5)
        weight = weight_of(problem.model.get_submodule(block.consumer)).detach()
        fluctuation = variance * np.linalg.norm(weight.double().numpy(), axis=0) ** 2
        fluctuation = fluctuation**2 if block.kind == "head" else fluctuation
        standard = (fluctuation - fluctuation.mean()) / fluctuation.std(ddof=1)
        expected.append(standard.reshape(block.num_units, -1).mean(1))
        own = flap.unit_scores(flap.feature_importance(one, weight, block), block)
        np.testing.assert_allclose(own, expected[-1], atol=1e-4)
    costs, budget = budget_of(problem, 0.6)
    masks = flap.prepare(problem)(costs, budget).masks
    wanted = keep_highest([torch.tensor(one) for one in expected], costs, budget)
    assert all(torch.equal(a, b) for a, b in zip(masks, wanted, strict=True))
    assert 0 < sum(num_kept(masks)) < sum(len(mask) for mask in masks)


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_flap_restores_the_mean_output(
    model_type: str, problem_of: Callable[..., Problem], tiny_model: Tiny
) -> None:
    problem = problem_of(model_type)
    model, layout = problem.model, problem.layout
    masks = full_masks(layout)
    masks[1][:7] = 0.0
    consumer = layout.blocks[1].consumer
    with frozen(model):
        moments = flap.collect_moments(problem)
    student = compact(model, layout, masks).eval()

    def mean_output(of: Any) -> Tensor:
        outputs = []
        hook = of.get_submodule(consumer).register_forward_hook(
            lambda _, inputs, output: outputs.append(output)
        )
        for batch in problem.inputs:
            of(**{name: batch[name] for name in ("input_ids", "attention_mask")})
        hook.remove()
        tokens = [batch["attention_mask"].bool() for batch in problem.inputs]
        rows = [
            output.view(*mask.shape, -1)[mask] for output, mask in zip(outputs, tokens, strict=True)
        ]
        return torch.cat(rows).mean(0)

    with torch.no_grad():
        wanted, before = mean_output(model), mean_output(student)
        flap.compensate(model, student, layout, masks, moments)
        after = mean_output(student)
    assert not torch.allclose(before, wanted, atol=1e-2)
    torch.testing.assert_close(after, wanted, atol=1e-5, rtol=1e-4)


def test_flap_restores_the_mean_of_an_emptied_sublayer(problem_of: Callable[..., Problem]) -> None:
    problem = problem_of("llama", "causal-lm")
    model, layout = problem.model, problem.layout
    masks = full_masks(layout)
    masks[1][:] = 0.0
    with frozen(model):
        moments = flap.collect_moments(problem)
    student = compact(model, layout, masks).eval()
    flap.compensate(model, student, layout, masks, moments)
    weight = weight_of(model.get_submodule(layout.blocks[1].consumer))
    bias = student.get_submodule(layout.blocks[1].consumer).bias
    torch.testing.assert_close(bias, (weight.double() @ moments[1].mean).float())
    batch = problem.inputs[0]["input_ids"]
    without = compact(model, layout, masks).eval()
    assert not torch.allclose(student(batch).logits, without(batch).logits, atol=1e-3)


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_wanda_sp_takes_norms_below_which_all_is_pruned(
    model_type: str, problem_of: Callable[..., Problem]
) -> None:
    problem = problem_of(model_type)
    layout, kept = problem.layout, [len(mask) // 2 for mask in full_masks(problem.layout)]
    with frozen(problem.model):
        found = wanda_sp.choose_bottom_up(problem.model, layout, problem.inputs, kept)
    masks = [mask.clone() for mask in full_masks(layout)]
    for layer in range(len(layout.layers)):
        features = features_of(problem, tuple(masks))
        for b, block in enumerate(layout.blocks):
            if block.layer == layer:
                weight = weight_of(problem.model.get_submodule(block.consumer)).detach().double()
                scores = (weight.abs() * features[b].norm(dim=0)).mean(0)
                scores = scores.view(block.num_units, -1).sum(1)
                masks[b][scores.argsort()[: block.num_units - kept[b]]] = 0.0
    assert all(torch.equal(a, b) for a, b in zip(found, masks, strict=True))


@pytest.mark.parametrize("asked", [{"peer": "flap"}, {"peer": "flap", "refitted": True}])
def test_the_package_prunes_with_a_peer(
    asked: dict[str, Any], problem_of: Callable[..., Problem]
) -> None:
    problem = problem_of("llama", "causal-lm")
    (result,) = prune_to_each(problem, [Constraint("mac", 0.6)], collect=collector(asked))
    assert 0.4 < result.achieved["mac"] <= 0.6
    biases = [
        result.model.get_submodule(block.consumer).bias is not None
        for block in problem.layout.blocks
    ]
    assert set(biases) == {asked == {"peer": "flap"}}, "only FLAP adds biases"


@pytest.mark.parametrize("name", PEERS)
def test_peers_meet_the_constraint(name: str, problem_of: Callable[..., Problem]) -> None:
    problem = problem_of("bert")
    costs, budget = budget_of(problem, 0.5)
    masks = PEERS[name](problem)(costs, budget).masks
    assert 0.3 * costs.original < costs.total(num_kept(masks)) <= 0.5 * costs.original
    assert {float(value) for mask in masks for value in mask} == {0.0, 1.0}


def test_the_model_is_untouched(problem_of: Callable[..., Problem]) -> None:
    problem = problem_of("bert")
    before = {name: one.clone() for name, one in problem.model.state_dict().items()}
    for prepare in PEERS.values():
        costs, budget = budget_of(problem, 0.5)
        choice = prepare(problem)(costs, budget)
        choice.recover(compact(problem.model, layout_of(problem.model), choice.masks))
    after = problem.model.state_dict()
    assert all(torch.equal(one, after[name]) for name, one in before.items())
    assert not any(one._forward_pre_hooks for one in problem.model.modules())


def bottom_up(problem: Problem) -> kprune.BottomUp:
    return kprune.BottomUp(
        problem.model, unpruned_copy(problem.model), problem.layout, problem.inputs
    )


@pytest.mark.parametrize("config", [{}, {"num_labels": 1}], ids=["classes", "regression"])
def test_knowledge_is_that_of_masks_and_features(
    config: dict[str, int], problem_of: Callable[..., Problem]
) -> None:
    problem = problem_of("bert", **config)
    walk, start = bottom_up(problem), 3
    with frozen(problem.model), frozen(walk.student):
        assert max(float(one.predictive.max()) for one in walk.measure(0)) < 1e-12
        for block in problem.layout.blocks[:start]:  # as if they had been pruned
            weight_of(walk.student.get_submodule(block.consumer)).data[:, ::2] = 0.0
        walk._advance(0)
        (found,) = walk.measure(start)
        pruned = replace(problem, model=walk.student)
        features = features_of(pruned, full_masks(problem.layout))[start]
        block, mask = problem.layout.blocks[start], full_masks(problem.layout)
        mask[start].requires_grad_()
        squares = torch.zeros(block.num_units)
        for batch in problem.inputs:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            with masked(walk.student, problem.layout, mask):
                own = walk.student(**inputs).logits
            with torch.no_grad():
                wanted = problem.model(**inputs).logits
            lost = (own - wanted).square().sum(1).mean()
            if not config:
                p, q = (wanted / 2).softmax(-1), (own / 2).softmax(-1)
                lost = 4 * (p * (p / q).log()).sum(1).mean()
            squares += torch.autograd.grad(lost, mask[start])[0].square() / 2
    assert squares.max() > 1e-6
    torch.testing.assert_close(found.predictive, squares.double() / 8, rtol=1e-3, atol=1e-9)
    weight = weight_of(walk.student.get_submodule(block.consumer)).detach().double()
    adds = features[:, None, :] * weight  # (tokens, d, p)
    energy = adds.square().sum(0).mean(0) / len(features)
    torch.testing.assert_close(found.representational, energy, rtol=1e-3, atol=1e-9)


def test_kprune_repairs_what_the_sublayers_below_have_lost(
    problem_of: Callable[..., Problem],
) -> None:
    problem = problem_of("bert", hidden_size=8, num_attention_heads=2, intermediate_size=6)
    walk, (first, second) = bottom_up(problem), problem.layout.blocks[:2]
    with frozen(problem.model), frozen(walk.student):
        features = features_of(problem, full_masks(problem.layout))[0][:, 4:]
        consumer = problem.model.get_submodule(first.consumer)
        output = features_of(problem, full_masks(problem.layout))[0] @ consumer.weight.double().T
        assert walk.tune(first, torch.tensor([0.0, 1.0])) == []
        solved = np.linalg.lstsq(features.numpy(), output.detach().numpy(), rcond=None)[0]
        weight = weight_of(walk.student.get_submodule(first.consumer))
        np.testing.assert_allclose(weight[:, 4:].T, solved, atol=1e-3)
        assert not weight[:, :4].any()
        before = weight_of(walk.student.get_submodule(second.consumer)).clone()
        assert walk.tune(second, torch.ones(6)) == []
        after = weight_of(walk.student.get_submodule(second.consumer))
        assert not torch.allclose(after, before, atol=1e-2), "all neurons stay, and are solved anew"


def test_kprune_fits_what_it_keeps(problem_of: Callable[..., Problem]) -> None:
    problem = problem_of("bert")
    choice = PEERS["kprune"](problem)(*budget_of(problem, 0.6))
    student = compact(problem.model, problem.layout, choice.masks).eval()
    batch = {name: problem.inputs[0][name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        wanted, before = problem.model(**batch).logits, student(**batch).logits
        assert list(choice.recover(student)) == []
        after = student(**batch).logits
    assert (after - wanted).norm() < (before - wanted).norm()


def test_kprune_refuses_other_predictions(problem_of: Callable[..., Problem]) -> None:
    problem = problem_of("gpt2", "causal-lm")
    with pytest.raises(UserError, match="classification"):
        PEERS["kprune"](problem)(*budget_of(problem, 0.6))


def test_the_authors_solver_finds_the_exact_scales(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    variant = {"method": "kwon", "teacher": "scheduled", "lsmr": True}
    batches = [tiny_batch(seed=seed) for seed in range(4)]
    found = []
    for lsmr in (False, True):
        own = variant | {"lsmr": lsmr}
        problem = prepare_problem(tiny_model("bert"), batches, settings_of_variant(own, seed=0))
        found.append(next(prune_to_each(problem, [Constraint("mac", 0.5)], collect=collector(own))))
    scales = [torch.cat(result.masks) for result in found]
    assert ((scales[0] != 0) & ((scales[0] - 1).abs() > 0.1)).sum() > 3, "scales were tuned"
    torch.testing.assert_close(scales[1], scales[0], rtol=1e-3, atol=1e-4)
