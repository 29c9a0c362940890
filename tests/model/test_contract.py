"""The contract: what pruning needs of every family, checked with every head.

Without these tests a new row, or a new release of transformers, could break a family unnoticed: a
mask that misses a unit, a compact model that computes something else, a folder that loads into the
wrong shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from rfprune.families.architectures import ARCHITECTURES
from rfprune.families.schema import LINEAR_MAPS
from rfprune.methods.problem import add_token_mask
from rfprune.model.batch import decoder_token_mask, model_inputs, pack, token_mask, unpack
from rfprune.model.checkpoint import load_pruned, save_pruned
from rfprune.model.compact import compact
from rfprune.model.encoder_decoder import encoder_output, inputs_with_encoder_output
from rfprune.model.frozen import frozen
from rfprune.model.layerwise import add_signal_token_mask, layer_calls, run_layer
from rfprune.model.layout import Layout, layout_of, recorded_blocks
from rfprune.model.linear import weight_of
from rfprune.model.masks import full_masks, masked
from tests.conftest import (
    ALL_TYPES,
    AUDIO_TYPES,
    CAUSAL_TYPES,
    ENCODER_DECODER_TYPES,
    GENERATION_TYPES,
    GROUPED_TYPES,
    IMAGE_TYPES,
    ONE_UNIT_TYPES,
    TOWER_TYPES,
)
from tests.model.emptied import emptied

HEADS = {
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
    "causal-lm": transformers.AutoModelForCausalLM,
    "seq2seq-lm": transformers.AutoModelForSeq2SeqLM,
    "image-classification": transformers.AutoModelForImageClassification,
    "audio-classification": transformers.AutoModelForAudioClassification,
    "none": transformers.AutoModel,
}


def auto_class(model_type: str, head: str) -> Any:
    """The Auto class that loads a family with a head; Whisper writes what it hears."""
    return transformers.AutoModelForSpeechSeq2Seq if model_type == "whisper" else HEADS[head]


def heads_of(model_type: str) -> tuple[str, ...]:
    if model_type in TOWER_TYPES:
        return ("none",)
    if model_type in IMAGE_TYPES:
        return ("image-classification",)
    if model_type in AUDIO_TYPES:
        return ("audio-classification",)
    if model_type == "granite":
        return ("causal-lm",)
    if model_type in ("eurobert", "nomic_bert"):
        return ("sequence-classification",)
    if model_type in CAUSAL_TYPES:
        return ("causal-lm", "sequence-classification")
    if model_type in GENERATION_TYPES:
        return ("seq2seq-lm",)
    return ("sequence-classification", "question-answering")


CASES = [(model_type, head) for model_type in ALL_TYPES for head in heads_of(model_type)]
CASES += [(each, "seq2seq-lm") for each in ENCODER_DECODER_TYPES if each not in GENERATION_TYPES]
CASES += [("gpt2", "question-answering"), ("llama", "question-answering")]

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
def batches(case: tuple[str, str], tiny_batch: Callable[..., Batch]) -> Callable[..., Batch]:
    """`tiny_batch` for the family; decoders of generators get the encoder's tokens."""

    def make(*args: Any, **settings: Any) -> Batch:
        batch: Batch = tiny_batch(*args, model_type=case[0], **settings)
        writes = generates and "input_ids" in batch
        return batch | {"decoder_input_ids": batch["input_ids"]} if writes else batch

    generates = case[1] == "seq2seq-lm"
    return make


@pytest.fixture
def batch(batches: Callable[..., Batch]) -> Batch:
    return batches()


def outputs_of(model: Any, batch: Batch) -> Tensor:
    """All logits (B, n), without gradients; images are cast to the model's dtype."""
    inputs = {n: v.to(model.dtype) if v.is_floating_point() else v for n, v in batch.items()}
    with torch.no_grad():
        return flat_outputs(model(**inputs), batch)


def flat_outputs(outputs: Any, batch: Batch) -> Tensor:
    """All logits or hidden states of every example, (B, n), with zeros at padding."""
    found = []
    if "logits" not in outputs and "last_hidden_state" in outputs:
        hidden: Tensor = outputs["last_hidden_state"]
        tokens = batch.get("attention_mask")
        return (hidden if tokens is None else hidden * tokens[:, :, None]).flatten(1)
    for name in (name for name in outputs if name.endswith("logits")):
        logits = outputs[name]
        if name != "logits" or logits.dim() == 3:  # per token
            tokens = batch.get("attention_mask", batch.get("decoder_input_ids"))
            assert tokens is not None
            tokens = tokens != 0
            logits = logits * (tokens[:, :, None] if logits.dim() == 3 else tokens)
        found.append(logits.flatten(1))
    return torch.cat(found, dim=1)


