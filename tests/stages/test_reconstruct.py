"""Reconstruction: the targets of each block, on which tokens, and what remains after a failure.

Without these tests a block could be fitted to the wrong layer, to padding or to the residual of the
wrong model, or one failure could stop all later blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rfprune.model.batch import DECODER_TOKEN_MASK, Batch, model_inputs, token_mask
from rfprune.model.compact import compact
from rfprune.model.encoder_decoder import add_decoder_inputs, block_token_mask
from rfprune.model.frozen import frozen
from rfprune.model.layerwise import add_signal_token_mask, layer_scale
from rfprune.model.layout import Block, Layout, layout_of
from rfprune.model.masks import full_masks, masked
from rfprune.stages.least_squares import Moments, NumericalFailure, solve_weights
from rfprune.stages.reconstruct import BlockFit, reconstruct

Tiny = Callable[..., Any]
Pair = tuple[Tensor, Tensor | None]
FAMILIES = [
    *("bert", "distilbert", "mpnet", "modernbert", "albert", "deberta-v2"),
    *("bart", "pegasus", "t5", "mt5"),
    *("gpt2", "opt", "llama", "qwen3", "gemma2", "gpt_neox", "granite"),
    *("vit", "beit", "dinov2"),  # images, without padding
]


class Spy:
    """A solve that changes nothing and keeps the moments of every block."""

    def __init__(self) -> None:
        self.moments: dict[str, Moments] = {}
        self.errors: dict[str, float] = {}  # mean square over tokens, with the present weights

    def __call__(
        self, block: Block, seen: Moments, held_out: Moments, weight: Tensor, bias: Tensor | None
    ) -> Pair:
        moments = seen + held_out
        self.moments[block.name] = moments
        self.errors[block.name] = moments.error(weight, bias) / moments.count
        return weight, bias


def unpruned(teacher: Any) -> tuple[Layout, Any]:
    """The layout of the teacher, and a student with all units."""
    layout = layout_of(teacher)
    return layout, compact(teacher, layout, full_masks(layout))


def refit(_: Block, moments: Moments, __: Moments, weight: Tensor, bias: Tensor | None) -> Pair:
    return solve_weights(moments, ridge=1e-8, intercept=bias is not None)


def run(
    teacher: Any, student: Any, layout: Layout, batches: Any, fit: Any, **how: Any
) -> list[str]:
    with frozen(teacher), frozen(student):
        return reconstruct(teacher, student, layout, batches, BlockFit(fit, **how))


def hidden_of(model: Any, batch: Batch) -> Tensor:
    """Last hidden states of the real tokens, (tokens, d)."""
    with torch.no_grad():
        states = model.base_model(**model_inputs(batch)).last_hidden_state
    tokens = batch.get(DECODER_TOKEN_MASK, token_mask(batch))
    return states[tokens]  # type: ignore[no-any-return]


def batches_of(
    tiny_batch: Tiny, model: Any = None, *, padding: str = "right", count: int = 3
) -> list[Batch]:
    kind = "bert" if model is None else model.config.model_type
    made = [
        tiny_batch(8, 7 + seed % 3, padding=padding, seed=seed, model_type=kind)
        for seed in range(count)
    ]
    return made if model is None else [noted(model, one) for one in made]


def noted(model: Any, batch: Batch) -> Batch:
    if model.config.is_encoder_decoder:
        return add_decoder_inputs(model, batch)
    return add_signal_token_mask(model, layout_of(model), batch)


@pytest.mark.parametrize(
    ("model_type", "padding"),
    [*((each, "right") for each in FAMILIES), *((each, "left") for each in FAMILIES[:-3])],
)
def test_a_student_equal_to_its_teacher_has_no_error(
    model_type: str, padding: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    teacher, spy = tiny_model(model_type), Spy()
    batches = batches_of(tiny_batch, teacher, padding=padding)
    layout, student = unpruned(teacher)
    assert run(teacher, student, layout, batches, spy) == []
    assert list(spy.errors) == [block.name for block in layout.blocks]
    for block in layout.blocks:
        tokens = sum(int(block_token_mask(layout, block, batch).sum()) for batch in batches)
        moments = spy.moments[block.name]
        assert moments.count == layout.num_runs(block) * tokens
        assert spy.errors[block.name] < 1e-5 * moments.target_energy / moments.count
        assert moments.target_energy > 1


@pytest.mark.parametrize("model_type", FAMILIES)
def test_damaged_out_projections_are_repaired(
    model_type: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    teacher = tiny_model(model_type)
    batches = batches_of(tiny_batch, teacher)
    layout, student = unpruned(teacher)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in layout.blocks:
            consumer = student.get_submodule(block.consumer)
            consumer.weight.copy_(torch.randn(consumer.weight.shape, generator=generator))
            if consumer.bias is not None:
                consumer.bias.zero_()
    expected = hidden_of(teacher, batches[0])
    assert (hidden_of(student, batches[0]) - expected).abs().mean() > 0.1
    assert run(teacher, student, layout, batches, refit) == []
    assert (hidden_of(student, batches[0]) - expected).abs().max() < 1e-2
    for block in layout.blocks:
        for name, true in teacher.get_submodule(block.consumer).named_parameters():
            found = student.get_parameter(f"{block.consumer}.{name}")
            torch.testing.assert_close(found, true, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [*((model_type, torch.float32) for model_type in FAMILIES), ("bert", torch.bfloat16)],
)
def test_later_blocks_correct_errors_of_earlier_ones(
    model_type: str, dtype: torch.dtype, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    teacher = tiny_model(model_type).to(dtype)
    batches = batches_of(tiny_batch, teacher)
    layout = layout_of(teacher)
    masks = full_masks(layout)
    masks[0][:2], masks[1][:6], masks[2][1:], masks[3][:3] = 0, 0, 0, 0
    plain, fitted = compact(teacher, layout, masks), compact(teacher, layout, masks)
    assert run(teacher, fitted, layout, batches, refit) == []
    assert {parameter.dtype for parameter in fitted.parameters()} == {dtype}
    expected = hidden_of(teacher, batches[0]).float()
    before = (hidden_of(plain, batches[0]) - expected).square().mean()
    after = (hidden_of(fitted, batches[0]) - expected).square().mean()
    # an output of fixed length, as in Gemma, has no room for errors of the residual
    assert after < (0.9 if model_type == "gemma2" else 0.8) * before


def test_the_target_corrects_the_residual(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    """Target plus student residual is the teacher's residual sum, by full forward passes."""
    teacher, batch, spy = tiny_model(), tiny_batch(), Spy()
    layout = layout_of(teacher)
    masks = full_masks(layout)
    masks[0][:3] = 0
    student = compact(teacher, layout, masks)
    neurons, seen = layout.blocks[1], []

    def watch(model: Any, path: str | None) -> None:
        assert path is not None
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])))

    handles: list[Any] = []
    watch(teacher, neurons.sublayer.next_norm)
    watch(student, neurons.consumer)
    watch(student, neurons.sublayer.next_norm)
    tokens = batch["attention_mask"].bool()
    with torch.no_grad():
        teacher(**batch), student(**batch)
        for handle in handles:
            handle.remove()
        teacher_sum, features, student_sum = seen
        residual = student_sum - student.get_submodule(neurons.consumer)(features)
    run(teacher, student, layout, [batch], spy)
    expected = Moments.zeros(12, 16)
    expected.add(features[tokens], (teacher_sum - residual)[tokens])
    moments = spy.moments[neurons.name]
    torch.testing.assert_close(moments.gram, expected.gram, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.cross, expected.cross, rtol=1e-4, atol=1e-4)
    assert spy.errors["layer.0.neurons"] > 1e-2


