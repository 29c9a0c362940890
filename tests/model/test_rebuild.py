"""What `prune` accepts is saved and loaded again, or refused before the work.

Without these tests a model with a head of its own would be saved into a folder that nothing loads.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from rfprune import Constraint, RfpruneWarning, Settings, UserError, load_pruned, prune

Tiny = Callable[..., Any]


class MeanHead(transformers.BertPreTrainedModel):  # type: ignore[misc]
    """A classifier on the mean hidden state."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = transformers.BertModel(config)
        self.classifier = nn.Sequential(nn.Linear(config.hidden_size, config.num_labels))
        self.post_init()

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **_: Any) -> Any:
        hidden = self.bert(input_ids, attention_mask).last_hidden_state
        return SequenceClassifierOutput(logits=self.classifier(hidden.mean(1)))


class BertForSequenceClassification(transformers.BertForSequenceClassification):  # type: ignore[misc]
    """A class of the user's with the name of one of transformers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        return SequenceClassifierOutput(logits=-outputs.logits)


class NeedsMore(MeanHead):
    """Its configuration is not enough to make it."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__(config)
        self.width = width


SETTINGS = Settings(tune=False)
OWN = (MeanHead, BertForSequenceClassification)


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("how", ["save_pretrained", "save"])
def test_a_class_of_the_users_is_loaded_with_the_class(
    own: Any, how: str, tiny_model: Tiny, tiny_batch: Tiny, tmp_path: Path
) -> None:
    batch = tiny_batch()
    model = own(tiny_model().config).eval()
    with pytest.warns(RfpruneWarning, match=rf"load_pruned\(folder, model_class={own.__name__}\)"):
        result = prune(model, [batch], Constraint("mac", 0.5), SETTINGS)
    folder = tmp_path / "out"
    (result.model.save_pretrained if how == "save_pretrained" else result.save)(folder)
    with pytest.raises(UserError, match=rf"'{own.__module__}\.{own.__name__}'.*model_class="):
        load_pruned(folder)
    loaded = load_pruned(folder, model_class=own)
    assert isinstance(loaded, own)
    expected = result.model(**batch).logits
    assert torch.equal(loaded(**batch).logits, expected)
    assert (model(**batch).logits - expected).abs().max() > 1e-4, "it has been pruned"
    encoder = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    hidden = result.model.bert(batch["input_ids"]).last_hidden_state
    assert torch.equal(encoder(batch["input_ids"]).last_hidden_state, hidden)


def test_a_plain_model_of_a_class_of_the_users_loads_with_it(
    tiny_model: Tiny, tiny_batch: Tiny, tmp_path: Path
) -> None:
    batch, model = tiny_batch(), MeanHead(tiny_model().config).eval()
    with pytest.warns(RfpruneWarning):
        result = prune(model, [batch], Constraint("mac", 0.95), Settings(tune=False, uniform=True))
    result.save(tmp_path / "out")
    expected = result.model(**batch).logits
    for loaded in (
        MeanHead.from_pretrained(tmp_path / "out"),
        load_pruned(tmp_path / "out", model_class=MeanHead),
    ):
        assert torch.equal(loaded.eval()(**batch).logits, expected)


def _other_head(model: Any) -> None:
    model.classifier = nn.Sequential(nn.Linear(model.config.hidden_size, 2), nn.ReLU())


def _fewer_layers(model: Any) -> None:
    model.bert.encoder.layer = model.bert.encoder.layer[:1]


def _more_labels(model: Any) -> None:
    model.classifier = nn.Linear(model.config.hidden_size, 9)


def _more_weights(model: Any) -> None:
    model.extra = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_head, "'classifier.weight' is missing from this model"),
        (_fewer_layers, r"'bert\.encoder\.layer\.1\..* is missing from this model"),
        (_more_labels, r"'classifier\.weight' has the shape \(9, .* num_labels"),
        (_more_weights, "'extra' is a weight of this model but not of a BertForSequence"),
    ],
)
def test_what_the_configuration_does_not_make_is_refused_before_the_work(
    change: Callable[[Any], None], message: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model = tiny_model()
    change(model)
    before = torch.get_rng_state()
    with pytest.raises(UserError, match=f"{message}.*define a subclass"):
        prune(model, [tiny_batch()], Constraint("mac", 0.5))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_configuration_that_is_corrected_is_accepted(
    tiny_model: Tiny, tiny_batch: Tiny, tmp_path: Path
) -> None:
    model, batch = tiny_model(num_hidden_layers=3), tiny_batch()
    model.bert.encoder.layer = model.bert.encoder.layer[:2]
    model.config.num_hidden_layers = 2
    result = prune(model, [batch], Constraint("mac", 0.5), SETTINGS)
    result.save(tmp_path / "out")
    expected = result.model(**batch).logits
    assert torch.equal(load_pruned(tmp_path / "out")(**batch).logits, expected)


def test_a_class_that_needs_more_than_its_configuration_is_refused(
    tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model = NeedsMore(tiny_model().config, 3)
    with pytest.raises(UserError, match=r"'width'.* defaults, or store them in the configuration"):
        prune(model, [tiny_batch()], Constraint("mac", 0.5))