def mixed_masks(layout: Layout) -> tuple[Tensor, ...]:
    """A third of the units removed, a third scaled and a third kept; the order differs by block."""
    values = torch.tensor([0.0, 1.0, 0.5, 0.0, -1.5, 1.0])
    masks = tuple(
        values.repeat(block.num_units)[start : start + block.num_units]
        for start, block in enumerate(layout.blocks)
    )
    return tuple(torch.tensor([0.5]) if len(mask) == 1 else mask for mask in masks)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def assert_same(actual: Tensor, expected: Tensor, model_type: str) -> None:
    """Equal to the bit. DeBERTa multiplies an embedding in the memory of the file it was loaded
    from, and the alignment of a matrix decides in which order a product is summed."""
    limit = 1e-6 if model_type == "deberta-v2" else 0
    torch.testing.assert_close(actual, expected, rtol=limit, atol=limit)


def folded(model: Any, layout: Layout, masks: Sequence[Tensor]) -> Any:
    """A copy of the model with the masks folded into its output projections, nothing removed."""
    copied = copy.deepcopy(model)
    for block, mask in zip(layout.blocks, masks, strict=True):
        consumer = copied.get_submodule(block.consumer)
        weight_of(consumer).data *= mask.repeat_interleave(block.unit_width)
    return copied


def masked_outputs(model: Any, layout: Layout, masks: Sequence[Tensor], batch: Batch) -> Tensor:
    with masked(model, layout, masks):
        return outputs_of(model, batch)


def test_the_layout_finds_all_heads_and_neurons(layout: Layout, case: tuple[str, str]) -> None:
    shapes = [(b.kind, b.layer, b.num_units, b.unit_width) for b in layout.blocks]
    width = 8 if case[0] in GROUPED_TYPES else 4  # two query heads per key
    neurons = 16 if case[0].startswith("dinov2") else 12
    heads = (1, 32) if case[0] in ONE_UNIT_TYPES else (4, width)
    encoder = [(("head", n, *heads), ("neuron", n, neurons, 1)) for n in range(2)]
    decoder = [(("head", n, 4, 4), ("head", n, 4, 4), ("neuron", n, 12, 1)) for n in (2, 3)]
    layers = [*encoder, *decoder] if case[0] in ENCODER_DECODER_TYPES else encoder
    assert shapes == [shape for layer in layers for shape in layer]
    assert set(ALL_TYPES) == set(ARCHITECTURES)


def test_masks_of_ones_change_no_bit(model: Any, layout: Layout, batch: Batch) -> None:
    plain = outputs_of(model, batch)
    assert torch.equal(masked_outputs(model, layout, full_masks(layout), batch), plain)
    per_example = [mask.expand(4, -1) for mask in full_masks(layout)]
    assert torch.equal(masked_outputs(model, layout, per_example, batch), plain)


def test_every_unit_changes_the_output(model: Any, layout: Layout, batch: Batch) -> None:
    plain = outputs_of(model, batch)
    seen = [plain]
    for i, block in enumerate(layout.blocks):
        for unit in range(block.num_units):
            masks = full_masks(layout)
            masks[i][unit] = 0
            changed = masked_outputs(model, layout, masks, batch)
            nearest = min(float((changed - other).abs().max()) for other in seen)
            assert nearest > 1e-4, f"unit {unit} of {block.name} has no effect of its own"
            seen.append(changed)


@pytest.mark.parametrize("padding", ["right", "left", "none"])
def test_masked_folded_compact_and_reloaded_agree(
    model: Any,
    layout: Layout,
    padding: str,
    case: tuple[str, str],
    batches: Callable[..., Batch],
    tmp_path: Path,
) -> None:
    if padding != "right" and case[0] in (*IMAGE_TYPES, *AUDIO_TYPES, "whisper"):
        pytest.skip("images have no padding, and audio is padded on the right")
    batch, masks = batches(padding=padding), mixed_masks(layout)
    expected = masked_outputs(model, layout, masks, batch)
    assert (expected - outputs_of(model, batch)).abs().max() > 1e-2
    small = compact(model, layout, masks)
    assert_close(outputs_of(folded(model, layout, masks), batch), expected)
    assert_close(outputs_of(small, batch), expected)
    if padding != "right":
        return
    save_pruned(small, layout, masks, tmp_path)
    exact = outputs_of(small, batch)
    assert_same(outputs_of(load_pruned(tmp_path), batch), exact, case[0])
    with_code = auto_class(*case).from_pretrained(tmp_path, trust_remote_code=True)
    assert type(with_code).__module__.startswith("transformers_modules")
    assert_same(outputs_of(with_code, batch), exact, case[0])