def test_a_failed_block_is_reported_and_later_blocks_are_fitted(
    tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    teacher = tiny_model()
    layout, student = unpruned(teacher)
    before = {name: value.clone() for name, value in student.state_dict().items()}

    def fit(
        block: Block, moments: Moments, _: Moments, weight: Tensor, bias: Tensor | None
    ) -> Pair:
        if block.name == "layer.0.heads":
            raise NumericalFailure("for a test")
        if block.name == "layer.1.heads":
            return weight * torch.nan, bias
        return 2 * weight, None if bias is None else bias + 1

    failures = run(teacher, student, layout, [tiny_batch()], fit)
    assert failures == [
        "layer.0.heads was left unchanged: for a test",
        "layer.1.heads was left unchanged: the fitted weights are not finite",
    ]
    changed = {
        name for name, value in student.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {
        f"bert.encoder.layer.{layer}.output.dense.{name}"
        for layer in (0, 1)
        for name in ("weight", "bias")
    }


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_block_without_units_gets_the_mean_as_its_bias(
    model_type: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    teacher, spy = tiny_model(model_type), Spy()
    batches = batches_of(tiny_batch, teacher)
    layout = layout_of(teacher)
    masks = full_masks(layout)
    masks[0][:], masks[3][:] = 0, 0
    student = compact(teacher, layout, masks)
    assert run(teacher, student, layout, batches, spy, align=True) == []
    assert run(teacher, student, layout, batches, refit) == []
    moments = spy.moments["layer.0.heads"]
    mean = (moments.target_sum / moments.count).float()
    bias = student.get_submodule(layout.blocks[0].consumer).bias
    if bias is None:
        return
    scale = layer_scale(student, layout.blocks[0])
    torch.testing.assert_close(bias if scale is None else scale * bias, mean, rtol=1e-4, atol=1e-5)
    if scale is not None:
        return
    assert (mean - teacher.get_submodule(layout.blocks[0].consumer).bias).abs().max() > 1e-2


def test_layers_without_blocks(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    """The first layer of the model has lost all its units in an earlier pruning."""
    dense = tiny_model(num_hidden_layers=3)
    masks = full_masks(layout_of(dense))
    masks[0][:], masks[1][:], masks[4][:] = 0, 0, 0
    teacher = compact(dense, layout_of(dense), masks)
    (layout, student), batches, spy = unpruned(teacher), batches_of(tiny_batch), Spy()
    assert [block.name for block in layout.blocks] == [
        *("layer.1.heads", "layer.1.neurons", "layer.2.neurons"),
    ]
    assert run(teacher, student, layout, batches, spy) == []
    assert max(spy.errors.values()) < 1e-5


def test_masks_on_the_teacher_have_an_effect(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    teacher, batches, spy, plain = tiny_model(), batches_of(tiny_batch), Spy(), Spy()
    layout = layout_of(teacher)
    masks = full_masks(layout)
    masks[0][1], masks[1][:4], masks[3][5:] = 0, 0.5, 0
    student = compact(teacher, layout, masks)
    with masked(teacher, layout, masks):
        run(teacher, student, layout, batches, spy)
    run(teacher, student, layout, batches, plain)
    assert max(spy.errors.values()) < 1e-5 < 1e-2 < min(plain.errors.values())


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_block_fitted_on_the_first_token_alone(
    padding: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    teacher, spy = tiny_model(), Spy()
    (layout, student), batch = unpruned(teacher), tiny_batch(padding=padding)
    last = layout.blocks[3]
    run(teacher, student, layout, [batch], spy, first_token_only=[last.consumer])
    assert [spy.moments[block.name].count for block in layout.blocks] == [*[25] * 3, 4]
    seen: list[Tensor] = []
    consumer = student.get_submodule(last.consumer)
    handle = consumer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    student(**batch)
    handle.remove()
    first = batch["attention_mask"].argmax(1)
    expected = seen[0][range(4), first].double().sum(0)
    torch.testing.assert_close(spy.moments[last.name].feature_sum, expected, rtol=1e-4, atol=1e-5)


def test_an_interruption_leaves_the_teacher_and_no_hooks(
    tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    teacher = tiny_model()
    layout, student = unpruned(teacher)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}

    def fail(*_: Any) -> Pair:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(teacher, student, layout, [tiny_batch()], fail)
    for model in (teacher, student):
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_every_eighth_batch_is_held_out_and_skipped_blocks_are_not_fitted(
    tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model = tiny_model()
    layout, student = unpruned(model)
    batches = [tiny_batch(2, 5, padding="none", seed=seed) for seed in range(17)]
    counts = {}

    def solve(
        block: Block, train: Moments, held_out: Moments, weight: Tensor, bias: Tensor | None
    ) -> Pair:
        counts[block.name] = (train.count, held_out.count)
        return weight, bias

    skip = {layout.blocks[0].consumer, layout.blocks[3].consumer}
    run(model, student, layout, batches, solve, skip=skip)
    assert counts == {"layer.0.neurons": (150, 20), "layer.1.heads": (150, 20)}
