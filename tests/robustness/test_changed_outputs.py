"""Output folders that were changed after pruning: `load_pruned` runs none of their code.

Deleting this lets a folder from elsewhere run code, or load into a model that is silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.robustness.harness import (
    AFTER_LOADING,
    CODE,
    Case,
    Place,
    Request,
    check,
    edit_json,
    edit_weights,
    parametrize,
)

Edit = Callable[[Path], Any]
Entry = dict[str, Any]


def _pruned(
    given: str, says: str, edit: Edit, load: str = "load_pruned", outcome: str = "refused"
) -> Case:
    """A case of a finished output, spoilt, and then loaded."""

    def prepare(place: Place) -> Request:
        from rfprune.model import checkpoint

        folder = place.copy(place.material.finished, "pruned")
        edit(folder)
        return lambda: getattr(checkpoint, load)(folder)

    return Case(given, says, prepare, outcome)


def _config(given: str, says: str, change: Callable[[Entry], Any]) -> Case:
    return _pruned(given, says, lambda folder: edit_json(folder / "config.json", change))


def _block(given: str, says: str, **entries: Any) -> Case:
    """A config.json whose first block has these entries."""

    def change(config: Entry) -> None:
        from tests.model.test_checkpoint import to_format_2

        to_format_2(config)
        config["rfprune"]["blocks"][0].update(entries)

    return _config(given, says, change)


def _group(given: str, says: str, **entries: Any) -> Case:
    """A config.json whose first entry, the heads of all layers, is changed."""
    return _config(given, says, lambda config: config["rfprune"]["blocks"][0].update(entries))


def _masks(
    given: str, says: str, change: Callable[[dict[str, Any]], Any], version: str = "1"
) -> Case:
    """A case of the file of masks, read as it is for looking at what was kept."""

    def edit(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        masks = load_file(folder / "pruning/masks.safetensors")
        change(masks)
        save_file(masks, folder / "pruning/masks.safetensors", metadata={"format_version": version})

    return _pruned(f"masks.safetensors: {given}", says, edit, "load_masks")


def _cut(name: str) -> Edit:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:100])


def _with_code(place: Place) -> Request:
    """The command, on a pruned model whose modelling file was edited."""
    folder = place.copy(place.material.finished, "pruned")
    (folder / "modeling_rfprune.py").write_text(CODE, encoding="utf-8")
    return place.flags(model="pruned", **AFTER_LOADING)


def _dense(place: Place) -> Request:
    from rfprune import load_pruned

    return lambda: load_pruned(place.material.model)


def _shorter(masks: dict[str, Any]) -> None:
    kept = masks["layer.0.neurons"]
    masks["layer.0.neurons"] = kept[: int(kept.nonzero()[-1])].clone()


def _square(masks: dict[str, Any]) -> None:
    masks["layer.0.heads"] = masks["layer.0.heads"].reshape(2, 2).contiguous()


def _one_more(masks: dict[str, Any]) -> None:
    kept = next(mask for mask in masks.values() if not mask.all())
    kept[int((kept == 0).nonzero()[0])] = 1


PRUNED = (
    _pruned("a modelling file that was edited (it is not run, the model loads)", "",
            lambda folder: (folder / "modeling_rfprune.py").write_text(CODE, encoding="utf-8"),
            outcome="loaded"),
    Case("an edited modelling file, given to the command (it is not run)",
         "cannot be met", _with_code),
    Case("a model that was never pruned", "not a pruned model", _dense),
    _config("a newer format version", "upgrade rfprune",
            lambda config: config["rfprune"].update(format_version=4)),
    _config("blocks that are no list", "no list of blocks",
            lambda config: config["rfprune"].update(blocks={})),
    _config("a block left out", "config.json says",
            lambda config: config["rfprune"]["blocks"].pop(0)),
    _config("an architecture that is a Trainer", "not a supported class",
            lambda config: config.update(architectures=["Trainer"])),
    _config("an architecture that is no name", "not a supported class",
            lambda config: config.update(architectures=[{}])),
    _config("heads that do not divide the hidden size", "cannot be loaded",
            lambda config: config.update(num_attention_heads=5)),
    _config("a configuration without a hidden size", "has the shape",
            lambda config: config.pop("hidden_size")),
    _group("layers of no number", "cannot be read", layers="0 one"),
    _group("sizes of a layer that there is not", "cannot be read", num_units="1 1 1 1 1 1 1"),
    _group("a field that no group has", "must have the fields", evil=1),
    _group("a size of 10⁹ units", "bad 'units'", num_units="1000000000 1"),
    _group("producers that are a list", "cannot be read", producers=["attention.self.query"]),
    _group("a path out of the Transformer", "bad 'producers'", producers={"pooler.dense": "1 x 4"}),
    _group("a first layer before all others", "cannot be loaded", first_layer=-3),
    _block("a block of an unknown field", "must have the fields", evil=1),
    _block("a block of -1 units", "bad 'num_units'", num_units=-1),
    _block("a block of 10⁹ units", "cannot be loaded", num_units=10**9, units=None),
    _block("units that are code", "bad 'units'", units=["__class__"]),
    _block("a path out of the model", "cannot be loaded", consumer="__class__"),
    _block("a path to another projection", "cannot be loaded", consumer="classifier"),
    _block("a path that is a number", "bad 'consumer'", consumer=7),
    _block("a block that hands on a position bias", "where that of a bert model", bypass="biased"),
    _block("a block with a table of biases", "where that of a bert model", has_bias_table=True),
    _pruned("config.json cut short", "not readable JSON", _cut("config.json")),
    _pruned("weights cut short", "damaged", _cut("model.safetensors")),
    _pruned("weights that are text", "damaged",
            lambda folder: (folder / "model.safetensors").write_text("no", encoding="utf-8")),
    _pruned("no weights", "cannot be loaded",
            lambda folder: (folder / "model.safetensors").unlink()),
    _pruned("weights as a pickle", "cannot be loaded", lambda folder: (
        folder / "model.safetensors").rename(folder / "pytorch_model.bin")),
    _pruned("a weight left out", "lack 'classifier.bias'", lambda folder: edit_weights(
        folder / "model.safetensors", lambda tensors: tensors.pop("classifier.bias"))),
    _pruned("a weight too many", "has no place", lambda folder: edit_weights(
        folder / "model.safetensors",
        lambda tensors: tensors.update(evil=tensors["classifier.bias"].clone()))),
    _pruned("a folder that is a file", "is not a folder", lambda folder: (
        folder.rename("elsewhere"), folder.write_text("no", encoding="utf-8"))),
    _masks("a mask one unit short", "keeps", _shorter),
    _masks("a mask of another rank", "keeps nothing", _square),
    _masks("a unit that the model does not have", "keeps", _one_more),
    _masks("a mask missing", "keeps nothing", lambda masks: masks.pop("layer.0.heads")),
    _masks("a mask of a layer that there is not", "no such block", lambda masks: masks.update(
        {"layer.9.heads": masks["layer.0.heads"].clone()})),
    _masks("a newer format version", "upgrade rfprune", lambda _: None, version="9"),
    _pruned("masks.safetensors: cut short", "cannot be read", _cut("pruning/masks.safetensors"),
            "load_masks"),
)  # fmt: skip


@parametrize(PRUNED)
def test_changed_outputs_are_refused_or_load_without_their_code(case: Case, place: Place) -> None:
    check(case, place)
