"""What every architecture must satisfy, with both heads: the contract that pruning rests on.

Deleting this lets a new row of the table, or a new release of transformers, break pruning for one
family in silence: masks that miss a unit, a compact model that computes something else, a folder
that loads into the wrong shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from rfprune.model.architectures import ARCHITECTURES
from rfprune.model.checkpoint import load_pruned, save_pruned
from rfprune.model.compact import compact
from rfprune.model.layout import Layout, layout_of
from rfprune.model.linear import weight_of
from rfprune.model.masks import frozen, full_masks, masked
from rfprune.model.replay import layer_calls, pack, run_layer, token_mask, unpack

HEADS = {
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
}
CASES = [(model_type, head) for model_type in sorted(ARCHITECTURES) for head in HEADS]

Batch = dict[str, Tensor]


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    chosen: tuple[str, str] = request.param
    return chosen


@pytest.fixture
def model(case: tuple[str, str], tiny_model: Callable[..., Any]) -> Any:
    return tiny_model(*case)


@pytest.fixture
def layout(model: Any) -> Layout:
    return layout_of(model)


@pytest.fixture
def batch(tiny_batch: Callable[..., Batch]) -> Batch:
    return tiny_batch()


def outputs_of(model: Any, batch: Batch) -> Tensor:
    """Class logits (B, C), or start and end logits (B, 2·S) with zeros at padding."""
    with torch.no_grad():
        outputs = model(**batch)
    if "logits" in outputs:
        return outputs["logits"]  # type: ignore[no-any-return]
    tokens = batch["attention_mask"]
    return torch.cat([outputs["start_logits"] * tokens, outputs["end_logits"] * tokens], dim=1)


def mixed_masks(layout: Layout) -> tuple[Tensor, ...]:
    """A third of the units removed, a third scaled, a third as they were, in another order each."""
    values = torch.tensor([0.0, 1.0, 0.5, 0.0, -1.5, 1.0])
    return tuple(
        values.repeat(block.num_units)[start : start + block.num_units]
        for start, block in enumerate(layout.blocks)
    )


def emptied(layout: Layout, *empty: str) -> tuple[Tensor, ...]:
    """Masks that remove all units of the blocks named and one of every other."""
    masks = full_masks(layout)
    for block, mask in zip(layout.blocks, masks, strict=True):
        mask[: block.num_units if block.name in empty else 1] = 0
    return masks


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def folded(model: Any, layout: Layout, masks: Sequence[Tensor]) -> Any:
    """A copy of the model with the masks in the columns of its out-projections, nothing removed."""
    copied = copy.deepcopy(model)
    for block, mask in zip(layout.blocks, masks, strict=True):
        consumer = copied.get_submodule(block.consumer)
        weight_of(consumer).data *= mask.repeat_interleave(block.unit_width)
    return copied


def masked_outputs(model: Any, layout: Layout, masks: Sequence[Tensor], batch: Batch) -> Tensor:
    with masked(model, layout, masks):
        return outputs_of(model, batch)


def test_the_layout_finds_all_heads_and_neurons(model: Any, layout: Layout) -> None:
    shapes = [(b.kind, b.layer, b.num_units, b.unit_width) for b in layout.blocks]
    assert shapes == [
        ("head", 0, 4, 4),
        ("neuron", 0, 12, 1),
        ("head", 1, 4, 4),
        ("neuron", 1, 12, 1),
    ]


def test_masks_of_ones_change_no_bit(model: Any, layout: Layout, batch: Batch) -> None:
    plain = outputs_of(model, batch)
    assert torch.equal(masked_outputs(model, layout, full_masks(layout), batch), plain)
    per_example = [mask.expand(4, -1) for mask in full_masks(layout)]
    assert torch.equal(masked_outputs(model, layout, per_example, batch), plain)


def test_every_unit_moves_the_output(model: Any, layout: Layout, batch: Batch) -> None:
    plain = outputs_of(model, batch)
    seen = [plain]
    for i, block in enumerate(layout.blocks):
        for unit in range(block.num_units):
            masks = full_masks(layout)
            masks[i][unit] = 0
            moved = masked_outputs(model, layout, masks, batch)
            nearest = min(float((moved - other).abs().max()) for other in seen)
            assert nearest > 1e-4, f"unit {unit} of {block.name} changes nothing of its own"
            seen.append(moved)


@pytest.mark.parametrize("padding", ["right", "left", "none"])
def test_masked_folded_compact_and_reloaded_agree(
    model: Any,
    layout: Layout,
    padding: str,
    case: tuple[str, str],
    tiny_batch: Callable[..., Batch],
    tmp_path: Path,
) -> None:
    batch, masks = tiny_batch(padding=padding), mixed_masks(layout)
    expected = masked_outputs(model, layout, masks, batch)
    assert (expected - outputs_of(model, batch)).abs().max() > 1e-2
    small = compact(model, layout, masks)
    assert_close(outputs_of(folded(model, layout, masks), batch), expected)
    assert_close(outputs_of(small, batch), expected)
    if padding != "right":
        return
    save_pruned(small, layout, masks, tmp_path)
    exact = outputs_of(small, batch)
    assert torch.equal(outputs_of(load_pruned(tmp_path), batch), exact)
    with_code = HEADS[case[1]].from_pretrained(tmp_path, trust_remote_code=True)
    assert type(with_code).__module__.startswith("transformers_modules")
    assert torch.equal(outputs_of(with_code, batch), exact)


def test_a_batch_of_one_without_attention_mask(
    model: Any, layout: Layout, tiny_batch: Callable[..., Batch]
) -> None:
    ids = tiny_batch(1, padding="none")["input_ids"]
    masks = mixed_masks(layout)
    with torch.no_grad():
        small = compact(model, layout, masks)(ids)[0]
        with masked(model, layout, masks):
            expected = model(ids)[0]
    assert_close(small, expected)


@pytest.mark.parametrize(
    "empty",
    [
        ("layer.0.heads",),
        ("layer.1.neurons",),
        ("layer.1.heads", "layer.0.neurons"),
        ("layer.0.heads", "layer.0.neurons", "layer.1.heads", "layer.1.neurons"),
    ],
    ids="+".join,
)
def test_emptied_sublayers_agree_and_cost_nothing(
    model: Any, layout: Layout, batch: Batch, empty: tuple[str, ...], tmp_path: Path
) -> None:
    masks = emptied(layout, *empty)
    expected = masked_outputs(model, layout, masks, batch)
    assert (expected - outputs_of(model, batch)).abs().max() > 1e-2
    small = compact(model, layout, masks)
    assert_close(outputs_of(small, batch), expected)
    small.save_pretrained(tmp_path)
    assert torch.equal(outputs_of(load_pruned(tmp_path), batch), outputs_of(small, batch))
    present = {block.name for block in layout_of(small).blocks}
    assert present == {block.name for block in layout.blocks} - set(empty)
    linears = {path for path, part in small.named_modules() if isinstance(part, torch.nn.Linear)}
    for block in layout.blocks:
        paths = {*(producer.path for producer in block.producers), block.consumer}
        assert paths & linears == (set() if block.name in empty else paths)


def test_an_unpruned_class_refuses_an_emptied_checkpoint(
    model: Any, layout: Layout, case: tuple[str, str], tmp_path: Path, capfd: Any
) -> None:
    masks = full_masks(layout)
    masks[0].zero_()  # nothing is resized: only an attention is missing
    compact(model, layout, masks).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size"):
        HEADS[case[1]].from_pretrained(tmp_path)


def test_pruned_twice_is_pruned_once_with_both_masks(
    model: Any, layout: Layout, batch: Batch, tmp_path: Path
) -> None:
    first = mixed_masks(layout)
    once = compact(model, layout, first)
    layout_once = layout_of(once)
    second = [torch.ones(block.num_units) for block in layout_once.blocks]
    second[0][0], second[1][1], second[2][-1], second[3][:] = 0, 3.0, 0, 0
    both = [mask.clone() for mask in first]
    for mask, more in zip(both, second, strict=True):
        mask[mask != 0] *= more
    expected = masked_outputs(model, layout, both, batch)
    twice = compact(once, layout_once, second)
    assert (expected - outputs_of(once, batch)).abs().max() > 1e-2
    assert_close(outputs_of(twice, batch), expected)
    twice.save_pretrained(tmp_path)
    assert torch.equal(outputs_of(load_pruned(tmp_path), batch), outputs_of(twice, batch))
    kept = {entry["consumer"]: entry["units"] for entry in twice.config.rfprune["blocks"]}
    for block, mask in zip(layout.blocks, both, strict=True):
        expected_units = torch.nonzero(mask).flatten().tolist() if block.kind == "head" else None
        assert kept[block.consumer] == expected_units


def test_pruned_again_after_an_emptied_sublayer(model: Any, layout: Layout, batch: Batch) -> None:
    masks = emptied(layout, "layer.0.heads", "layer.1.neurons")
    once = compact(model, layout, masks)
    again = layout_of(once)
    second = [torch.ones(block.num_units) for block in again.blocks]
    second[0][1] = 0
    masks[1][2] = 0  # the second of the neurons left in layer 0, the first of which is gone already
    twice = compact(once, again, second)
    assert_close(outputs_of(twice, batch), masked_outputs(model, layout, masks, batch))
    assert len(twice.config.rfprune["blocks"]) == len(layout.blocks)


def test_bfloat16_stays_and_agrees_within_its_precision(
    model: Any, layout: Layout, batch: Batch, tmp_path: Path
) -> None:
    half, masks = model.to(torch.bfloat16), mixed_masks(layout)
    expected = masked_outputs(half, layout, masks, batch)
    small = compact(half, layout, masks)
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    error = (outputs_of(small, batch) - expected).abs().max()
    assert error <= 0.05 * expected.abs().max()
    small.save_pretrained(tmp_path)
    loaded = load_pruned(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(outputs_of(loaded, batch), outputs_of(small, batch))


@pytest.mark.parametrize("padding", ["right", "left", "none"])
@pytest.mark.parametrize("num_examples", [1, 4])
def test_layers_replayed_are_the_full_forward_pass(
    model: Any,
    layout: Layout,
    tiny_batch: Callable[..., Batch],
    padding: str,
    num_examples: int,
) -> None:
    batch = tiny_batch(num_examples, padding=padding)
    small = compact(model, layout, emptied(layout, "layer.1.heads"))
    for net in (model, small):
        with torch.no_grad():
            states = net.base_model(**batch, output_hidden_states=True).hidden_states
            tokens = token_mask(batch)
            hidden, call = layer_calls(net, layout, batch)
            for layer, path in enumerate(layout.layers):
                assert_close(pack(hidden, tokens), pack(states[layer], tokens))
                through = unpack(pack(hidden, tokens), tokens)  # what was at padding is lost
                hidden = run_layer(net, path, through, call)
            assert_close(pack(hidden, tokens), pack(states[-1], tokens))
            assert (states[-1] - states[0]).abs().max() > 0.1


def test_mask_gradients_are_finite_differences(model: Any, layout: Layout, batch: Batch) -> None:
    model = model.double()
    weights = torch.randn(outputs_of(model, batch).shape, dtype=torch.float64)
    masks = [mask.double().repeat(4, 1).requires_grad_() for mask in full_masks(layout)]
    with frozen(model), masked(model, layout, masks):
        outputs = model(**batch)
        if "logits" in outputs:
            score = (weights * outputs["logits"]).sum()
        else:
            both = torch.cat([outputs["start_logits"], outputs["end_logits"]], dim=1)
            score = (weights * both * batch["attention_mask"].repeat(1, 2)).sum()
    gradients = torch.autograd.grad(score, masks)
    assert all(gradient.abs().max() > 1e-2 for gradient in gradients)
    step = 1e-5
    for i, block in enumerate(layout.blocks):
        for unit in (0, block.num_units - 1):
            values = []
            for sign in (1, -1):
                moved = [mask.double() for mask in full_masks(layout)]
                moved[i][unit] += sign * step
                values.append((weights * masked_outputs(model, layout, moved, batch)).sum(1))
            expected = (values[0] - values[1]) / (2 * step)  # (B,): one gradient an example
            torch.testing.assert_close(gradients[i][:, unit], expected, rtol=1e-5, atol=1e-7)
