"""Rows that are suggested: what they say of the families whose rows are known.

Deleting this lets the suggestion send somebody who adds a family after the wrong modules.
"""

from __future__ import annotations

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


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_known_rows_are_suggested(model_type: str) -> None:
    config = tiny_config(model_type, intermediate_size=32)
    found = suggest(config)
    expected = ARCHITECTURES[model_type].stacks
    assert [each.stack.layers for each in found] == [stack.layers for stack in expected]
    for each, stack in zip(found, expected, strict=True):
        assert each.left_over == {}
        assert each.stack.pre_norm == stack.pre_norm
        assert len(each.stack.sublayers) == len(stack.sublayers)
        for ours, theirs in zip(each.stack.sublayers, stack.sublayers, strict=True):
            assert visible(ours, config) == visible(theirs, config)
    scaled = any(
        sublayer.layer_scale or sublayer.position_bias_table for sublayer in expected[0].sublayers
    )
    assert bool(found[0].others) == scaled, "what modules alone do not tell is named"


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


def test_what_fits_nowhere_is_said() -> None:
    config = transformers.MobileBertConfig(
        hidden_size=32, intra_bottleneck_size=16, num_hidden_layers=1, embedding_size=16
    )
    text = as_text("mobilebert", suggest(config))
    assert "# fits nowhere: attention.self.query (16 -> 16)" in text


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(UserError, match="no list of layers"):
        suggest(transformers.ResNetConfig(hidden_size=7, embedding_size=8, depths=[1, 1, 1, 1]))


def test_several_models_in_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_architecture.main(["clip"]) == 2
    assert "name the type of the one" in capsys.readouterr().err


def test_an_unknown_type_is_told_where_to_look(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(UserError, match=r"inspect_architecture\.py data2vec-text'") as caught:
        check_supported(transformers.Data2VecTextConfig())
    assert "families/architectures.py" in str(caught.value)
    assert inspect_architecture.main(["data2vec-text"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# to go into rfprune/families/architectures.py")
    assert "attention.self.query" in out


def test_a_folder_is_read_and_nonsense_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config("gpt2").save_pretrained(tmp_path)
    assert inspect_architecture.main([str(tmp_path)]) == 0
    assert "already in" in capsys.readouterr().out
    assert inspect_architecture.main(["no-such-model"]) == 2
    assert "neither a model type" in capsys.readouterr().err
