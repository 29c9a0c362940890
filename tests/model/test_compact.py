"""Compaction makes a smaller model and leaves the original unchanged.

Without these tests a compact model could share memory or tied weights with the original, or not be
a model of transformers that can be pickled and copied. The contract suite compares the outputs.
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
from rfprune.model.masks import full_masks

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
    assert small.config.rfprune["format_version"] == 3
    assert type(small).__name__ == "BertForSequenceClassification", "pipelines go by it"
    assert type(small) is not transformers.BertForSequenceClassification
    assert isinstance(small, transformers.BertForSequenceClassification)


def test_sizes_biases_and_scales(model: Any) -> None:
    state = torch.random.get_rng_state()
    small = made_smaller(model)
    assert torch.equal(torch.random.get_rng_state(), state), "draws no random numbers"
    first, second = small.bert.encoder.layer
    assert first.intermediate.dense.weight.shape == (1, 16)
    assert first.output.dense.weight.shape == (16, 1)
    assert first.attention.self.num_attention_heads == 2
    assert first.attention.self.all_head_size == 8
    before = model.bert.encoder.layer[1]
    assert torch.equal(second.output.dense.weight, 0.5 * before.output.dense.weight)
    assert torch.equal(second.output.dense.bias, before.output.dense.bias)
    emptied = [name for name, _ in second.attention.named_parameters()]
    assert emptied == ["output.dense.bias", "output.LayerNorm.weight", "output.LayerNorm.bias"]
    assert torch.equal(second.attention.output.dense.bias, before.attention.output.dense.bias)


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


def test_tied_weights_stay_tied(tiny_model: Tiny) -> None:
    model = tiny_model("gpt2", "causal-lm")
    small = made_smaller(model)
    assert small.lm_head.weight is small.transformer.wte.weight
    assert small.lm_head.weight is not model.lm_head.weight
    assert total_params(small) < total_params(model)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet"])
def test_it_can_be_pickled_and_copied(model_type: str, tiny_model: Tiny, tiny_batch: Tiny) -> None:
    small, batch = made_smaller(tiny_model(model_type)), tiny_batch()
    expected = logits_of(small, batch)
    for same in (pickle.loads(pickle.dumps(small)), copy.deepcopy(small)):
        assert type(same) is type(small)
        assert torch.equal(logits_of(same, batch), expected)


def test_hidden_states_and_attentions_are_available(model: Any, tiny_batch: Tiny) -> None:
    model.set_attn_implementation("eager")
    outputs = made_smaller(model)(**tiny_batch(), output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 3
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(4, 2, 7, 7)]


def test_a_subclass_of_the_same_name_is_another_class(model: Any, tiny_batch: Tiny) -> None:
    made_smaller(model)  # makes the pruned counterpart of the class of transformers

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
