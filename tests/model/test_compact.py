"""Compaction: a smaller model, and the one that was given left as it was.

The contract suite shows that outputs agree; here is what else a user of the smaller model expects.
Deleting this lets a copy share memory or ties with the original, or stop being a model of
transformers that can be pickled, copied, exported and trained.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from rfprune.cost.params import total_params
from rfprune.model.compact import compact
from rfprune.model.layout import layout_of, unit_features
from rfprune.model.masks import full_masks, masked
from rfprune.model.modeling_rfprune import ConstantOutput, EmptySublayer

Tiny = Callable[..., Any]


@pytest.fixture
def model(tiny_model: Tiny) -> Any:
    return tiny_model()


def some_masks(model: Any) -> tuple[Tensor, ...]:
    """Two of four heads of layer 0, one neuron of layer 0, no head of layer 1, all neurons."""
    masks = full_masks(layout_of(model))
    masks[0][:2] = 0
    masks[1][1:] = 0
    masks[2][:] = 0
    masks[3][:] *= 0.5
    return masks


def made_smaller(model: Any) -> Any:
    return compact(model, layout_of(model), some_masks(model))


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits  # type: ignore[no-any-return]


def test_the_original_stays_as_it_was(model: Any, tiny_batch: Tiny) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config, kind = model.config.to_dict(), type(model)
    small = made_smaller(model)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.fill_(7.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (type(model), model.config.to_dict()) == (kind, config)
    assert small.config.rfprune["format_version"] == 2
    assert type(small).__name__ == "BertForSequenceClassification", "pipelines go by it"
    assert type(small) is not transformers.BertForSequenceClassification
    assert isinstance(small, transformers.BertForSequenceClassification)


def test_no_random_number_is_drawn(model: Any) -> None:
    before = torch.random.get_rng_state()
    made_smaller(model)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_everything_has_memory(tiny_model: Tiny) -> None:
    for model_type in ("bert", "distilbert", "mpnet"):
        small = made_smaller(tiny_model(model_type))
        assert not [name for name, value in small.named_parameters() if value.is_meta]
        assert not [name for name, value in small.named_buffers() if value.is_meta]


def test_exactly_one_neuron_may_be_kept(model: Any, tiny_batch: Tiny) -> None:
    small = made_smaller(model)
    layer = small.bert.encoder.layer[0]
    assert layer.intermediate.dense.weight.shape == (1, 16)
    assert layer.output.dense.weight.shape == (16, 1)
    assert layer.attention.self.num_attention_heads == 2
    assert layer.attention.self.all_head_size == 8
    with masked(model, layout_of(model), some_masks(model)):
        expected = logits_of(model, tiny_batch())
    torch.testing.assert_close(logits_of(small, tiny_batch()), expected, rtol=1e-4, atol=1e-5)


def test_an_emptied_sublayer_keeps_its_bias_alone(model: Any) -> None:
    small = made_smaller(model)
    attention = small.bert.encoder.layer[1].attention
    assert isinstance(attention.self, EmptySublayer)
    assert isinstance(attention.output.dense, ConstantOutput)
    bias = model.bert.encoder.layer[1].attention.output.dense.bias
    assert attention.output.dense.bias is not None
    assert torch.equal(attention.output.dense.bias, bias)
    assert sum(parameter.numel() for parameter in attention.output.dense.parameters()) == 16


def test_scales_are_folded_into_the_columns(model: Any) -> None:
    small = made_smaller(model)
    before = model.bert.encoder.layer[1].output.dense
    after = small.bert.encoder.layer[1].output.dense
    assert torch.equal(after.weight, 0.5 * before.weight)
    assert torch.equal(after.bias, before.bias)


def test_modes_and_flags_are_those_of_the_original(model: Any) -> None:
    assert not any(module.training for module in made_smaller(model).modules())
    model.train()
    model.bert.encoder.layer[0].requires_grad_(False)
    small = made_smaller(model)
    assert all(module.training for module in small.modules())
    flags = {name: parameter.requires_grad for name, parameter in small.named_parameters()}
    original = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert set(flags.values()) == {True, False}
    assert flags == {name: original[name] for name in flags}


def test_a_smaller_model_can_be_trained(model: Any, tiny_batch: Tiny) -> None:
    small = made_smaller(model).train()
    small(**tiny_batch(), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_tied_weights_stay_tied() -> None:
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=12,
    )
    model = transformers.BertForMaskedLM(config).eval()
    small = made_smaller(model)
    assert small.cls.predictions.decoder.weight is small.bert.embeddings.word_embeddings.weight
    assert small.bert.embeddings.word_embeddings.weight is not (
        model.bert.embeddings.word_embeddings.weight
    )
    assert total_params(small) < total_params(model)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet"])
def test_it_can_be_pickled_and_copied(model_type: str, tiny_model: Tiny, tiny_batch: Tiny) -> None:
    small, batch = made_smaller(tiny_model(model_type)), tiny_batch()
    expected = logits_of(small, batch)
    for same in (pickle.loads(pickle.dumps(small)), copy.deepcopy(small)):
        assert type(same) is type(small)
        assert torch.equal(logits_of(same, batch), expected)


@pytest.mark.parametrize("model_type", ["bert", "mpnet"])
def test_it_can_be_exported_and_compiled(
    model_type: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    small, batch = made_smaller(tiny_model(model_type)), tiny_batch()
    expected = logits_of(small, batch)
    exported = torch.export.export(small, (), batch)
    torch.testing.assert_close(exported.module()(**batch).logits, expected)
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits_of(compiled, batch), expected)


def test_hidden_states_and_attentions_are_still_to_be_had(model: Any, tiny_batch: Tiny) -> None:
    model.set_attn_implementation("eager")
    outputs = made_smaller(model)(**tiny_batch(), output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 3
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(4, 2, 7, 7)]


def test_classes_of_the_same_name_do_not_meet(model: Any, tiny_batch: Tiny) -> None:
    made_smaller(model)  # now the counterpart of transformers' own class is known

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = parent.forward(self, *args, **kwargs)
        outputs.logits = outputs.logits + 100
        return outputs

    parent = transformers.BertForSequenceClassification
    same_name: Any = type(parent.__name__, (parent,), {"forward": forward})
    other = same_name(model.config).eval()
    assert logits_of(made_smaller(other), tiny_batch()).min() > 50
    assert logits_of(made_smaller(model), tiny_batch()).max() < 50


def test_features_of_units() -> None:
    features = unit_features(torch.tensor([0, 2]), 3)
    assert features.tolist() == [0, 1, 2, 6, 7, 8]
    assert unit_features(torch.tensor([], dtype=torch.long), 3).tolist() == []


def test_a_mask_for_every_block_is_needed(model: Any) -> None:
    layout = layout_of(model)
    masks: Sequence[Tensor] = full_masks(layout)[:3]
    with pytest.raises(ValueError, match="shorter"):
        compact(model, layout, masks)
