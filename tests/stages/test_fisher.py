"""Mask gradients of tiny models: one vector per example, independent of its batch.

Without these tests the gradients of an example could depend on others in its batch, or on labels in
a run without labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rfprune.errors import UserError
from rfprune.model.frozen import frozen
from rfprune.model.layout import layout_of
from rfprune.model.masks import full_masks, masked
from rfprune.stages.calibration import Calibration
from rfprune.stages.fisher import collect_gradients, diagonal_fisher
from rfprune.stages.objective import LABELLED, PREDICTIONS, Objective
from tests.stages.test_importance import LABELS, examples_of

Tiny = Callable[..., Any]


def collect(
    model: Any, batches: list[dict[str, Tensor]], *, per_batch: bool = False, **options: Any
) -> tuple[Tensor, ...]:
    with frozen(model):
        return collect_gradients(
            Calibration(model, layout_of(model), batches, **options), per_batch=per_batch
        )


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet"])
@pytest.mark.parametrize("objective", [PREDICTIONS, LABELLED])
def test_every_example_has_its_own_gradient(
    model_type: str, objective: Objective, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model, batch = tiny_model(model_type), {**tiny_batch(), "labels": LABELS}
    together = collect(model, [batch], objective=objective)
    alone = collect(model, examples_of(batch), objective=objective)
    for block, left, right in zip(layout_of(model).blocks, together, alone, strict=True):
        assert left.shape == (4, block.num_units)
        assert left.dtype == torch.float32
        signs = torch.sign(
            (left * right).sum(1, keepdim=True)
        )  # the sign of a Fisher factor is arbitrary
        torch.testing.assert_close(left, right * signs, rtol=1e-3, atol=1e-5)
        assert left.abs().max() > 1e-3
        assert not torch.allclose(left[0], left[1], rtol=0.1)


def test_gradients_on_labels_are_those_of_the_loss(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    model, batch = tiny_model(num_labels=3), tiny_batch()
    layout = layout_of(model)
    labels = torch.tensor([0, 2, 1, 2])
    masks = [mask.requires_grad_() for mask in full_masks(layout)]
    with masked(model, layout, masks):
        model(**batch, labels=labels).loss.backward()
    labelled = [{**batch, "labels": labels}]
    for per_batch in (False, True):
        found = collect(model, labelled, objective=LABELLED, per_batch=per_batch)
        for mask, gradient in zip(masks, found, strict=True):
            assert mask.grad is not None
            torch.testing.assert_close(gradient.mean(0), mask.grad, rtol=1e-4, atol=1e-6)


def test_several_classes_give_several_rows_per_example(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    gradients = collect(tiny_model(num_labels=4), [tiny_batch(), tiny_batch(2, 5)])
    assert [len(gradient) for gradient in gradients] == [3 * (4 + 2)] * 4


def test_batch_means_estimate_the_diagonal_fisher(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    """With random signs, cross terms between the examples of a batch vanish on average."""
    model, batch = tiny_model(), tiny_batch()
    exact = [importance / 16 for importance in diagonal_fisher(collect(model, [batch]))]
    draws = [collect(model, [batch], per_batch=True, seed=seed) for seed in range(200)]
    assert draws[0][0].shape == (1, 4)
    for block, expected in enumerate(exact):
        mean = torch.cat([draw[block] for draw in draws]).double().square().mean(0)
        assert (mean - expected).norm() < 0.2 * expected.norm()


def test_sampled_labels_depend_on_the_seed_alone(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    model, batch = tiny_model("bert", "question-answering"), tiny_batch()
    before = torch.random.get_rng_state()
    first, again = (collect(model, [batch], seed=3)[0] for _ in range(2))
    assert torch.equal(first, again)
    others = [collect(model, [batch], seed=seed)[0] for seed in range(4, 9)]
    assert any(not torch.equal(first, other) for other in others)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_gradients_do_not_depend_on_the_form_of_the_batch_or_the_mode_of_the_caller(
    tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model, batch = tiny_model(), tiny_batch(padding="none")
    ids, expected = batch["input_ids"], collect(model, [batch])
    with torch.inference_mode():
        found = [collect(model, [batch])]
    embeds = model.get_input_embeddings()(ids).detach()
    others = (
        {"input_ids": ids},
        {"inputs_embeds": embeds},
        {"position_ids": torch.arange(7)[None], "input_ids": ids},
    )
    found += [collect(model, [other]) for other in others]
    model.config.return_dict = False
    found.append(collect(model, [batch]))
    for gradients in found:
        for left, right in zip(gradients, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_half_precision_is_collected_in_float32(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    model, batch = tiny_model(), tiny_batch()
    expected = diagonal_fisher(collect(model, [batch]))
    half = collect(model.to(torch.bfloat16), [batch])
    assert all(gradient.dtype == torch.float32 for gradient in half)
    for left, right in zip(diagonal_fisher(half), expected, strict=True):
        assert (left - right).norm() < 0.2 * right.norm()


def test_the_block_of_a_gradient_that_is_not_finite_is_named(
    tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = torch.inf
    with pytest.raises(UserError, match=r"after layer\.1 are not finite"):
        collect(model, [tiny_batch()])
    assert all(not module._forward_pre_hooks for module in model.modules())
