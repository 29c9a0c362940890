"""The blocks of a model are found, and models that do not fit are refused.

Without these tests an unsupported model could give wrong results or end in a traceback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from rfprune.errors import UserError
from rfprune.families.support import check_supported
from rfprune.model.compact import compact
from rfprune.model.layout import Producer, layout_of
from rfprune.model.masks import full_masks
from tests.conftest import ALL_TYPES, tiny_config

TinyModel = Callable[..., Any]


def test_blocks_name_their_modules_from_the_root(tiny_model: TinyModel) -> None:
    layout = layout_of(tiny_model())
    heads, neurons = layout.blocks_of_layer(1)
    assert layout.layers == ("bert.encoder.layer.0", "bert.encoder.layer.1")
    assert (heads.name, neurons.name) == ("layer.1.heads", "layer.1.neurons")
    assert heads.consumer == "bert.encoder.layer.1.attention.output.dense"
    assert heads.producers[2] == Producer("bert.encoder.layer.1.attention.self.value", 1, 4)
    assert neurons.producers == (Producer("bert.encoder.layer.1.intermediate.dense", 1, 1),)
    assert neurons.consumer == "bert.encoder.layer.1.output.dense"
    assert heads.original_units == (0, 1, 2, 3)
    bare = tiny_model("bert", "none", num_attention_heads=2, intermediate_size=5)
    assert layout_of(bare).layers == ("encoder.layer.0", "encoder.layer.1")
    assert [(block.num_units, block.unit_width) for block in layout_of(bare).blocks[:2]] == [
        *((2, 8), (5, 1)),
    ]


def test_blocks_run_in_their_order(tiny_model: TinyModel, tiny_batch: Callable[..., Any]) -> None:
    for model_type in ALL_TYPES:
        model = tiny_model(model_type)
        layout, ran = layout_of(model), list[str]()
        for block in layout.blocks:
            module = model.get_submodule(block.consumer)
            module.register_forward_hook(lambda *_, at=ran, name=block.name: at.append(name))
        model(**tiny_batch(model_type=model_type))
        order = layout.execution_order or range(len(layout.layers))  # an encoder before its decoder
        assert ran == [block.name for layer in order for block in layout.blocks_of_layer(layer)]


def test_shared_layers_are_blocks_once(tiny_model: TinyModel) -> None:
    """Every published ALBERT has a single layer, which runs many times."""
    model = tiny_model("albert", num_hidden_groups=1)
    layout = layout_of(model)
    assert [block.name for block in layout.blocks] == ["layer.0.heads", "layer.0.neurons"]
    assert layout.execution_order == (0, 0, 0, 0)
    assert [layout.num_runs(block) for block in layout.blocks] == [4, 4]
    uneven = layout_of(tiny_model("albert", num_hidden_groups=4, num_hidden_layers=3))
    assert uneven.execution_order == (0, 0, 1, 2, 2, 3)
    assert [uneven.num_runs(block) for block in uneven.blocks[::2]] == [2, 1, 2, 1]
    plain = layout_of(tiny_model())
    assert plain.execution_order == ()
    assert plain.num_runs(plain.blocks[2]) == 1


@pytest.mark.parametrize("share", [False, True])
def test_projections_of_relative_positions_are_producers(
    share: bool, tiny_model: TinyModel
) -> None:
    block = layout_of(tiny_model("deberta-v2", share_att_key=share)).blocks[0]
    names = [producer.path.rpartition(".")[2] for producer in block.producers]
    own = ["query_proj", "key_proj", "value_proj"]
    assert names == (own if share else [*own, "pos_key_proj", "pos_query_proj"])
    projections = [path.rpartition(".")[2] for path in block.input_projections]
    assert projections == (["value_proj"] if share else own)
    assert (block.rows_from("tokens"), block.rows_from("positions"), block.num_positions) == (
        12,
        8,
        8,
    )
    without = layout_of(tiny_model("deberta-v2", relative_attention=False)).blocks[0]
    assert (len(without.input_projections), without.num_positions) == (3, 0)


def test_an_emptied_sublayer_has_no_block(tiny_model: TinyModel) -> None:
    model = tiny_model()
    masks = full_masks(layout_of(model))
    masks[0][:] = 0
    masks[2][[0, 2]] = 0
    layout = layout_of(compact(model, layout_of(model), masks))
    assert [block.name for block in layout.blocks] == [
        "layer.0.neurons",
        "layer.1.heads",
        "layer.1.neurons",
    ]
    assert layout.blocks[1].original_units == (1, 3)
    assert len(layout.layers) == 2


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("bert", {"is_decoder": True, "add_cross_attention": True}, "cross-attention"),
        ("bert", {"chunk_size_feed_forward": 2}, "forward=2.* load it with .*forward=0"),
        ("stablelm", {"use_parallel_residual": True}, "residual=True .* with .*residual=False"),
        ("stablelm", {"qk_layernorm": True}, "has qk_layernorm=True .* with qk_layernorm=False"),
        ("albert", {"inner_group_num": 2}, "inner_group_num=2 .* inner_group_num=1"),
    ],
)
def test_configurations_that_a_row_is_not_right_for_are_refused(
    model_type: str, changes: dict[str, Any], message: str, tiny_model: TinyModel
) -> None:
    with pytest.raises(UserError, match=message):
        layout_of(tiny_model(model_type, **changes))


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("mobilebert", "'mobilebert' is not supported: its layers carry two .* choose another"),
        ("deberta", "'deberta' is not supported: its attention .* choose another"),
        ("mixtral", "'mixtral' is a mixture of experts, which is not .* without experts"),
        ("gpt_neo", r"'gpt_neo' is not supported.*bert, came.*xlm-roberta.*inspect_architecture"),
    ],
)
def test_model_types_without_a_row_are_refused(model_type: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_supported(transformers.AutoConfig.for_model(model_type))


def test_a_wrapper_is_not_a_model(tiny_model: TinyModel) -> None:
    with pytest.raises(UserError, match="DataParallel is not a model of transformers"):
        layout_of(nn.DataParallel(tiny_model()))


class Adapter(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.weight = base, base.weight


def with_adapter(model: Any) -> None:
    attention = model.bert.encoder.layer[1].attention.self
    attention.query = Adapter(attention.query)


def with_integer_weights(model: Any) -> None:
    dense = model.bert.encoder.layer[0].output.dense
    dense.weight = nn.Parameter(dense.weight.data.to(torch.int8), requires_grad=False)


def with_a_shared_layer(model: Any) -> None:
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]


def with_another_size(model: Any) -> None:
    model.bert.encoder.layer[0].intermediate.dense = nn.Linear(16, 11)


def without_a_projection(model: Any) -> None:
    del model.bert.encoder.layer[0].output.dense


def with_layers_of_another_kind(model: Any) -> None:
    model.bert.encoder.layer = nn.Sequential()


def without_layers(model: Any) -> None:
    del model.bert.encoder.layer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_adapter, r"layer\.1.*query' is a Adapter.*merge adapters"),
        (with_integer_weights, r"output\.dense' is a Linear, .* without quantisation"),
        (with_a_shared_layer, "share their weights.* give every layer weights of its own"),
        (with_another_size, r"output\.dense' has 12 .*dense': 11.* save or download"),
        (without_a_projection, r"no module 'bert\.encoder\.layer\.0\.output\.dense'; load"),
        (with_layers_of_another_kind, r"no list of layers at 'bert\.encoder\.layer'; load"),
        (without_layers, r"no list of layers at 'bert\.encoder\.layer'; load the model"),
    ],
)
def test_modules_that_do_not_fit_the_row_are_named(
    change: Callable[[Any], None], message: str, tiny_model: TinyModel
) -> None:
    model = tiny_model()
    change(model)
    with pytest.raises(UserError, match=message):
        layout_of(model)


def test_the_decoder_of_an_encoder_decoder_is_a_second_stack(tiny_model: TinyModel) -> None:
    layout = layout_of(tiny_model("bart", "seq2seq-lm"))
    assert layout.first_decoder_layer == 2
    assert (list(layout.layer_indices()), list(layout.layer_indices(decoder=True))) == (
        [0, 1],
        [2, 3],
    )
    own, cross, neurons = layout.blocks_of_layer(2)
    assert cross.name == "layer.2.cross_heads"
    assert [layout.in_decoder(block) for block in (layout.blocks[0], own, cross)] == [0, 1, 1]
    assert [path.rpartition(".")[2] for path in cross.input_projections] == ["q_proj"]
    assert (cross.rows_from("tokens"), cross.rows_from("encoder")) == (4, 8)
    assert (own.rows_from("tokens"), own.rows_from("encoder"), neurons.rows_from("encoder")) == (
        12,
        0,
        0,
    )
    encoder = layout_of(transformers.T5EncoderModel(tiny_config("t5")))
    assert (encoder.first_decoder_layer, len(encoder.blocks)) == (None, 4)
    wide = layout_of(tiny_model("bart", decoder_attention_heads=2)).blocks
    assert [(block.num_units, block.unit_width) for block in wide[:1] + wide[4:6]] == [
        *((4, 4), (2, 8), (2, 8)),
    ]
