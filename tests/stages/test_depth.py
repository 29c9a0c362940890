"""Which layers go: distances, candidates, true divergence, and the fit without them.

Without these tests a run could be scored by the wrong layers, or a layer of the student be fitted
to another layer of the teacher.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rfprune.cost.constraint import Constraint
from rfprune.methods.depth import compare_layers
from rfprune.methods.problem import prepare_problem
from rfprune.methods.statistics import collect_statistics
from rfprune.model.depth import remove_layers
from rfprune.model.frozen import frozen
from rfprune.model.layout import Block, layout_of
from rfprune.model.linear import weight_of
from rfprune.pruning import prune
from rfprune.settings import Settings
from rfprune.stages.depth import (
    StackOfLayers,
    by_block_influence,
    mean_divergences,
    propose,
    state_distances,
)
from rfprune.stages.least_squares import Moments, solve_weights
from rfprune.stages.reconstruct import BlockFit, reconstruct
from rfprune.tasks.divergence import divergence_of_logits

Tiny = Callable[..., Any]


def solve_exactly(
    _: Block, train: Moments, held_out: Moments, __: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    return solve_weights(train + held_out, ridge=1e-8, intercept=bias is not None)


def stack_of(positions: list[float], removable: tuple[int, ...] | None = None) -> StackOfLayers:
    """A stack in which the hidden state moves along a line."""
    places = np.array(positions)
    layers = removable or tuple(range(len(positions) - 1))
    return StackOfLayers(layers, abs(places[:, None] - places))


@pytest.mark.parametrize("model_type", ["bert", "llama", "t5"])
def test_distances_are_those_of_the_hidden_states(
    model_type: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model = tiny_model(model_type, "none", num_hidden_layers=3)
    batch = tiny_batch(3, 6, padding="none", model_type=model_type)
    if model_type == "t5":
        batch["decoder_input_ids"] = batch["input_ids"]
    problem_batches = prepare_problem(model, [batch], Settings()).batches
    layout = layout_of(model)
    with torch.no_grad():
        outputs = model(**batch, output_hidden_states=True)
    found = state_distances(model, layout, problem_batches)
    names = ("encoder", "decoder") if model_type == "t5" else ("",)
    for name, distances in zip(names, found, strict=True):
        states = outputs[f"{name}_hidden_states".lstrip("_")]
        for first, second in combinations(range(3), 2):  # the last ones have a norm on top
            cosine = torch.cosine_similarity(states[first], states[second], dim=-1).mean()
            assert distances[first, second] == pytest.approx(1 - float(cosine), abs=1e-5)
        np.testing.assert_allclose(np.diagonal(distances), 0, atol=1e-6)


@given(st.lists(st.floats(0, 1), min_size=12, max_size=16), st.integers(1, 5), st.integers(0, 3))
def test_candidates_are_sets_of_the_size_without_layers_that_stay(
    steps: list[float], number: int, first: int
) -> None:
    positions = np.cumsum([0, *steps]).tolist()
    removable = tuple(range(first, len(steps)))
    found = propose([stack_of(positions, removable)], number)
    assert found
    assert len(set(found)) == len(found)
    for layers in found:
        assert len(layers) == number
        assert sorted(set(layers)) == list(layers)
        assert set(layers) <= set(removable)


def test_the_run_that_changes_least_comes_first() -> None:
    positions = [0, 1, 2, 2.1, 2.2, 2.3, 4, 5, 6, 7, 8, 9, 10]
    assert propose([stack_of(positions)], 3)[0] == (2, 3, 4)
    far = [0, 1, 1.1, 2, 3, 3.1, 4, 5, 5.1, 6, 7, 8, 9]
    assert by_block_influence(stack_of(far), 3) == (1, 4, 7)
    assert (1, 4, 7) in propose([stack_of(far)], 3)
    assert propose([stack_of([0, 1, 2])], 2) == [], "one layer must stay"


def test_two_stacks_share_the_number_of_layers() -> None:
    encoder, decoder = stack_of([0, 0.1, 5, 9]), stack_of([0, 5, 5.2, 9])
    found = propose([encoder, decoder], 2)
    assert found[0] == (0, 4)
    assert all(len(layers) == 2 for layers in found)


@pytest.mark.parametrize("head", ["sequence-classification", "question-answering", "causal-lm"])
def test_divergences_are_those_of_the_tasks(head: str, tiny_model: Tiny, tiny_batch: Tiny) -> None:
    """The two are written twice, since tasks know nothing of pruning."""
    model = tiny_model("gpt2", head)
    short = remove_layers(model, layout_of(model), [0])
    batch = tiny_batch(4, 7, padding="none")
    found = mean_divergences(model, [model, short], [batch])
    with torch.no_grad():
        outputs = [model(**batch), short(**batch)]
    names = [name for name in outputs[0] if name.endswith("logits")]
    first, second = (tuple(one[name].flatten(0, -2).numpy() for name in names) for one in outputs)
    expected = divergence_of_logits(first, second) * (7 if head == "causal-lm" else 1)
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert found[1] == pytest.approx(expected, rel=1e-4)
    assert found[1] > 0.01


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "t5"])
def test_layers_are_fitted_to_the_layers_that_they_came_from(
    model_type: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    """A teacher loses layers that do nothing without a change, so a damaged student without them
    can be repaired. It could not if one of its layers were fitted to another one of the teacher."""
    teacher = tiny_model(model_type, num_hidden_layers=5)
    layout = layout_of(teacher)
    removed = [1, 3] if model_type != "t5" else [1, 3, 8]
    with torch.no_grad():
        for block in (block for block in layout.blocks if block.layer in removed):
            consumer = teacher.get_submodule(block.consumer)
            weight_of(consumer).zero_()
            if consumer.bias is not None:
                consumer.bias.zero_()
        if model_type == "bert":  # a norm of what is normed already does nothing
            for name, parameter in teacher.named_parameters():
                if "LayerNorm" in name and "encoder" in name:
                    parameter.fill_(float(name.endswith("weight")))
    batches = prepare_problem(
        teacher,
        [tiny_batch(16, 9, seed=seed, model_type=model_type) for seed in range(4)],
        Settings(),
    ).batches
    short = remove_layers(teacher, layout, removed)
    found = mean_divergences(teacher, [short], batches)
    assert found[0] == pytest.approx(0, abs=1e-5)
    student = copy.deepcopy(short)
    with torch.no_grad():
        for block in layout_of(student).blocks:
            weight_of(student.get_submodule(block.consumer)).mul_(0.5)
    (damaged,) = mean_divergences(teacher, [student], batches)
    assert damaged > 0.01
    with frozen(teacher), frozen(student):
        fit = BlockFit(solve_exactly, align=True, removed=removed)
        assert reconstruct(teacher, student, layout, batches, fit) == []
    (repaired,) = mean_divergences(teacher, [student], batches)
    assert repaired < 1e-3 * damaged


@pytest.mark.parametrize("model_type", ["bert", "llama", "bart"])
def test_the_last_layer_that_stays_is_fitted_to_the_end_of_the_stack(
    model_type: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    """Nothing above it could make up for the layers that went."""
    teacher = tiny_model(model_type, num_hidden_layers=3)
    layout = layout_of(teacher)
    removed = [stack[-1] for stack in layout.stacks()]
    given = [tiny_batch(32, 9, seed=seed, model_type=model_type) for seed in range(4)]
    batches = prepare_problem(teacher, given, Settings()).batches
    student = copy.deepcopy(remove_layers(teacher, layout, removed))
    (before,) = mean_divergences(teacher, [student], batches)
    with frozen(teacher), frozen(student):
        fit = BlockFit(solve_exactly, removed=removed)
        assert reconstruct(teacher, student, layout, batches, fit) == []
    (after,) = mean_divergences(teacher, [student], batches)
    assert after < 0.9 * before


@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_the_search_finds_the_best_two_of_six_layers(
    model_type: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    """Brute force over all 15 pairs, by the divergence that they have before a fit."""
    model = tiny_model(model_type, num_hidden_layers=6)
    batches = [tiny_batch(16, 9, seed=seed) for seed in range(16)]
    settings = Settings(depth="layers", tune=False)
    result = prune(model, batches, Constraint("mac", 0.67), settings)
    problem = prepare_problem(model, batches, settings)
    held_out = problem.batches[7::8]
    pairs: list[tuple[int, ...]] = list(combinations(range(6), 2))
    students = [remove_layers(model, layout_of(model), pair) for pair in pairs]
    found = dict(zip(pairs, mean_divergences(model, students, held_out), strict=True))
    best = min(pairs, key=found.__getitem__)
    assert result.removed_layers == best
    assert sorted(found.values())[1] > 1.05 * found[best], "the choice matters"
    stacks = compare_layers(problem, collect_statistics(problem))
    by_influence = by_block_influence(stacks[0], 2)
    assert found[best] <= found[by_influence]
