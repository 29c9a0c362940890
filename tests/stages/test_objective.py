"""Fisher factors against brute force over all labels, and losses against those of transformers.

Without these tests the importance of units could be that of another quantity than the documented.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from rfprune.errors import UserError
from rfprune.stages.objective import EXACT_CLASSES, fisher_factors, label_losses

Tiny = Callable[..., Any]
DRAWS = 20_000


def config_of(num_labels: int, problem_type: str | None = None) -> Any:
    return SimpleNamespace(num_labels=num_labels, problem_type=problem_type)


def network(num_outputs: int, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """A function from masks (B, 5) to logits (B, num_outputs), in float64."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, num_outputs, generator=generator, dtype=torch.float64)
    return lambda masks: torch.tanh(inputs[: len(masks)] * masks) @ weight


def gradients_of(values: Tensor, masks: Tensor) -> Tensor:
    """Gradients (B, 5) of values (B,) with respect to masks (B, 5)."""
    return torch.autograd.grad(values.sum(), masks, retain_graph=True)[0]


def outer(gradients: Tensor) -> Tensor:
    return torch.einsum("bi,bj->bij", gradients, gradients)


def fisher_of_factors(logits: Tensor, masks: Tensor, config: Any) -> Tensor:
    factors = fisher_factors({"logits": logits}, {}, config, torch.Generator().manual_seed(0))
    return torch.stack([outer(gradients_of(factor, masks)) for factor in factors]).sum(0)


@pytest.mark.parametrize("num_classes", [2, 3, EXACT_CLASSES])
def test_classification_is_the_sum_over_classes(num_classes: int) -> None:
    masks = torch.ones(3, 5, dtype=torch.float64, requires_grad=True)
    logits = network(num_classes)(masks)
    log_probabilities = logits.log_softmax(-1)
    brute = torch.zeros(3, 5, 5, dtype=torch.float64)
    for c in range(num_classes):
        probability = log_probabilities[:, c].exp().detach()[:, None, None]
        brute += probability * outer(gradients_of(log_probabilities[:, c], masks))
    assert brute.abs().min() > 0
    torch.testing.assert_close(fisher_of_factors(logits, masks, config_of(num_classes)), brute)


def test_a_certain_model_has_no_fisher_information() -> None:
    masks = torch.ones(3, 5, dtype=torch.float64, requires_grad=True)
    logits = 1e4 * network(3)(masks)
    fisher = fisher_of_factors(logits, masks, config_of(3))
    assert torch.isfinite(fisher).all()
    assert fisher.abs().max() < 1e-6


def categorical_fisher(weight: Tensor) -> Tensor:
    """Fisher information (5, 5) of logits = masks @ weight, at masks of ones."""
    p = weight.sum(0).softmax(-1)
    return weight @ (torch.diag(p) - torch.outer(p, p)) @ weight.T


