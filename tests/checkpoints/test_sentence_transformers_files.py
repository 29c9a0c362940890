"""The files of sentence-transformers folders are read, or refused, and copied whole.

Without these a model could be scored with another pooling than its own, or a downloaded folder
could make a run copy files from elsewhere.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

from rfprune.checkpoints.companion_files import write_companion_files
from rfprune.checkpoints.sentence_transformers import (
    MODULES_FILE,
    read_sentence_transformer,
    read_sentence_transformer_files,
    transformer_folder,
)
from rfprune.errors import RfpruneWarning, UserError

LIBRARY = "sentence_transformers.models"
MEAN = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}


def embedder(
    folder: Path,
    *kinds: str,
    model: str = "",
    pooling: Any = None,
    settings: Any = None,
    library: Any = None,
) -> Path:
    """A folder of an embedder without its model: Transformer, Pooling, and modules of `kinds`."""
    paths = [model, *(f"{place}_{kind}" for place, kind in enumerate(("Pooling", *kinds), 1))]
    entries = [
        {"idx": place, "name": str(place), "path": path, "type": f"{LIBRARY}.{kind}"}
        for place, (path, kind) in enumerate(
            zip(paths, ("Transformer", "Pooling", *kinds), strict=True)
        )
    ]
    written = {
        MODULES_FILE: entries,
        "1_Pooling/config.json": pooling or MEAN,
        f"{model or '.'}/sentence_bert_config.json": settings or {"max_seq_length": 20},
        "config_sentence_transformers.json": library or {"prompts": {}},
    }
    for name, content in written.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def dense(folder: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    """The weights and the settings of a Dense module, which come third."""
    weights = {"linear.weight": torch.eye(4), "linear.bias": torch.ones(4)}
    (folder / "2_Dense").mkdir()
    if name.endswith(".bin"):
        torch.save(weights, folder / "2_Dense" / name)
    else:
        save_file(weights, folder / "2_Dense" / name)
    (folder / "2_Dense" / "config.json").write_text('{"in_features": 4, "out_features": 4}')
    return weights


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        (MEAN, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_cls_token": False}, "lasttoken"),
        ({"embedding_dimension": 16, "pooling_mode": "mean", "include_prompt": True}, "mean"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({"word_embedding_dimension": 16}, "mean"),  # which the library takes, too
    ],
    ids=str,
)
def test_pooling_is_that_of_the_folder(tmp_path: Path, settings: Any, pooling: str) -> None:
    embedder(tmp_path, pooling=settings)
    assert read_sentence_transformer(str(tmp_path)).pooling == pooling
    (tmp_path / MODULES_FILE).unlink()
    alone = read_sentence_transformer(str(tmp_path))
    assert alone.pooling == pooling


@pytest.mark.parametrize(
    "settings",
    [
        {"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True},
        {"pooling_mode": "max"},
        {"pooling_mode": ["mean", "max"]},
    ],
    ids=str,
)
def test_another_pooling_is_refused(tmp_path: Path, settings: Any) -> None:
    with pytest.raises(UserError, match="max.* but one of mean, cls"):
        read_sentence_transformer(str(embedder(tmp_path, pooling=settings)))


def test_all_that_loads_it_is_taken_along_and_nothing_else(tmp_path: Path) -> None:
    """Normalize has no folder in a checkpoint that git has kept: it has no files."""
    folder = embedder(tmp_path / "given", "Normalize")
    (folder / "README.md").write_text("of the original")
    (folder / "1_Pooling" / "notes.txt").write_text("mine")
    assert read_sentence_transformer(str(folder)).max_tokens == 20
    write_companion_files(read_sentence_transformer_files(str(folder)), tmp_path / "out")
    names = {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")
    }
    assert names == {
        *(MODULES_FILE, "config_sentence_transformers.json", "sentence_bert_config.json"),
        *("1_Pooling", "1_Pooling/config.json"),
    }
    for name in ("config_sentence_transformers.json", "1_Pooling/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    kept, given = (
        json.loads((path / MODULES_FILE).read_text()) for path in (tmp_path / "out", folder)
    )
    assert kept == given


def test_a_model_of_its_own_folder_moves_up(tmp_path: Path) -> None:
    """The pruned model lies where the output's config.json is."""
    folder = embedder(tmp_path / "given", model="0_Transformer")
    (folder / "0_Transformer" / "sentence_roberta_config.json").write_text('{"max_seq_length": 9}')
    (folder / "0_Transformer" / "sentence_bert_config.json").unlink()
    assert transformer_folder(folder) == folder / "0_Transformer"
    transformer = str(transformer_folder(folder))
    assert read_sentence_transformer(transformer).max_tokens == 9
    files = read_sentence_transformer_files(transformer)
    assert "sentence_roberta_config.json" in files
    assert [entry["path"] for entry in json.loads(files[MODULES_FILE])] == ["", "1_Pooling"]


