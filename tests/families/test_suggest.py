"""Suggested rows agree with the rows of known families.

Without these tests a suggestion could name the wrong modules to someone who adds a family.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from rfprune.errors import UserError
from rfprune.families.architectures import ARCHITECTURES
from rfprune.families.schema import Architecture, Stack, Sublayer
from rfprune.families.suggest import as_text, suggest
from rfprune.families.support import check_supported
from scripts import inspect_architecture
from tests.conftest import ALL_TYPES, tiny_config

SUGGESTED = [each for each in ALL_TYPES if each != "siglip_text_model"]
"""Not the type that no Auto class of transformers makes a model of."""


@pytest.mark.parametrize("model_type", SUGGESTED)
def test_known_rows_are_suggested(model_type: str) -> None:
    config = tiny_config(model_type, intermediate_size=32)
    found = suggest(config)
    expected = ARCHITECTURES[model_type].stacks_of(config)
    assert [each.stack.layers for each in found] == [stack.layers for stack in expected]
    for each, stack in zip(found, expected, strict=True):
        assert each.left_over == {}
        assert each.stack.pre_norm == stack.pre_norm
        assert len(each.stack.sublayers) == len(stack.sublayers)
        for ours, theirs in zip(each.stack.sublayers, stack.sublayers, strict=True):
            if model_type == "gpt_neox":  # sizes do not tell how queries, keys and values lie
                ours = replace(ours, fused=1)
            assert visible(ours, config) == visible(theirs, config)
    scaled = model_type != "granite" and any(  # whose scale is a number
        sublayer.layer_scale or sublayer.position_bias_table for sublayer in expected[0].sublayers
    )
    assert bool(found[0].other_parameters) == scaled, "what modules alone do not tell is named"


def visible(sublayer: Sublayer, config: Any) -> dict[str, object]:
    """What the modules of a layer tell."""
    hidden = {
        *("head_bias", "layer_scale", "includes_residual", "returns_position_bias"),
        *("position_producers", "encoder_producers", "gated_producers", "position_bias_table"),
    }
    in_layer = sublayer.in_layer("layer", config)
    seen = {name: value for name, value in vars(in_layer).items() if name not in hidden}
    return seen | {"producers": {*in_layer.producers, *in_layer.position_producers}}


def test_the_text_is_the_row() -> None:
    text = as_text("llama", suggest(tiny_config("llama")))
    names = {"Architecture": Architecture, "Stack": Stack, "Sublayer": Sublayer}
    rows = eval("{" + text + "}", names)
    assert rows["llama"].stacks == ARCHITECTURES["llama"].stacks


def test_an_encoder_and_its_decoder_are_two_stacks() -> None:
    config = transformers.T5Config(d_model=16, d_kv=4, d_ff=32, num_heads=4, num_layers=2)
    encoder, decoder = (each.stack for each in suggest(config))
    assert (encoder.layers, decoder.layers) == ("encoder.block", "decoder.block")
    labels = [sublayer.label for sublayer in decoder.sublayers]
    assert labels == ["", "cross_heads", ""]


def test_what_does_not_fit_is_named_in_comments() -> None:
    mobilebert = transformers.MobileBertConfig(
        hidden_size=32, intra_bottleneck_size=16, num_hidden_layers=1, embedding_size=16
    )
    text = as_text("mobilebert", suggest(mobilebert))
    assert "# in no sublayer: attention.self.query (16 -> 16)" in text
    text = as_text("beit", suggest(tiny_config("beit")))
    assert "# layer_scale, head_bias or position_bias_table? lambda_1, lambda_2" in text
    layoutlm = transformers.LayoutLMConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    text = as_text("layoutlm", suggest(layoutlm))  # reads the values of its boxes
    assert "# check the order: the model did not run (Tensor.item() cannot be called" in text
    assert "consumer='output.dense'" in text


def test_models_that_cannot_be_made_or_have_no_layers_are_refused() -> None:
    with pytest.raises(UserError, match="ResNetModel has no list of layers .* of 7 features"):
        suggest(transformers.ResNetConfig(hidden_size=7, embedding_size=8, depths=[1, 1, 1, 1]))
    with pytest.raises(UserError, match=r"of type 'bert' .*multiple.* give a folder with a config"):
        suggest(transformers.BertConfig(hidden_size=30, num_attention_heads=4))


def test_a_defect_is_not_mistaken_for_a_model_that_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise KeyError("a defect")

    monkeypatch.setattr(transformers.BertModel, "__init__", broken)
    with pytest.raises(KeyError, match="a defect"):
        suggest(tiny_config("bert"))


def test_an_unknown_type_is_told_where_to_look(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"inspect_architecture\.py longformer'") as caught:
        check_supported(transformers.LongformerConfig())
    assert "families/architectures.py" in str(caught.value)
    assert inspect_architecture.main(["longformer"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# add to rfprune/families/architectures.py")
    assert "attention.self.query" in out
    tiny_config("gpt2").save_pretrained(tmp_path)
    assert inspect_architecture.main([str(tmp_path)]) == 0
    assert "already in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "way_out"),
    [("clip", "name the type of the model"), ("no-such-model", "neither a model type")],
)
def test_a_name_without_a_row_is_refused(
    name: str, way_out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect_architecture.main([name]) == 2
    assert way_out in capsys.readouterr().err
