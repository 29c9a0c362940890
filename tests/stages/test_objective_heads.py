"""Fisher factors of tokens, choices and embeddings against exact Fisher information; user losses.

Without these tests padding could count, or choices be taken for examples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rfprune.embeddings import POOLING_ENTRY
from rfprune.errors import UserError
from rfprune.model.frozen import frozen
from rfprune.model.layout import layout_of
from rfprune.model.masks import masked
from rfprune.stages.calibration import Calibration
from rfprune.stages.fisher import collect_gradients
from rfprune.stages.objective import (
    PREDICTIONS,
    batch_generator,
    fisher_factors,
    objective_values,
)
from tests.stages.test_objective import DRAWS, categorical_fisher, gradients_of, outer

Tiny = Callable[..., Any]

CONFIG = transformers.BertConfig(num_labels=2, pad_token_id=0)


def tiny(tiny_model: Tiny, model_class: Any, **changes: Any) -> Any:
    config = tiny_model(**changes).config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config).eval()


# By name: the masks of a batch, and the tokens that count.
MASKS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "attention_mask": ({"attention_mask": [0, 1, 1, 0]}, [1, 2]),
    "no mask": ({}, [0, 1, 2, 3]),
    # the first token of a decoder is the padding token
    "decoder": ({"attention_mask": [1] * 9, "decoder_input_ids": [0, 7, 8, 0]}, [0, 1, 2]),
    "decoder mask": (
        {"decoder_input_ids": [0, 7, 8, 0], "decoder_attention_mask": [0, 1, 1, 0]},
        [1, 2],
    ),
}


@pytest.mark.parametrize("case", MASKS)
def test_tokens_are_sampled_without_bias_and_without_padding(case: str) -> None:
    generator = torch.Generator().manual_seed(3)
    # for each of 4 tokens
    weights = torch.randn(4, 5, 11, generator=generator, dtype=torch.float64)
    masks = torch.ones(DRAWS, 5, dtype=torch.float64, requires_grad=True)
    logits = torch.einsum("bi,siv->bsv", masks, 0.4 * weights)
    given, real = MASKS[case]
    batch = {name: torch.tensor(values).expand(DRAWS, -1) for name, values in given.items()}
    (factor,) = fisher_factors({"logits": logits}, batch, CONFIG, generator)
    estimate = outer(gradients_of(factor, masks)).mean(0)
    fishers = torch.stack([categorical_fisher(0.4 * weight) for weight in weights])
    exact = fishers[real].sum(0)
    assert case == "no mask" or (fishers.sum(0) - exact).norm() > 0.2 * exact.norm()
    assert (estimate - exact).norm() < 0.05 * exact.norm()


def test_labels_without_probability_are_never_sampled() -> None:
    logits = torch.zeros(1, 4000, 4)
    logits[..., [0, 3]] = -60.0  # first and last, where rounding matters
    logits.requires_grad_()
    (factor,) = fisher_factors({"logits": logits}, {}, CONFIG, torch.Generator().manual_seed(0))
    slopes = gradients_of(factor, logits)
    assert slopes[..., [0, 3]].abs().max() < 1e-6
    assert (slopes[..., 1] > 0).any() and (slopes[..., 1] < 0).any()


class _Watch(TorchDispatchMode):
    """Records the size of the largest float64 tensor."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float64:
                self.largest = max(self.largest, tensor.numel())
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_a_language_model_are_never_float64(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 5, 7, dtype=dtype, requires_grad=True)
    with _Watch() as watch:  # type: ignore[no-untyped-call]
        (factor,) = fisher_factors({"logits": logits}, {}, CONFIG, torch.Generator())
        slopes = gradients_of(factor, logits)
        assert watch.largest == 0
        logits.double()
        assert watch.largest == 70, "float64 tensors are recorded"
    assert slopes.dtype == dtype and slopes.abs().max() > 0


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_embeddings_have_the_fisher_of_gaussian_noise(padding: str, pooling: str) -> None:
    """It is JᵀJ, with the Jacobian J of the embedding of one example."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(5, 4 * 3, generator=generator, dtype=torch.float64)
    mask = torch.tensor([1, 1, 1, 0] if padding == "right" else [0, 1, 1, 1])

    def hidden(masks: Tensor) -> Tensor:
        return (torch.tanh(masks) @ weight).view(len(masks), 4, 3)

    def embedding(one: Tensor) -> Tensor:
        states = hidden(one[None])[0]
        tokens = states[mask == 1]
        pooled = {"mean": tokens.mean(0), "cls": tokens[0], "lasttoken": tokens[-1]}[pooling]
        normal: Tensor = pooled / pooled.norm()
        return normal

    jacobian = torch.autograd.functional.jacobian(embedding, torch.ones(5).double())
    masks = torch.ones(DRAWS, 5, dtype=torch.float64, requires_grad=True)
    batch = {"attention_mask": mask.expand(DRAWS, -1)}
    config = transformers.BertConfig(**{POOLING_ENTRY: pooling})
    outputs = {"last_hidden_state": hidden(masks)}
    factors = fisher_factors(outputs, batch, config, generator)
    estimate = torch.stack([outer(gradients_of(factor, masks)).mean(0) for factor in factors])
    exact = jacobian.T @ jacobian
    assert (estimate.sum(0) - exact).norm() < 0.05 * exact.norm()


def test_a_mask_of_another_length_is_refused() -> None:
    outputs = {"logits": torch.zeros(2, 5, 7, requires_grad=True)}
    with pytest.raises(UserError, match=r"shape \(2, 4\); use one number per token"):
        fisher_factors(outputs, {"attention_mask": torch.ones(2, 4)}, CONFIG, torch.Generator())


def test_choices_are_classes() -> None:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    masks = torch.ones(3, 5, dtype=torch.float64, requires_grad=True)
    batch = {"input_ids": torch.ones(3, 4, 6, dtype=torch.long)}
    factors = fisher_factors({"logits": masks @ weight}, batch, CONFIG, generator)
    fisher = torch.stack([outer(gradients_of(factor, masks)) for factor in factors]).sum(0)
    torch.testing.assert_close(fisher, categorical_fisher(weight).expand(3, 5, 5))


def test_an_example_is_all_of_its_choices(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    """The mask of an example acts on all its choices, so its gradient is a sum over them."""
    model = tiny(tiny_model, transformers.BertForMultipleChoice)
    flat = tiny_batch(6)
    batch = {name: values.view(2, 3, -1) for name, values in flat.items()}
    layout = layout_of(model)
    with frozen(model):
        collected = collect_gradients(Calibration(model, layout, [batch]))
        masks = [torch.ones(2, block.num_units, requires_grad=True) for block in layout.blocks]
        with masked(model, layout, [mask.repeat_interleave(3, 0) for mask in masks]):
            outputs = model(**batch)
        factors = fisher_factors(outputs, batch, model.config, torch.Generator())
        expected = [torch.autograd.grad(f.sum(), masks, retain_graph=True) for f in factors]
    for found, block_gradients in zip(collected, zip(*expected, strict=True), strict=True):
        assert found.abs().max() > 1e-4
        torch.testing.assert_close(found, torch.cat(block_gradients), rtol=1e-4, atol=1e-6)


def test_a_loss_is_one_value_per_example_or_their_mean() -> None:
    masks = torch.ones(3, 5, requires_grad=True)
    batch = {"input_ids": torch.ones(3, 2), "labels": torch.tensor([1.0, 2, 3])}

    def loss(outputs: Any, batch: Any) -> Tensor:
        found: Tensor = (outputs["logits"] - batch["labels"]).square()
        return found

    outputs = {"logits": (masks.cumsum(0) * masks).sum(1)}
    found = []
    for objective in (loss, lambda outputs, batch: loss(outputs, batch).mean()):
        (factor,) = objective_values(outputs, batch, CONFIG, torch.Generator(), objective=objective)
        assert factor.shape == (3,)
        found.append(gradients_of(factor, masks))
    assert found[0].abs().max() > 1
    torch.testing.assert_close(found[1], found[0])
    (free,) = objective_values({"logits": outputs["logits"][:, None]}, batch,
                         transformers.BertConfig(num_labels=1), torch.Generator(),
                         objective=PREDICTIONS)  # fmt: skip
    assert not torch.allclose(gradients_of(free, masks), found[0])


@pytest.mark.parametrize(
    ("loss", "problem"),
    [
        (lambda outputs, _: outputs["logits"], r"shape \(3, 2\), but must be .* example, \(3"),
        (lambda *_: 1.0, "float"),
        (lambda outputs, _: outputs["logits"].detach().sum(1), "no gradient with respect to"),
    ],
)
def test_a_loss_of_another_shape_is_refused(loss: Any, problem: str) -> None:
    outputs = {"logits": torch.ones(3, 2, requires_grad=True)}
    with pytest.raises(UserError, match=problem):
        objective_values(outputs, {"input_ids": torch.ones(3, 4)}, CONFIG, torch.Generator(),
                   objective=loss)  # fmt: skip


def test_clip_embeds_by_its_projection(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    """Else by its pooler; the mean over tokens is what neither was trained for."""
    config = tiny_model("clip_vision_model").config
    batch = tiny_batch(model_type="clip_vision_model")
    for made, name in (
        (transformers.CLIPVisionModelWithProjection, "image_embeds"),
        (transformers.CLIPVisionModel, "pooler_output"),
    ):
        with torch.no_grad():
            outputs = made(config).eval()(**batch)
            found = fisher_factors(outputs, batch, config, batch_generator(0, 0))
            outputs["last_hidden_state"] = outputs["last_hidden_state"] + 1
            same = fisher_factors(outputs, batch, config, batch_generator(0, 0))
            outputs[name] = outputs[name] + torch.arange(float(outputs[name].shape[1]))
            other = fisher_factors(outputs, batch, config, batch_generator(0, 0))
        assert all(map(torch.equal, found, same))
        assert not any(map(torch.equal, found, other))
