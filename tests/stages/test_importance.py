"""Classical criteria against gradients computed one example at a time, and against numpy.

Without these tests a baseline could be weaker than its paper, which would flatter other methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rfprune.errors import UserError
from rfprune.families.schema import LINEAR_MAPS
from rfprune.model.compact import compact
from rfprune.model.frozen import frozen
from rfprune.model.layout import layout_of
from rfprune.model.masks import full_masks, masked
from rfprune.settings import CRITERIA
from rfprune.stages.calibration import Calibration
from rfprune.stages.importance import (
    compute_importance,
    num_weights,
    unit_weights,
)
from rfprune.stages.objective import LABELLED
from tests.conftest import ALL_TYPES

Tiny = Callable[..., Any]
FROM_LOSS = ("fisher", "taylor", "gradient")
LABELS = torch.tensor([0, 1, 1, 0])


def importance(criterion: str, model: Any, batches: list[Any], **options: Any) -> list[Tensor]:
    with frozen(model):
        return list(
            compute_importance(criterion, Calibration(model, layout_of(model), batches, **options))
        )


def examples_of(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """One batch per example, without padding."""
    return [
        {
            name: value[row : row + 1, :length] if value.dim() == 2 else value[row : row + 1]
            for name, value in batch.items()
        }
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist())
    ]


def mask_gradients(model: Any, example: dict[str, Tensor], label: int) -> tuple[Tensor, ...]:
    """Mask gradients (U,) per block of the loss of one example on its label."""
    layout = layout_of(model)
    masks = [mask.requires_grad_() for mask in full_masks(layout)]
    with masked(model, layout, masks):
        loss = model(**example, labels=torch.tensor([label])).loss
    return torch.autograd.grad(loss, masks)


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_taylor_and_fisher_are_means_over_examples(
    criterion: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model, batch = tiny_model(num_labels=3), tiny_batch()
    rows = [
        mask_gradients(model, example, label)
        for example, label in zip(examples_of(batch), LABELS.tolist(), strict=True)
    ]
    labelled = [{**batch, "labels": LABELS}]
    found = importance(criterion, model, labelled, objective=LABELLED)
    for block, values in enumerate(found):
        gradients = torch.stack([row[block] for row in rows]).double()
        expected = (gradients.abs() if criterion == "taylor" else gradients.square()).mean(0)
        assert (gradients.mean(0).abs() < 0.9 * gradients.abs().mean(0)).any(), "signs differ"
        if criterion == "taylor":
            expected *= math.sqrt(num_weights(model, layout_of(model).blocks[block]))
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet"])
def test_gradient_is_the_norm_of_real_weight_gradients(
    model_type: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model, batch = tiny_model(model_type), tiny_batch()
    layout = layout_of(model)
    weights = [model.get_submodule(block.consumer).weight for block in layout.blocks]
    norms: list[list[Tensor]] = [[] for _ in layout.blocks]
    for example, label in zip(examples_of(batch), LABELS, strict=True):
        loss = model(**example, labels=label[None]).loss
        for block, gradient, rows in zip(
            layout.blocks, torch.autograd.grad(loss, weights), norms, strict=True
        ):
            by_unit = gradient.T.reshape(block.num_units, -1)
            rows.append(by_unit.norm(dim=1) / math.sqrt(by_unit.shape[1]))
    found = importance("gradient", model, [{**batch, "labels": LABELS}], objective=LABELLED)
    for block, values, rows in zip(layout.blocks, found, norms, strict=True):
        expected = num_weights(model, block) * torch.stack(rows).double().mean(0)
        assert expected.std() > 1e-2 * expected.mean() > 0
        torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("criterion", FROM_LOSS)
@pytest.mark.parametrize("num_labels", [1, 2, 4])
def test_importance_does_not_depend_on_the_batches(
    criterion: str, num_labels: int, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model, batch = tiny_model(num_labels=num_labels), tiny_batch()
    together = importance(criterion, model, [batch])
    alone = importance(criterion, model, [*examples_of(batch), *examples_of(batch)])
    other = importance(criterion, model, [tiny_batch(seed=1)])
    for left, right, different in zip(together, alone, other, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-9)
        assert not torch.allclose(left, different, rtol=1e-2)


def test_magnitudes_are_those_of_numpy(tiny_model: Tiny) -> None:
    model = tiny_model("bert")
    by_criterion = [importance(name, model, []) for name in ("magnitude-l1", "magnitude-l2")]
    for block, *found in zip(layout_of(model).blocks, *by_criterion, strict=True):
        weights = unit_weights(model, block).double().numpy()
        assert weights.shape[1] == {"head": 4 * 4 * 16, "neuron": 2 * 16}[block.kind]
        l1 = np.linalg.norm(weights, 1, axis=1)
        l2 = np.linalg.norm(weights, axis=1) * math.sqrt(weights.shape[1])
        np.testing.assert_allclose(found, [l1, l2])


def test_random_importance_depends_on_the_seed_alone(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    first, again, other = (importance("random", tiny_model(), [], seed=seed) for seed in (1, 1, 2))
    elsewhere = importance("random", tiny_model(seed=5), [tiny_batch()], seed=1)
    state = torch.random.get_rng_state()
    for left, same, data, different in zip(first, again, elsewhere, other, strict=True):
        assert torch.equal(left, same)
        assert torch.equal(left, data)
        assert not torch.equal(left, different)
        assert 0 <= float(left.min()) < float(left.max())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_head_compares_with_neurons_of_as_many_weights(
    criterion: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    """Otherwise a global budget would drop all heads before the first neuron, or the reverse."""
    model = tiny_model("bert", hidden_size=64, intermediate_size=256)
    found = importance(criterion, model, [tiny_batch(seed=seed) for seed in range(4)])
    heads, neurons = (torch.cat(found[kind::2]).mean() for kind in (0, 1))
    weights = 4 * 16 * 64 / (2 * 64)
    assert weights / 2 < float(heads / neurons) < 4 * weights


@pytest.mark.parametrize("criterion", FROM_LOSS)
def test_labels_have_an_influence_only_if_they_are_asked_for(
    criterion: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model, batch = tiny_model(), tiny_batch()
    labelled = [{**batch, "labels": LABELS}]
    free, ignored = (importance(criterion, model, given) for given in ([batch], labelled))
    assert all(torch.equal(*pair) for pair in zip(free, ignored, strict=True))
    with_labels = importance(criterion, model, labelled, objective=LABELLED)
    assert not torch.allclose(free[0] / free[0].sum(), with_labels[0] / with_labels[0].sum())
    with pytest.raises(UserError, match="labels"):
        importance(criterion, model, [batch], objective=LABELLED)


@pytest.mark.parametrize("head", ["sequence-classification", "question-answering"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_importance_is_one_number_per_unit_also_under_inference_mode(
    criterion: str, head: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model = tiny_model("bert", head)
    found = importance(criterion, model, [tiny_batch()])
    with torch.inference_mode():
        again = importance(criterion, model, [tiny_batch()])
    for block, values, same in zip(layout_of(model).blocks, found, again, strict=True):
        assert (values.shape, values.dtype) == ((block.num_units,), torch.float64)
        assert (values >= 0).all() and float(values.std()) > 0
        assert torch.equal(values, same)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_the_weights_of_a_unit_are_those_that_compaction_removes(
    model_type: str, tiny_model: Tiny
) -> None:
    """In families with fused, gated, shared or transposed projections."""
    model = tiny_model(model_type)
    layout = layout_of(model)
    for i, block in enumerate(layout.blocks):
        weights = unit_weights(model, block)
        assert weights.shape == (block.num_units, num_weights(model, block))
        for unit in (0, block.num_units - 1):
            masks = full_masks(layout)
            masks[i][unit] = 0
            gone = energy(model) - energy(compact(model, layout, masks))
            assert float(weights[unit].double().square().sum()) == pytest.approx(gone, rel=1e-6)


def energy(model: Any) -> float:
    """Sum of the squares of all weights of linear maps."""
    maps = [part for part in model.modules() if isinstance(part, LINEAR_MAPS)]
    return sum(float(part.weight.detach().double().square().sum()) for part in maps)
