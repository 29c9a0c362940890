"""Protected layers, floors, given sizes and units that are removed by number."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rfprune import (
    Settings,
    Sizes,
    UserError,
    load_pruned,
    prune,
    remove_units,
)
from rfprune.cost.limits import protected_blocks
from rfprune.methods.removal import masks_without
from rfprune.model.layout import layout_of
from rfprune.model.masks import masked
from rfprune.settings import METHODS
from tests.conftest import TinyBatch, TinyModel

FULL = {"heads": 4, "neurons": 12}


def settings_of(method: str, **options: Any) -> Settings:
    return Settings(method=method, tune=False, round_to=1, **options)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_protected_stays_whole(
    tiny_model: TinyModel, tiny_batch: TinyBatch, method: str
) -> None:
    model, batches = tiny_model(), [tiny_batch()]
    free = prune(model, batches, 0.4, settings_of(method))
    protected = ("layer.0.heads", "layer.-1.neurons")
    result = prune(model, batches, 0.6, settings_of(method, protect=protected))
    assert result.layers[0]["heads"] == 4
    assert result.layers[1]["neurons"] == 12
    assert result.achieved["mac"] <= 0.6
    assert free.layers[0]["heads"] < 4 or free.layers[1]["neurons"] < 12, "else it says nothing"


@pytest.mark.parametrize("method", METHODS)
def test_heads_that_are_one_unit_go_only_by_name(
    tiny_model: TinyModel, tiny_batch: TinyBatch, method: str
) -> None:
    """A norm follows, so gradients say that such an attention could go for nothing."""
    model, batches = tiny_model("olmo2"), [tiny_batch()]
    result = prune(model, batches, 0.9, settings_of(method))
    assert [layer["heads"] for layer in result.layers] == [1, 1]
    assert sum(layer["neurons"] for layer in result.layers) < 24
    blocks = layout_of(remove_units(model, heads={1: [0]})).blocks
    assert [block.name for block in blocks if block.kind == "head"] == ["layer.0.heads"]


@pytest.mark.parametrize("method", METHODS)
def test_floors_hold_down_to_the_least_constraint(
    tiny_model: TinyModel, tiny_batch: TinyBatch, method: str
) -> None:
    """The refusal names it, it can be met, and there every layer has what the floors ask for."""
    model, batches = tiny_model(num_hidden_layers=3), [tiny_batch()]
    free = prune(model, batches, 0.3, settings_of(method))
    assert any(layer["heads"] < 2 or layer["neurons"] < 3 for layer in free.layers)
    chosen = settings_of(method, min_heads=2, min_neurons=3)
    with pytest.raises(UserError, match="below a floor already costs") as refused:
        prune(model, batches, 0.1, chosen)
    least = float(re.search(r"choose (\S+) or more", str(refused.value))[1])  # type: ignore[index]
    result = prune(model, batches, least, chosen)
    assert all(dict(layer) == {"heads": 2, "neurons": 3} for layer in result.layers)
    with pytest.raises(UserError):
        prune(model, batches, least - 1e-3, chosen)


def test_names_of_layers_and_sublayers(tiny_model: TinyModel) -> None:
    layout = layout_of(tiny_model(num_hidden_layers=4))

    def names(*given: str) -> set[str]:
        assert Settings(protect=given).protect == given
        return protected_blocks(layout, given)

    assert names("layer.1") == {"layer.1.heads", "layer.1.neurons"}
    assert names("layer.-1.heads", "layer.0.neurons") == {"layer.3.heads", "layer.0.neurons"}
    assert names("layer.1-2.heads") == {"layer.1.heads", "layer.2.heads"}
    assert names("neurons") == {f"layer.{layer}.neurons" for layer in range(4)}
    assert protected_blocks(layout, ()) == set()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"protect": ["layer.9"]}, "not in this model, which has the layers 0 to 1"),
        ({"protect": ["layer.-3"]}, "not in this model"),
        ({"protect": ["layer.1-0"]}, "not in this model"),
        ({"protect": ["cross_heads"]}, "this model has heads and neurons"),
        ({"protect": ["layer"]}, "is not a layer or sublayer"),
        ({"protect": ["layer.0.keys"]}, "is not a layer or sublayer"),
        ({"protect": 3}, "protect 3 is not a list of names"),
        ({"protect": [0]}, "is not a layer or sublayer"),
        ({"protect": ["layer.0"], "uniform": True}, "treats all layers alike"),
        ({"min_heads": 5}, "is more than the 4 heads of a layer"),
        ({"min_neurons": 13}, "is more than the 12 neurons of a layer"),
        ({"min_heads": -1}, "min_heads -1 is not"),
        ({"protect": ["heads", "neurons"]}, "cannot be met"),
    ],
)
def test_impossible_wishes_are_refused(
    tiny_model: TinyModel, tiny_batch: TinyBatch, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        prune(tiny_model(), [tiny_batch()], 0.5, Settings(**options))


@pytest.mark.parametrize("method", METHODS)
def test_given_sizes_are_kept(tiny_model: TinyModel, tiny_batch: TinyBatch, method: str) -> None:
    model, batches = tiny_model(), [tiny_batch()]
    sizes = Sizes([{"heads": 3, "neurons": 5}, {"heads": 0}])
    result = prune(model, batches, sizes, Settings(method=method))
    assert [dict(layer) for layer in result.layers] == [
        {"heads": 3, "neurons": 5},
        {"heads": 0, "neurons": 12},
    ]
    assert (result.constraint, result.ratio) == (None, None)
    again = prune(model, batches, Sizes(result.layers), Settings(method=method))
    assert all(map(torch.equal, again.masks, result.masks))


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([FULL], "are of 1 layers and the model has 2"),
        ([FULL, {"heads": 5}], "keep 5 heads in layer 1, which has 4"),
        ([FULL, {"cross_heads": 1}], "keep 1 cross_heads in layer 1, which has 0"),
        ([FULL, FULL], "there is nothing to prune"),
        ([{"heads": 0, "neurons": 0}] * 2, "no head and no neuron"),
        ([{"heads": -1}, FULL], "not a number of units"),
        ([{"heads": 1.5}, FULL], "not a number of units"),
        ([{"heads": True}, FULL], "not a number of units"),
        ({"heads": 3}, "a list with an entry per layer"),
        ([3, 4], "a list with an entry per layer"),
    ],
)
def test_sizes_of_another_model_are_refused(
    tiny_model: TinyModel, tiny_batch: TinyBatch, layers: Any, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        prune(tiny_model(), [tiny_batch()], Sizes(layers))


def test_sizes_come_from_a_list_or_a_report(tmp_path: Path) -> None:
    path = tmp_path / "sizes.json"
    for content in ([FULL], {"layers": [FULL], "task": "mrpc"}):
        path.write_text(json.dumps(content), encoding="utf-8")
        assert Sizes.load(path) == Sizes([FULL])
    path.write_text("[", encoding="utf-8")
    with pytest.raises(UserError, match="missing or not JSON"):
        Sizes.load(path)
    with pytest.raises(UserError, match="nothing"):
        prune_nothing = Settings(protect=("layer.0",), min_heads=1)
        prune(None, [], Sizes([FULL]), prune_nothing)


@pytest.mark.parametrize("model_type", ["bert", "llama", "gpt2", "bart"])
def test_removed_units_are_those_that_a_mask_would_hide(
    tiny_model: TinyModel, tiny_batch: TinyBatch, model_type: str, tmp_path: Path
) -> None:
    model, batch = tiny_model(model_type), tiny_batch(model_type=model_type)
    removed: dict[str, Any] = {
        "heads": {0: [1, 2]},
        "neurons": {0: range(4), 1: [11]},
    }
    if model_type == "bart":
        removed["cross_heads"] = {2: {0}}
    smaller = remove_units(model, **removed)
    layout = layout_of(model)
    with torch.inference_mode():
        original = model(**batch).logits
        with masked(model, layout, masks_without(layout, removed)):
            expected = model(**batch).logits
        found = smaller(**batch).logits
    assert not torch.allclose(original, expected, atol=1e-3), "else the units do nothing"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert smaller.num_parameters() < model.num_parameters()
    smaller.save_pretrained(tmp_path)
    with torch.inference_mode():
        torch.testing.assert_close(load_pruned(tmp_path)(**batch).logits, found)


def test_with_batches_the_rest_is_fitted_to_the_original(
    tiny_model: TinyModel, tiny_batch: TinyBatch
) -> None:
    model = tiny_model()
    batches = [tiny_batch(16, 12, seed=seed) for seed in range(8)]
    heads, neurons = {0: [0, 3]}, {1: range(6)}
    fitted = remove_units(model, heads=heads, neurons=neurons, batches=batches)
    plain = remove_units(model, heads=heads, neurons=neurons)
    errors = []
    for one in (plain, fitted):
        with torch.inference_mode():
            parts = [
                (one(**batch).logits - model(**batch).logits).square().sum() for batch in batches
            ]
        errors.append(float(sum(parts)))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize(
    ("removed", "says"),
    [
        ({}, "there is nothing to remove"),
        ({"heads": {}}, "there is nothing to remove"),
        ({"heads": {0: []}}, "there is nothing to remove"),
        ({"heads": {2: [0]}}, "layer 2 has no heads to remove: layers 0 to 1 have them"),
        ({"cross_heads": {0: [0]}}, "none has them"),
        ({"heads": {0: [4]}}, "has the heads 0 to 3, and not 4"),
        ({"heads": {0: [-1]}}, "and not -1"),
        ({"neurons": {0: [0.5]}}, "and not 0.5"),
        ({"heads": [0, 1]}, "give the numbers by layer"),
        (
            {"heads": {0: range(4), 1: range(4)}, "neurons": dict.fromkeys((0, 1), range(12))},
            "left",
        ),
    ],
)
def test_units_that_do_not_exist_are_refused(
    tiny_model: TinyModel, removed: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        remove_units(tiny_model(), **removed)
