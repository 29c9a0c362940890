"""Kronecker factors against loops over tokens, and what error curves do and do not depend on.

Without these tests padding could count, or an error curve depend on the batch size.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rfprune.errors import UserError
from rfprune.model.frozen import frozen
from rfprune.model.layout import layout_of
from rfprune.stages.calibration import Calibration
from rfprune.stages.curvature import DEPTH_WEIGHT, KroneckerFactors, collect_curvature, error_curves
from rfprune.stages.least_squares import NumericalFailure
from rfprune.stages.objective import fisher_factors
from rfprune.stages.optimal_brain_surgeon import ErrorCurve, removal_curve


def collect(model: Any, batches: list[Any], **settings: Any) -> list[KroneckerFactors]:
    """The factors of every block."""
    with frozen(model):
        calibration = Calibration(model, layout_of(model), batches, **settings)
        return [factors for _, factors in sorted(collect_curvature(calibration))]


def curves_of(model: Any, factors: list[KroneckerFactors]) -> tuple[ErrorCurve, ...]:
    return error_curves(model, layout_of(model), enumerate(factors))


@pytest.mark.parametrize("model_type", ["bert", "gemma2", "olmo2"])
def test_factors_are_those_of_a_loop_over_tokens(
    model_type: str, tiny_model: Any, tiny_batch: Any
) -> None:
    """Where a norm divides the output of a token, its input is divided and its gradient multiplied
    by the same number."""
    model, batch = tiny_model(model_type), tiny_batch(3, 6)
    layout = layout_of(model)
    collected = collect(model, [batch])
    for index, block in enumerate(layout.blocks):
        seen: list[Tensor] = []
        consumer = model.get_submodule(block.consumer)
        handle = consumer.register_forward_hook(lambda _, i, o, seen=seen: seen.extend((i[0], o)))
        outputs = model(**batch)
        handle.remove()
        factors = fisher_factors(outputs, batch, model.config, torch.Generator())
        inputs, leaving = seen
        divisors: list[float] = []
        expected_inputs = torch.zeros_like(collected[index].input_moment)
        expected_gradients = torch.zeros_like(collected[index].gradient_moment)
        gradients = [torch.autograd.grad(f.sum(), leaving, retain_graph=True)[0] for f in factors]
        for b, s in torch.nonzero(batch["attention_mask"]).tolist():
            rms = 1.0
            if block.sublayer.output_norm is not None:
                norm, output = model.get_submodule(block.sublayer.output_norm), leaving[b, s]
                with torch.no_grad():
                    rms = float((norm(torch.ones_like(output)) * output / norm(output)).mean())
            divisors.append(rms)
            expected_inputs += torch.outer(inputs[b, s], inputs[b, s]).detach() / rms**2
            for gradient in gradients:
                expected_gradients += torch.outer(gradient[b, s], gradient[b, s]) * rms**2
        assert expected_gradients.abs().max() > 0
        assert model_type == "bert" or max(divisors) > 1.2 * min(divisors)
        close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
        close(collected[index].input_moment, expected_inputs)
        close(collected[index].gradient_moment, expected_gradients)
        assert collected[index].tokens == int(batch["attention_mask"].sum())
        assert collected[index].examples == 3


@pytest.mark.parametrize("head", ["sequence-classification", "question-answering"])
def test_curves_do_not_depend_on_batches_or_repeated_examples(
    tiny_model: Any, tiny_batch: Any, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny_model("bert", head), tiny_batch(4, 7)
    # Sampled labels differ from batch to batch: differentiate a fixed output instead.
    monkeypatch.setattr(
        "rfprune.stages.objective.fisher_factors",
        lambda outputs, *_: [outputs[0][:, 0]],
    )
    singles = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(4)]
    reference = curves_of(model, collect(model, [batch]))
    assert max(float(curve.errors[0]) for curve in reference) > 0
    for batches in (singles, [batch, batch], [tiny_batch(4, 7, seed=0)]):
        again = curves_of(model, collect(model, batches))
        for one, two in zip(reference, again, strict=True):
            torch.testing.assert_close(one.errors, two.errors, rtol=1e-3, atol=1e-8)
    other = curves_of(model, collect(model, [tiny_batch(4, 7, seed=1)]))
    assert not torch.allclose(reference[0].errors, other[0].errors, rtol=1e-2)


def test_a_block_whose_gradients_are_not_finite_is_named(tiny_model: Any, tiny_batch: Any) -> None:
    model = tiny_model("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].intermediate.dense.weight[0, 0] = torch.inf
    with pytest.raises(UserError, match=r"after layer\.1 are not finite"):
        collect(model, [tiny_batch()])


def test_a_block_without_output_has_no_error(tiny_model: Any, tiny_batch: Any) -> None:
    model = tiny_model("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.value.weight.zero_()
        model.bert.encoder.layer[0].attention.self.value.bias.zero_()
    curves = curves_of(model, collect(model, [tiny_batch()]))
    assert float(curves[0].errors[0]) == pytest.approx(0.0, abs=1e-12)
    assert float(curves[1].errors[0]) > 1e-6


def test_the_input_covariance_is_about_the_mean_or_about_zero() -> None:
    rows = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).double() + 5
    factors = KroneckerFactors(torch.zeros(3, 3), torch.zeros(3), torch.zeros(2, 2))
    factors.add_inputs(rows.float())
    for centred, plain in (
        (True, torch.cov(rows.T, correction=0)),
        (False, rows.T @ rows / 200),
    ):
        damped = factors.input_covariance(centred=centred)
        expected = plain + 1e-2 * plain.diagonal().mean() * torch.eye(3)
        torch.testing.assert_close(damped.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_constant_unit_is_removed_early_only_if_there_is_a_bias(
    model_type: str, tiny_model: Any, tiny_batch: Any
) -> None:
    model = tiny_model(model_type)
    collected = collect(model, [tiny_batch(8, 9)])
    moments = collected[1]
    spread = torch.zeros_like(moments.input_moment)
    spread[1:, 1:] = moments.input_moment[1:, 1:]
    spread[0, 0] = 1e4 * moments.tokens  # the first neuron is always 100
    sums = moments.input_sum.clone()
    sums[0] = 100 * moments.tokens
    spread[0, 1:] = spread[1:, 0] = 100 * moments.input_sum[1:]
    constant = replace(moments, input_moment=spread, input_sum=sums)
    curves = curves_of(model, [collected[0], constant, *collected[2:]])
    place = curves[1].order.tolist().index(0)
    assert place < 6 if model_type == "gpt2" else place == 11


def test_inputs_that_hardly_vary_about_a_large_mean_have_a_curve(
    tiny_model: Any, tiny_batch: Any
) -> None:
    """Their covariance is smaller than the rounding of the sums, and so not positive definite."""
    model = tiny_model("bert")
    factors = collect(model, [tiny_batch()])
    features = len(factors[1].input_sum)
    generator = torch.Generator().manual_seed(0)
    steady = replace(factors[1], input_moment=torch.zeros(features, features), tokens=0)
    steady.input_sum = torch.zeros(features)
    for _ in range(50):
        steady.add_inputs(30 + 1e-4 * torch.randn(64, features, generator=generator))
    with pytest.raises(NumericalFailure):
        removal_curve(steady.input_covariance(), torch.ones(2, features), torch.eye(2), 1)
    curve = curves_of(model, [factors[0], steady])[1]
    assert sorted(curve.order.tolist()) == list(range(features))
    outputs = 30 * model.bert.encoder.layer[0].output.dense.weight.detach().sum(1)
    loss = float(outputs @ steady.gradient_moment @ outputs) / (2 * steady.examples)
    assert 0 <= float(curve.errors[0]) < 0.01 * loss  # the bias makes up for constant inputs


def test_inputs_that_are_not_finite_have_no_curve(tiny_model: Any, tiny_batch: Any) -> None:
    model = tiny_model("bert")
    factors = collect(model, [tiny_batch()])
    factors[1].input_moment.fill_(torch.nan)
    with pytest.raises(UserError, match=r"error curve of layer\.0\.neurons cannot be computed"):
        curves_of(model, factors)


@pytest.mark.parametrize(("model_type", "depth"), [("bert", DEPTH_WEIGHT), ("llama", 0.0)])
def test_lower_layers_of_post_norm_models_have_more_weight(
    model_type: str, depth: float, tiny_model: Any, tiny_batch: Any
) -> None:
    model = tiny_model(model_type)
    layout = layout_of(model)
    moments = collect(model, [tiny_batch(model_type=model_type)])
    for block, curve, own in zip(layout.blocks, curves_of(model, moments), moments, strict=True):
        consumer = model.get_submodule(block.consumer)
        plain = removal_curve(
            own.input_covariance(centred=consumer.bias is not None),
            consumer.weight.detach(),
            own.gradient_moment.double() / (2 * own.examples),
            block.unit_width,
        )
        low = math.exp(depth) if block.layer == 0 else 1.0  # of two
        torch.testing.assert_close(curve.errors, low * plain.errors, rtol=1e-6, atol=0)


def test_factors_of_shared_layers_are_sums_over_their_runs(
    tiny_model: Any, tiny_batch: Any
) -> None:
    model, batches = tiny_model("albert", num_hidden_groups=1), [tiny_batch()]
    layout = layout_of(model)
    summed = collect(model, batches)
    entering: list[Tensor] = []
    tokens = batches[0]["attention_mask"].bool()
    consumer = model.get_submodule(layout.blocks[1].consumer)
    handle = consumer.register_forward_hook(lambda _, x, __: entering.append(x[0][tokens]))
    with torch.no_grad():
        model(**batches[0])
    handle.remove()
    assert len(entering) == 4
    assert summed[1].tokens == 4 * int(tokens.sum())
    expected = sum(rows.T @ rows for rows in entering)
    torch.testing.assert_close(summed[1].input_moment, expected, rtol=1e-4, atol=1e-4)
    assert (expected - entering[0].T @ entering[0]).abs().max() > 0.1