def test_a_model_that_lies_within_another_is_not_that_one(tmp_path: Path) -> None:
    folder = embedder(tmp_path, model="0_Transformer")
    (folder / "pruned").mkdir()
    assert not read_sentence_transformer_files(str(folder / "pruned"))
    assert read_sentence_transformer_files(str(folder / "0_Transformer"))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_dense_module_is_copied_as_safetensors_with_a_warning(tmp_path: Path, name: str) -> None:
    folder = embedder(tmp_path, "Dense")
    weights = dense(folder, name)
    with pytest.warns(RfpruneWarning, match="ends in a Dense module"):
        read_sentence_transformer(str(folder))
    files = read_sentence_transformer_files(str(folder))
    assert {name for name in files if name.startswith("2_")} == {
        *("2_Dense/config.json", "2_Dense/model.safetensors"),
    }
    kept = load(files["2_Dense/model.safetensors"])
    assert kept.keys() == weights.keys()
    assert all(torch.equal(kept[key], weights[key]) for key in weights)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"settings": {"do_lower_case": True}}, "converts texts to lower case"),
        (
            {"library": {"prompts": {"q": "query: "}, "default_prompt_name": "q"}},
            "puts 'query: ' before every text",
        ),
    ],
)
def test_differences_to_the_library_give_a_warning(
    tmp_path: Path, changes: Any, sentence: str
) -> None:
    with pytest.warns(RfpruneWarning, match=sentence):
        read_sentence_transformer(str(embedder(tmp_path, **changes)))
    unused = {"prompts": {"q": "query: ", "none": ""}, "default_prompt_name": "none"}
    read_sentence_transformer(str(embedder(tmp_path, library=unused)))  # warnings are errors here


@pytest.mark.parametrize(
    ("kinds", "named"),
    [
        (("WordWeights",), "'WordWeights'"),
        (("Pooling",), "Transformer, Pooling, Pooling"),
        (("Transformer",), "Transformer, Pooling, Transformer"),
    ],
)
def test_other_modules_are_refused(tmp_path: Path, kinds: tuple[str, ...], named: str) -> None:
    with pytest.raises(UserError, match=f"uses the module.*{named}.*choose another"):
        read_sentence_transformer(str(embedder(tmp_path, *kinds)))
    rewrite(embedder(tmp_path), 1, type="custom_pooling.Pooling")
    with pytest.raises(UserError, match="'custom_pooling.Pooling'"):
        read_sentence_transformer(str(tmp_path))
    with pytest.raises(UserError, match="'custom_pooling.Pooling', which is code of its own"):
        read_sentence_transformer_files(str(tmp_path))


def rewrite(folder: Path, place: int, **changes: Any) -> None:
    entries = json.loads((folder / MODULES_FILE).read_text())
    entries[place] |= changes
    (folder / MODULES_FILE).write_text(json.dumps(entries))


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    "path", ["../secret", "1_Pooling/../../secret", "/etc", "C:\\x", "..\\x", 3]
)
def test_no_path_leads_out_of_the_folder(tmp_path: Path, place: int, path: Any) -> None:
    folder = embedder(tmp_path / "given")
    rewrite(folder, place, path=path)
    for read in (read_sentence_transformer, lambda given: transformer_folder(Path(given))):
        with pytest.raises(UserError, match="leads out of its folder"):
            read(str(folder))


@pytest.mark.parametrize(
    "name", ["1_Pooling/config.json", "sentence_bert_config.json", "1_Pooling"]
)
def test_no_link_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    """What is copied may be published."""
    folder = embedder(tmp_path / "given")
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="link that leads out of its folder"):
        read_sentence_transformer_files(str(folder))


def test_links_into_the_hubs_cache_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a snapshot is nothing but links, and the hub need not be asked."""
    from huggingface_hub import constants

    repository = tmp_path / "models--someone--embedder"
    given = embedder(tmp_path / "given", "Normalize", pooling={"pooling_mode_cls_token": True})
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "blobs").mkdir()
    for place, path in enumerate(sorted(path for path in given.rglob("*") if path.is_file())):
        blob = path.rename(repository / "blobs" / f"{place:040x}")
        link = repository / "snapshots" / ("a" * 40) / path.relative_to(given)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    found = read_sentence_transformer("someone/embedder")
    assert found.pooling == "cls"
    assert "1_Pooling/config.json" in read_sentence_transformer_files("someone/embedder")
    with pytest.warns(RfpruneWarning, match="someone/other.*mean over tokens"):
        read_sentence_transformer("someone/other")
    assert not read_sentence_transformer_files("someone/other")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (MODULES_FILE, "[{", "not JSON"),
        (MODULES_FILE, "[]", "does not list modules"),
        (MODULES_FILE, '[{"path": ""}]', "does not list modules"),
        (MODULES_FILE, '[{"type": "x"}, {"type": "y"}]', "has no folder"),
        ("1_Pooling/config.json", None, "is missing"),
        ("1_Pooling/config.json", "[]", "does not hold a JSON object"),
        ("sentence_bert_config.json", "{", "not JSON"),
        ("config_sentence_transformers.json", "{", "not JSON"),
        ("2_Dense/model.safetensors", None, "weights in .* cannot be read"),
        ("2_Dense/model.safetensors", "x", "weights in .* cannot be read"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*Dense module:rfprune.errors.RfpruneWarning")
def test_damaged_files_are_refused(
    tmp_path: Path, name: str, content: str | None, sentence: str
) -> None:
    folder = embedder(tmp_path, "Dense")
    dense(folder)
    assert read_sentence_transformer_files(str(folder))
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(UserError, match=sentence):
        read_sentence_transformer(str(folder))
        read_sentence_transformer_files(str(folder))
    if name == MODULES_FILE:
        with pytest.raises(UserError, match=MODULES_FILE):
            transformer_folder(folder)
