"""Rearrangement never raises the predicted error, and is optimal where greedy swaps provably are.

Without these tests the updated row sums could differ from the quadratic form they stand for.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rfprune.stages.fisher import block_fisher
from rfprune.stages.rearrange import quadratic_form, rearrange


def mask_of(pruned: tuple[int, ...], num_units: int) -> Tensor:
    mask = torch.ones(num_units)
    mask[list(pruned)] = 0
    return mask


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Gradients (n, U) with strong correlations, and a mask (U,)."""
    num_units = draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    gradients = torch.randn(draw(st.integers(1, 6)), num_units, generator=generator)
    if draw(st.booleans()):
        gradients = gradients.sign()  # many ties
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=num_units, max_size=num_units)))
    return gradients, mask.float()


@given(blocks())
def test_the_predicted_error_is_the_squared_norm_of_the_pruned_gradients(
    block: tuple[Tensor, Tensor],
) -> None:
    gradients, mask = block
    brute = float(gradients[:, mask == 0].double().sum(1).square().sum())
    assert quadratic_form(mask, block_fisher(gradients)) == pytest.approx(brute, abs=1e-9)


@given(blocks())
def test_no_single_swap_lowers_the_error_of_the_result(block: tuple[Tensor, Tensor]) -> None:
    gradients, mask = block
    fisher, before = block_fisher(gradients), mask.clone()
    result = rearrange(mask, fisher)
    assert torch.equal(mask, before)
    assert result.sum() == mask.sum()
    assert set(result.tolist()) <= {0.0, 1.0}
    error = quadratic_form(result, fisher)
    assert error <= quadratic_form(mask, fisher) + 1e-9
    tolerance = 1e-9 + 1e-9 * float(fisher.diagonal().sum())
    for out, back in itertools.product(range(len(mask)), repeat=2):
        if result[out] == 0 and result[back] == 1:
            swapped = result.clone()
            swapped[out], swapped[back] = 1, 0
            assert quadratic_form(swapped, fisher) >= error - tolerance


@given(blocks())
def test_one_pruned_or_one_kept_unit_is_optimal(block: tuple[Tensor, Tensor]) -> None:
    gradients, _ = block
    fisher, num_units = block_fisher(gradients), gradients.shape[1]
    for num_pruned in {1, num_units - 1} - {0}:
        brute = min(
            quadratic_form(mask_of(pruned, num_units), fisher)
            for pruned in itertools.combinations(range(num_units), num_pruned)
        )
        start = mask_of(tuple(range(num_pruned)), num_units)
        found = quadratic_form(rearrange(start, fisher), fisher)
        assert found == pytest.approx(brute, abs=1e-8)
