"""The Transformer of a pruned model loads with another head, as an unpruned one does.

Without these tests the encoder of a pruned classifier could not be used for embeddings, or for
another task, or it would load with random weights.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from rfprune import RfpruneWarning, UserError, load_pruned
from rfprune.model.compact import compact
from rfprune.model.layout import layout_of
from rfprune.model.rebuild import check_rebuildable
from tests.conftest import ALL_TYPES
from tests.model.emptied import emptied
from tests.model.test_contract import heads_of

Tiny = Callable[..., Any]

# These fail unpruned, too: heads of other shapes, and an entry that the configuration lacks.
UNLOADABLE = (
    *("AutoModelForMultipleChoice", "AutoModelForSemanticSegmentation"),
    *("AutoModelForAudioFrameClassification", "AutoModelForAudioXVector"),
)


def small(model: Any) -> Any:
    """A pruned copy of a model, with no head left in its second layer."""
    layout = layout_of(model)
    return compact(model, layout, emptied(layout, "layer.1.heads"))


def transformer_weights(model: Any) -> dict[str, Tensor]:
    """The weights of a model without its head."""
    start = "" if model.base_model is model else f"{model.base_model_prefix}."
    return {
        name.removeprefix(start): value
        for name, value in model.state_dict().items()
        if name.startswith(start)
    }


def in_layers(name: str) -> bool:
    return "layer" in name or name.startswith("h.") or ".block." in name


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_the_layers_load_under_every_auto_class(
    model_type: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    pruned = small(tiny_model(model_type, heads_of(model_type)[0]))
    pruned.save_pretrained(tmp_path)
    saved = transformer_weights(pruned)
    classes = json.loads((tmp_path / "config.json").read_text())["auto_map"].keys()
    assert "AutoModel" in classes
    for name in sorted(classes - set(UNLOADABLE)):
        auto = getattr(transformers, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RfpruneWarning)
            ours = load_pruned(tmp_path, model_class=auto)
        for model in (auto.from_pretrained(tmp_path, trust_remote_code=True), ours):
            found = transformer_weights(model)
            layers = [key for key in found if in_layers(key)]
            assert layers
            for key in layers:
                assert torch.equal(found[key], saved[key]), f"{key} of {name}"


def test_an_auto_class_loads_a_type_that_only_the_folder_gives_it(
    tiny_model: Tiny, tiny_batch: Tiny, tmp_path: Path
) -> None:
    """In a process of its own: loading the folder's code once adds the type to the Auto class."""
    pruned, batch = small(tiny_model("siglip_text_model")), tiny_batch()
    save_file({name: batch[name] for name in ("input_ids", "attention_mask")}, tmp_path / "batch")
    pruned.save_pretrained(tmp_path)
    program = """
import sys, rfprune, transformers
from safetensors.torch import load_file, save_file
mapping = transformers.AutoModel._model_mapping
assert mapping.get(transformers.SiglipTextConfig, None) is None
model = rfprune.load_pruned(sys.argv[1], model_class=transformers.AutoModel)
outputs = model(**load_file(sys.argv[1] + "/batch"))
save_file({"hidden": outputs.last_hidden_state.detach()}, sys.argv[1] + "/outputs")
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program, str(tmp_path)], check=True)
    expected = pruned(**load_file(tmp_path / "batch")).last_hidden_state
    assert torch.allclose(load_file(tmp_path / "outputs")["hidden"], expected, atol=1e-5)


def test_a_new_head_is_warned_of_saved_and_loaded(
    tiny_model: Tiny, tiny_batch: Tiny, tmp_path: Path
) -> None:
    pruned, batch = small(tiny_model()), tiny_batch()
    pruned.save_pretrained(tmp_path / "first")
    with pytest.warns(RfpruneWarning, match=r"'classifier\.\w+'.* train them before use"):
        model = load_pruned(
            tmp_path / "first",
            model_class=transformers.BertForTokenClassification,
            num_labels=5,
        )
    outputs = model(**batch, output_hidden_states=True)
    assert outputs.logits.shape[-1] == 5
    expected = pruned(**batch, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(outputs.hidden_states[-1], expected)
    model.save_pretrained(tmp_path / "second")
    assert torch.equal(load_pruned(tmp_path / "second")(**batch).logits, outputs.logits)
    auto = transformers.AutoModelForTokenClassification
    again = auto.from_pretrained(tmp_path / "second", trust_remote_code=True)
    assert torch.equal(again(**batch).logits, outputs.logits)


def test_an_encoder_of_an_encoder_decoder_loads_without_its_decoder(
    tiny_model: Tiny, tiny_batch: Tiny, tmp_path: Path
) -> None:
    pruned, batch = small(tiny_model("t5", "seq2seq-lm")), tiny_batch(model_type="t5")
    pruned.save_pretrained(tmp_path)
    encoder = load_pruned(tmp_path, model_class=transformers.T5EncoderModel)
    expected = pruned.encoder(**batch).last_hidden_state
    assert torch.equal(encoder(**batch).last_hidden_state, expected)
    assert not [name for name in encoder.state_dict() if "decoder" in name]


@pytest.mark.parametrize(
    ("model_class", "option"),
    [
        (transformers.BertModel, {"add_pooling_layer": False}),
        (transformers.RobertaModel, {"add_pooling_layer": False}),
        (transformers.ViTModel, {"add_pooling_layer": False, "use_mask_token": True}),
    ],
)
def test_arguments_that_no_configuration_records(
    model_class: Any, option: dict[str, bool], tiny_model: Tiny, tmp_path: Path
) -> None:
    model = model_class(tiny_model(model_class.config_class.model_type).config, **option)
    check_rebuildable(model)
    pruned = small(model)
    check_rebuildable(pruned)
    pruned.save_pretrained(tmp_path)
    loaded = load_pruned(tmp_path)
    assert loaded.state_dict().keys() == pruned.state_dict().keys()
    assert loaded.state_dict().keys() != model_class(model.config).state_dict().keys()


@pytest.mark.parametrize(
    ("model_class", "message"),
    [
        (transformers.AutoModelForSeq2SeqLM, "AutoModelForSeq2SeqLM has no model of type 'bert'"),
        (transformers.RobertaModel, "RobertaModel has no model of type 'bert'"),
        ("BertModel", "pass a class of transformers for this type"),
    ],
)
def test_a_class_that_does_not_fit_is_refused(
    model_class: Any, message: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    small(tiny_model()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        load_pruned(tmp_path, model_class=model_class)


def test_another_number_of_labels_asks_for_a_new_head(tiny_model: Tiny, tmp_path: Path) -> None:
    small(tiny_model()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"num_labels=7 makes \(7, .*ignore_mismatched_sizes=True"):
        load_pruned(tmp_path, num_labels=7)
    with pytest.warns(RfpruneWarning, match="'classifier.bias' and 1 more"):
        model = load_pruned(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert model.num_labels == 7