def test_a_batch_of_one_without_an_attention_mask(
    model: Any, layout: Layout, batches: Callable[..., Batch]
) -> None:
    batch = batches(1, padding="none")
    batch.pop("attention_mask", None)
    masks = mixed_masks(layout)
    with torch.no_grad():
        small = compact(model, layout, masks)(**batch)[0]
        with masked(model, layout, masks):
            expected = model(**batch)[0]
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
    linears = {path for path, part in small.named_modules() if isinstance(part, LINEAR_MAPS)}
    for block in layout.blocks:
        paths = {*(producer.path for producer in block.producers), block.consumer}
        assert paths & linears == (set() if block.name in empty else paths)


def test_an_unpruned_class_refuses_an_emptied_checkpoint(
    model: Any, layout: Layout, case: tuple[str, str], tmp_path: Path
) -> None:
    masks = full_masks(layout)
    masks[0].zero_()  # no other projection changes its shape
    compact(model, layout, masks).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size"):
        type(model).from_pretrained(tmp_path)


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
    kept = {entry["consumer"]: entry["units"] for entry in recorded_blocks(twice)}
    for block, mask in zip(layout.blocks, both, strict=True):
        expected_units = torch.nonzero(mask).flatten().tolist() if block.kind == "head" else None
        assert kept[block.consumer] == expected_units


def test_pruned_again_after_an_emptied_sublayer(model: Any, layout: Layout, batch: Batch) -> None:
    masks = emptied(layout, "layer.0.heads", "layer.1.neurons")
    once = compact(model, layout, masks)
    again = layout_of(once)
    second = [torch.ones(block.num_units) for block in again.blocks]
    second[0][1] = 0
    masks[1][2] = 0  # the second remaining neuron of layer 0, which has lost its first
    twice = compact(once, again, second)
    assert_close(outputs_of(twice, batch), masked_outputs(model, layout, masks, batch))
    assert len(recorded_blocks(twice)) == len(layout.blocks)


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
def test_layers_one_at_a_time_are_the_full_forward_pass(
    model: Any,
    layout: Layout,
    case: tuple[str, str],
    padding: str,
    num_examples: int,
    batches: Callable[..., Batch],
) -> None:
    if padding != "right" and case[0] in (*IMAGE_TYPES, *AUDIO_TYPES, "whisper"):
        pytest.skip("images have no padding, and audio is padded on the right")
    batch = add_signal_token_mask(model, layout, batches(num_examples, padding=padding))
    small = compact(model, layout, emptied(layout, "layer.1.heads"))
    tokens = token_mask(batch)
    for net in (model, small):
        with torch.no_grad():
            entering, leaving = states_of(net, layout, batch)
            hidden, calls = layer_calls(net, layout, batch)
            order = layout.execution_order or layout.layer_indices()
            for run, layer in enumerate(order):
                path = layout.layers[layer]
                assert_close(pack(hidden, tokens), pack(entering[run], tokens))
                through = unpack(pack(hidden, tokens), tokens)  # drops hidden states at padding
                hidden = run_layer(net, path, through, calls)
            assert_close(pack(hidden, tokens), pack(leaving[len(order) - 1], tokens))
            assert (leaving[-1] - entering[0]).abs().max() > 0.1


