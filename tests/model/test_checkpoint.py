"""Saved folders load again, and damaged or manipulated ones are refused.

Without these tests such a folder could load into a wrong model, or run its code. Damaged files, and
masks or weights that do not fit the configuration, are in tests/robustness/test_changed_outputs.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rfprune.errors import UserError
from rfprune.model.checkpoint import load_masks, load_pruned, save_pruned
from rfprune.model.compact import compact
from rfprune.model.layout import layout_of
from rfprune.model.masks import full_masks
from rfprune.model.modeling_rfprune import check_description, pruned_class, shrink

Tiny = Callable[..., Any]


def pruned(model: Any) -> tuple[Any, Any, Any]:
    layout = layout_of(model)
    masks = full_masks(layout)
    masks[0][1], masks[1][:5], masks[2][:] = 0, 0, 0
    return compact(model, layout, masks), layout, masks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_model: Tiny, tiny_tokenizer: Tiny) -> Path:
    """A pruned bert with one head of layer 0 gone and no head left in layer 1. Copy to change."""
    folder = tmp_path_factory.mktemp("saved")
    save_pruned(*pruned(tiny_model()), folder, tiny_tokenizer())
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved folder that a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.fixture
def folder_of_format_2(folder: Path) -> Path:
    """The same as earlier versions wrote it: every block is listed with all its entries."""
    edit_config(folder, to_format_2)
    return folder


def to_format_2(config: dict[str, Any]) -> None:
    blocks = [
        block
        | {
            "consumer": f"bert.{block['consumer']}",
            "inner": f"bert.{block['inner']}",
            "producers": [each | {"path": f"bert.{each['path']}"} for each in block["producers"]],
        }
        for block in check_description(config["rfprune"])
    ]
    config["rfprune"] = {"format_version": 2, "blocks": blocks}


def test_the_files_of_a_folder(saved: Path) -> None:
    names = {path.name for path in saved.iterdir()}
    assert {"config.json", "modeling_rfprune.py", "pruning", "tokenizer.json"} <= names
    assert [path.name for path in saved.glob("*.safetensors")] == ["model.safetensors"], (
        "servers load every file of this kind in the folder"
    )
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    config = json.loads((saved / "config.json").read_text())
    name = "BertForSequenceClassification"
    assert config["architectures"] == [name]
    auto_map = config["auto_map"]
    assert auto_map["AutoModelForSequenceClassification"] == f"modeling_rfprune.{name}"
    assert auto_map["AutoModel"] == "modeling_rfprune.BertModel"
    blocks = config["rfprune"]["blocks"]
    assert [(block["name"], block["num_units"]) for block in blocks] == [
        ("layer.*.heads", "3 0"),
        ("layer.*.neurons", "7 12"),
    ]
    assert blocks[0]["units"] == "0 2 3, "


def test_the_readme_of_a_folder_says_how_to_load_it(
    saved: Path, tiny_model: Tiny, tmp_path: Path
) -> None:
    text = (saved / "README.md").read_text()
    for words in ("trust_remote_code=True)", "load_pruned(", "MISMATCH"):
        assert words in text
    (tmp_path / "README.md").write_text("mine")
    save_pruned(*pruned(tiny_model()), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_implementation": "flash_attention_2"}, "choose another attn_implementation"),
        ({"dtype": "no"}, r"correct the arguments \(dtype\)"),
        ({"no_such": 1}, r"correct the arguments \(no_such\)"),
    ],
)
def test_arguments_of_the_caller_are_named(
    options: dict[str, Any], message: str, saved: Path
) -> None:
    with pytest.raises(UserError, match=message):
        load_pruned(saved, **options)


def test_load_pruned_runs_no_code_of_the_folder(folder: Path, tiny_batch: Tiny) -> None:
    marker = folder / "executed"
    code = f"import pathlib; pathlib.Path({str(marker)!r}).touch(); raise SystemExit"
    (folder / "modeling_rfprune.py").write_text(code)
    model = load_pruned(folder)
    assert not marker.exists()
    assert model(**tiny_batch()).logits.isfinite().all()
    with pytest.raises(SystemExit):  # the code would have run, had it been asked for
        transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, trust_remote_code=True
        )
    assert marker.exists()


def test_a_model_loaded_with_its_own_code_is_pruned_again(
    saved: Path, tmp_path: Path, tiny_batch: Tiny
) -> None:
    batch = tiny_batch()
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    theirs, ours = load(saved, trust_remote_code=True), load_pruned(saved)
    layout = layout_of(theirs)
    assert layout == layout_of(ours)
    masks = full_masks(layout)
    masks[0][0] = 0
    small = compact(theirs, layout, masks)
    expected = compact(ours, layout, masks)(**batch).logits
    assert torch.equal(small(**batch).logits, expected)
    save_pruned(small, layout, masks, tmp_path)
    assert torch.equal(load_pruned(tmp_path)(**batch).logits, expected)


def test_sharded_weights_and_arguments_of_from_pretrained(
    saved: Path, tmp_path: Path, tiny_batch: Tiny
) -> None:
    model, batch = load_pruned(saved), tiny_batch()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(load_pruned(str(tmp_path))(**batch).logits, model(**batch).logits)
    model = load_pruned(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "eager")


def test_masks_come_back(saved: Path, tiny_model: Tiny) -> None:
    _, layout, masks = pruned(tiny_model())
    loaded = load_masks(saved)
    assert list(loaded) == sorted(block.name for block in layout.blocks)
    for block, mask in zip(layout.blocks, masks, strict=True):
        assert torch.equal(loaded[block.name], mask)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        load_pruned(tmp_path / "missing")
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_pruned(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable JSON"),
        ("[1]", "does not hold a JSON object"),
        ("{}", "no entry 'rfprune', so this is not a pruned model"),
        ('{"rfprune": {"format_version": 4, "blocks": []}}', "format version is 4, not 3: upgrade"),
        ('{"rfprune": {"format_version": 1, "blocks": {}}}', "no list of blocks"),
        ('{"rfprune": {"format_version": 1, "blocks": [3]}}', "must have the fields name, kind"),
        ('{"rfprune": {"format_version": 2, "blocks": [3]}}', "must have the fields name, kind"),
        ('{"rfprune": {"format_version": 3, "blocks": [3]}}', "blocks cannot be read"),
    ],
)
def test_a_config_of_another_kind_is_refused(text: str, message: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_pruned(folder)


PRODUCER = "bert.encoder.layer.0.attention.self.query"
TAMPERED: list[tuple[str, Any]] = [
    ("kind", 3),
    ("kind", "expert"),
    ("name", 0),
    ("num_units", True),
    ("num_units", 3.0),
    ("num_units", -1),
    ("unit_width", 0),
    ("units", "012"),
    ("units", [0, 1]),
    ("units", [0, 1, "__class__"]),
    ("units", [0, 1, -1]),
    ("units", [0, 1, 1]),
    ("producers", "query"),
    ("producers", [{"path": "classifier", "parts": 1, "width": 4}]),
    ("producers", [{"path": PRODUCER, "parts": 0, "width": 4}]),
    ("producers", [{"path": PRODUCER, "parts": 1, "width": -4}]),
    ("path", [{"path": 1, "parts": 1, "width": 4}]),
    ("width", [{"path": PRODUCER, "parts": 1, "width": 4.0}]),
    ("consumer", ["classifier"]),
    ("inner", None),
    ("producers", [{"path": "bert.encoder.layer.0.attention.selfish", "parts": 1, "width": 4}]),
    ("inner_returns_tuple", 1),
    ("head_bias", True),
]


@pytest.mark.parametrize(("field", "value"), TAMPERED, ids=repr)
def test_a_bad_field_is_refused(
    field: str, value: Any, folder_of_format_2: Path, tiny_model: Tiny
) -> None:
    """Also by the code in the folder, which runs without rfprune."""
    place = "producers" if field in ("path", "width") else field
    edit_config(
        folder_of_format_2, lambda config: config["rfprune"]["blocks"][0].update({place: value})
    )
    with pytest.raises(UserError, match=f"a block has a bad '{field}'"):
        load_pruned(folder_of_format_2)
    model = tiny_model()
    model.config.rfprune = json.loads((folder_of_format_2 / "config.json").read_text())["rfprune"]
    with pytest.raises(ValueError, match=f"a block has a bad '{field}'"):
        pruned_class(type(model))(model.config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "must have the fields"),
        ({"producers": [1]}, "a producer of a block must have the fields path"),
        (
            {"producers": [{"path": PRODUCER, "parts": 3, "width": 4}]},
            "query' is smaller than 36 features",
        ),
        (
            {"head_bias": "no_such"},
            "'no_such' is not in list",
        ),
        ({"consumer": "bert.encoder"}, "is a BertEncoder, not a linear map"),
        ({"consumer": "bert.no.such"}, "there is no module 'no.such'"),
        ({"consumer": "__class__"}, "there is no module"),
        ({"consumer": ""}, "not a linear map"),
        ({"num_units": 10**9, "units": None}, "is smaller than 4000000000 features"),
        ({"num_units": 0, "units": [], "inner": "bert.encoder.layer.0"}, "is too deep inside"),
    ],
)
def test_a_path_must_name_a_linear_map_of_at_least_the_size(
    change: dict[str, Any], message: str, folder_of_format_2: Path, tiny_model: Tiny
) -> None:
    edit_config(folder_of_format_2, lambda config: config["rfprune"]["blocks"][0].update(change))
    model = tiny_model()
    model.config.rfprune = json.loads((folder_of_format_2 / "config.json").read_text())["rfprune"]
    with pytest.raises(ValueError, match=message):
        pruned_class(type(model))(model.config)
    with pytest.raises(UserError):
        load_pruned(folder_of_format_2)


def test_a_model_is_not_shrunk_twice(saved: Path) -> None:
    model = load_pruned(saved)
    with pytest.raises(ValueError, match="is a ConstantOutput, not a linear map"):
        shrink(model, check_description(model.config.rfprune))


NO_ARCHITECTURES: list[Any] = [["Trainer"], ["PrunedBertConfig"], ["NoSuchModel"], [], None, [{}]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({"architectures": names}, "not a supported class of transformers")
            for names in NO_ARCHITECTURES
        ),
        ({"model_type": "gpt_neo"}, "of type 'gpt_neo', .* not a supported class"),
    ],
    ids=str,
)
def test_an_unknown_architecture_is_refused(
    change: dict[str, Any], message: str, folder: Path
) -> None:
    edit_config(folder, lambda config: config.update(change))
    with pytest.raises(UserError, match=message):
        load_pruned(folder)


def test_only_model_classes_are_made_on_demand() -> None:
    from rfprune.model import modeling_rfprune

    made = modeling_rfprune.BertModel
    assert made.pruned_from is transformers.BertModel
    assert made is pruned_class(transformers.BertModel) is pruned_class(made)
    for name in ("Trainer", "BertConfig", "NoSuchThing", "_secret", "__path__", "PreTrained"):
        with pytest.raises(AttributeError, match=name):
            getattr(modeling_rfprune, name)


def test_the_first_class_name_of_version_0_1_0_loads(
    folder: Path, saved: Path, tiny_batch: Tiny
) -> None:
    """The class was called Pruned and the name of the original at first."""
    name = "PrunedBertForSequenceClassification"
    edit_config(folder, lambda config: config.update(architectures=[name]))
    batch = tiny_batch()
    assert torch.equal(load_pruned(folder)(**batch).logits, load_pruned(saved)(**batch).logits)


def test_a_folder_of_format_version_1_loads(
    folder_of_format_2: Path, saved: Path, tiny_batch: Tiny
) -> None:
    """Then every producer had as many rows as the consumer had columns."""

    def as_it_was(config: dict[str, Any]) -> None:
        config["rfprune"]["format_version"] = 1
        for block in config["rfprune"]["blocks"]:
            block["layer"] = int(block.pop("name").split(".")[1])
            block["producers"] = [producer["path"] for producer in block["producers"]]
            block["shared_position_bias"] = block.pop("head_bias") is not None

    edit_config(folder_of_format_2, as_it_was)
    old, new, batch = load_pruned(folder_of_format_2), load_pruned(saved), tiny_batch()
    assert torch.equal(old(**batch).logits, new(**batch).logits)
    assert old.config.rfprune == new.config.rfprune
    assert load_masks(folder_of_format_2).keys() == load_masks(saved).keys()


def test_a_missing_weight_is_named_once(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 'classifier\.bias', .* save or download"):
        load_pruned(folder)
    assert "MISSING" not in capfd.readouterr().err, "transformers' own report is silenced"


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (0, {"has_bias_table": True}, "has_bias_table=True for 'layer.0.heads'"),
        (0, {"bypass": "biased", "has_bias_table": True}, "that of a bert model is 'plain'"),
        (2, {"bypass": "normed"}, "bypass='normed' for 'layer.1.heads'"),
        (2, {"inner_returns_tuple": False}, "that of a bert model is True"),
        (1, {"kind": "head"}, "that of a bert model is 'neuron'"),
        (2, {"inner": "bert.no.such", "producers": []}, "cannot be loaded"),
    ],
)
def test_a_block_must_agree_with_its_family(
    number: int, change: dict[str, Any], message: str, folder_of_format_2: Path
) -> None:
    """Otherwise it would load, and fail when it runs."""
    edit_config(
        folder_of_format_2, lambda config: config["rfprune"]["blocks"][number].update(change)
    )
    with pytest.raises(UserError, match=message):
        load_pruned(folder_of_format_2)


@pytest.mark.parametrize(("model_type", "head"), [("gpt2", "causal-lm"), ("t5", "seq2seq-lm")])
def test_tied_weights_are_stored_once_in_any_dtype(
    model_type: str, head: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    parts = pruned(tiny_model(model_type, head))
    save_pruned(*parts, tmp_path / "whole")
    save_pruned(*parts, tmp_path / "half", dtype=torch.float16)
    whole, half = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "half"))
    assert half.keys() == whole.keys()
    assert {value.dtype for value in half.values() if value.numel()} == {torch.float16}
    loaded = load_pruned(tmp_path / "half")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_masks_beside_the_weights_are_found_as_earlier_versions_wrote_them(folder: Path) -> None:
    masks = load_masks(folder)
    (folder / "pruning/masks.safetensors").rename(folder / "masks.safetensors")
    found = load_masks(folder)
    assert found.keys() == masks.keys()
    assert all(torch.equal(found[name], values) for name, values in masks.items())