@pytest.mark.parametrize("names", [("logits",), ("start_logits", "end_logits")])
def test_many_classes_and_answers_are_sampled_without_bias(names: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    size = (5, EXACT_CLASSES + 1)
    weights = [0.3 * torch.randn(size, generator=generator).double() for _ in names]
    masks = torch.ones(DRAWS, 5, dtype=torch.float64, requires_grad=True)
    outputs = {name: masks @ weight for name, weight in zip(names, weights, strict=True)}
    (factor,) = fisher_factors(outputs, {}, config_of(size[1]), generator)
    found = outer(gradients_of(factor, masks)).mean(0)
    exact = torch.stack([categorical_fisher(weight) for weight in weights]).sum(0)
    assert (found - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(("num_outputs", "problem_type"), [(1, None), (3, "regression")])
def test_regression_is_the_gradient_of_the_outputs(
    num_outputs: int, problem_type: str | None
) -> None:
    masks = torch.ones(3, 5, dtype=torch.float64, requires_grad=True)
    outputs = network(num_outputs)(masks)
    brute = sum(outer(gradients_of(outputs[:, k], masks)) for k in range(num_outputs))
    fisher = fisher_of_factors(outputs, masks, config_of(num_outputs, problem_type))
    torch.testing.assert_close(fisher, brute)


def test_multi_label_classification_is_the_sum_over_label_sets() -> None:
    masks = torch.ones(3, 5, dtype=torch.float64, requires_grad=True)
    logits = network(3)(masks)
    brute = torch.zeros(3, 5, 5, dtype=torch.float64)
    for labels in torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3):  # all 8 combinations
        signs = 2 * labels.double() - 1
        log_probability = torch.nn.functional.logsigmoid(signs * logits).sum(1)
        probability = log_probability.exp().detach()[:, None, None]
        brute += probability * outer(gradients_of(log_probability, masks))
    config = config_of(3, "multi_label_classification")
    torch.testing.assert_close(fisher_of_factors(logits, masks, config), brute)


LABELLED: list[tuple[Any, dict[str, Any], dict[str, Tensor]]] = [
    (BertForSequenceClassification, {"num_labels": 3}, {"labels": torch.tensor([0, 2, 1, 2])}),
    (BertForSequenceClassification, {"num_labels": 1}, {"labels": torch.tensor([0.5, 2, -1, 3])}),
    (
        BertForSequenceClassification,
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        {"labels": torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])},
    ),
    (
        BertForQuestionAnswering,
        {},
        {
            "start_positions": torch.tensor([0, 3, 1, 7]),  # the last one is beyond the 7 tokens
            "end_positions": torch.tensor([2, 3, 6, 9]),
        },
    ),
    (
        BertForTokenClassification,
        {"num_labels": 3},
        {"labels": torch.tensor([[-100, 0, 2, 1, -100, -100, -100]] * 4)},
    ),
    (BertForMultipleChoice, {}, {"labels": torch.tensor([1, 0])}),
]


@pytest.mark.parametrize(("model_class", "changes", "labels"), LABELLED)
def test_losses_are_those_of_transformers(
    model_class: Any,
    changes: dict[str, Any],
    labels: dict[str, Tensor],
    tiny_model: Tiny,
    tiny_batch: Tiny,
) -> None:
    torch.manual_seed(0)
    model, batch = model_class(tiny_model("bert", **changes).config).eval(), tiny_batch()
    if model_class is BertForMultipleChoice:
        batch = {name: values.view(2, 2, -1) for name, values in batch.items()}
    (losses,) = label_losses(model(**batch), {**batch, **labels}, model.config)
    for row, loss in enumerate(losses):
        example = {name: value[row : row + 1] for name, value in {**batch, **labels}.items()}
        if model_class is BertForQuestionAnswering and row == 3:
            expected = torch.tensor(0.0)  # transformers returns nan, a mean over no examples
        else:
            expected = model(**example).loss
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert losses[:3].min() > 0


@pytest.mark.parametrize("head", ["sequence-classification", "question-answering"])
def test_missing_labels_are_named(head: str, tiny_model: Tiny, tiny_batch: Tiny) -> None:
    model, batch = tiny_model("bert", head), tiny_batch()
    with pytest.raises(UserError, match=r"hold no (labels|start_positions and end_positions),"):
        label_losses(model(**batch), batch, model.config)


def test_outputs_without_an_objective_are_refused() -> None:
    labels = torch.ones(2, 7, dtype=torch.long)
    discriminator, causal = {"logits": torch.zeros(2, 7)}, {"logits": torch.zeros(2, 7, 11)}
    for outputs in (discriminator, {}):
        with pytest.raises(UserError, match="no output that an objective is defined for"):
            fisher_factors(outputs, {}, config_of(2), torch.Generator())
        with pytest.raises(UserError, match="no output that an objective is defined for"):
            label_losses(outputs, {"labels": labels}, config_of(2))
    with pytest.raises(UserError, match="use_labels.* language models.* leave it out"):
        label_losses(causal, {"labels": labels}, config_of(2))