def states_of(
    net: Any, layout: Layout, batch: Mapping[str, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs and outputs of every layer in a full forward pass."""
    entering: list[Tensor] = []
    leaving: list[Tensor] = []

    def record(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        entering.append(args[0] if args else kwargs["hidden_states"])
        leaving.append(output[0] if isinstance(output, tuple) else output)

    layers = [net.get_submodule(path) for path in layout.layers]
    handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    net(**model_inputs(batch))
    for handle in handles:
        handle.remove()
    return entering, leaving


def test_mask_gradients_are_finite_differences(
    model: Any, layout: Layout, case: tuple[str, str], batch: Batch
) -> None:
    model = model.double()
    batch = {name: v.double() if v.is_floating_point() else v for name, v in batch.items()}
    generator = torch.Generator().manual_seed(0)
    shape = outputs_of(model, batch).shape
    weights = torch.randn(shape, generator=generator, dtype=torch.float64)
    masks = [mask.double().repeat(4, 1).requires_grad_() for mask in full_masks(layout)]
    with frozen(model), masked(model, layout, masks):
        score = (weights * flat_outputs(model(**batch), batch)).sum()
    gradients = torch.autograd.grad(score, masks)
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    for block, gradient in zip(layout.blocks, gradients, strict=True):
        if block.sublayer.one_unit:  # its norm cancels a scale, up to the epsilon
            assert gradient.abs().max() < 1e-2 * largest
        else:
            assert gradient.abs().max() > 1e-2
    # some families always compute norms or positions in float32
    single = case[0] in (*CAUSAL_TYPES[2:], "modernbert", "eurobert", "t5", "mt5", "umt5")
    step = 3e-3 if single else 1e-5
    for i, block in enumerate(layout.blocks):
        for unit in (0, block.num_units - 1) if block.num_units > 1 else ():
            values = []
            for sign in (1, -1):
                moved = [mask.double() for mask in full_masks(layout)]
                moved[i][unit] += sign * step
                values.append((weights * masked_outputs(model, layout, moved, batch)).sum(1))
            expected = (values[0] - values[1]) / (2 * step)  # (B,): one gradient per example
            scale = float(gradients[i].abs().max())
            rtol, atol = (1e-2, 1e-3 * scale) if single else (1e-5, 1e-7)
            torch.testing.assert_close(gradients[i][:, unit], expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_six_layers_of_different_sizes(
    model_type: str,
    tiny_model: Callable[..., Any],
    tiny_batch: Callable[..., Batch],
    tmp_path: Path,
) -> None:
    """Two layers hide what is wrong from the third on, and equal sizes hide mixed-up layers."""
    head = heads_of(model_type)[0]
    model = tiny_model(model_type, head, num_hidden_layers=6)
    layout, batch = layout_of(model), tiny_batch(model_type=model_type)
    if head == "seq2seq-lm" and "input_ids" in batch:
        batch["decoder_input_ids"] = batch["input_ids"]
    masks = six_sizes(layout)
    expected = masked_outputs(model, layout, masks, batch)
    assert (expected - outputs_of(model, batch)).abs().max() > 1e-2
    small = compact(model, layout, masks)
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)  # rounding of six layers
    close(outputs_of(small, batch), expected)
    save_pruned(small, layout, masks, tmp_path)
    exact = outputs_of(small, batch)
    assert_same(outputs_of(load_pruned(tmp_path), batch), exact, model_type)
    with_code = auto_class(model_type, head).from_pretrained(tmp_path, trust_remote_code=True)
    assert_same(outputs_of(with_code, batch), exact, model_type)
    batch = dict(add_token_mask(small, layout, batch))
    with torch.no_grad():
        _, leaving = states_of(small, layout, batch)
        hidden, calls = layer_calls(small, layout, batch)
        order = layout.execution_order or layout.layer_indices()
        assert len(set(order)) == 6
        for run, layer in enumerate(order):
            hidden = run_layer(small, layout.layers[layer], hidden, calls)
            close(*(pack(each, token_mask(batch)) for each in (hidden, leaving[run])))
        if not layout.is_encoder_decoder:
            return
        encoded = encoder_output(small, batch)
        inputs = inputs_with_encoder_output(batch, encoded)
        hidden, calls = layer_calls(small, layout, batch, decoder_inputs=inputs)
        decoder = layout.layer_indices(decoder=True)
        assert len(decoder) == 6
        for layer in decoder:
            hidden = run_layer(small, layout.layers[layer], hidden, calls)
            tokens = decoder_token_mask(batch)
            close(*(pack(each, tokens) for each in (hidden, leaving[layer])))


def six_sizes(layout: Layout) -> tuple[Tensor, ...]:
    """Masks that leave each of six layers other sizes than the others, and one sublayer empty."""
    masks = full_masks(layout)
    for block, mask in zip(layout.blocks, masks, strict=True):
        layer = block.layer % 6
        removed = layer % block.num_units if block.kind == "head" else layer + 1
        mask[torch.arange(removed) * 5 % block.num_units] = 0
    masks[4].zero_()
    return masks
