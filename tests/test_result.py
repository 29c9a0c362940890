"""A saved result is what the command writes, loads everywhere, and never damages a folder.

Deleting this lets `PruneResult.save` and the command drift apart, or overwrite a user's files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rfprune import Constraint, PruneResult, Settings, UserError, load_pruned, prune
from rfprune.main import main
from rfprune.model.checkpoint import load_masks
from rfprune.pruning import prune_to_each

Tiny = Callable[..., Any]
HALF = Constraint("mac", 0.5)


@pytest.fixture
def batch(tiny_batch: Tiny) -> dict[str, Tensor]:
    made: dict[str, Tensor] = tiny_batch(6, 8)
    return made


@pytest.fixture
def result(tiny_model: Tiny, batch: dict[str, Tensor]) -> PruneResult:
    return prune(tiny_model(), [batch], HALF)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_saved_folder_holds_the_model_as_the_command_writes_it(
    tiny_folder: Tiny, tiny_data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results: list[PruneResult] = []

    def kept(problem: Any, constraints: Iterable[Constraint]) -> Iterator[PruneResult]:
        for result in prune_to_each(problem, constraints):
            results.append(result)
            yield result

    monkeypatch.setattr("rfprune.cli.run.prune_to_each", kept)
    monkeypatch.setattr("rfprune.latency.speedup.MAX_ROUNDS", 1)
    flags = f"--model {tiny_folder()} --task mrpc --data-dir {tiny_data_dir} --constraint 0.5"
    flags += f" --samples 16 --no-cache --output-dir {tmp_path / 'command'}"
    assert main(flags.split()) == 0
    results[0].save(tmp_path / "api", AutoTokenizer.from_pretrained(tiny_folder()))
    saved = files_in(tmp_path / "api")
    assert {
        "config.json",
        "model.safetensors",
        "pruning/masks.safetensors",
        "modeling_rfprune.py",
    } < saved
    assert any("token" in name for name in saved)
    # the command's tokenizer has padding switched on, and its README is the model card
    for name in saved - {"tokenizer.json", "README.md"}:
        contents = {(tmp_path / folder / name).read_bytes() for folder in ("api", "command")}
        assert len(contents) == 1, name
    others = files_in(tmp_path / "command") - saved
    assert not [name for name in others if name.endswith((".safetensors", ".py"))], others


@pytest.mark.parametrize("uniform", [False, True])
def test_a_saved_model_loads_with_and_without_its_code(
    uniform: bool, tiny_model: Tiny, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    result = prune(tiny_model(), [batch], Constraint("mac", 0.95), Settings(uniform=uniform))
    result.save(str(tmp_path / "new" / "folder"))
    folder = tmp_path / "new" / "folder"
    assert (folder / "modeling_rfprune.py").exists() is not uniform
    remote = AutoModelForSequenceClassification.from_pretrained(
        folder, trust_remote_code=not uniform
    )
    with torch.no_grad():
        expected = result.model(**batch).logits
        assert torch.equal(remote(**batch).logits, expected)
        assert torch.equal(load_pruned(folder)(**batch).logits, expected)
    for block, mask in zip(result.layout.blocks, result.masks, strict=True):
        assert torch.equal(load_masks(folder)[block.name], mask)


def test_weights_are_stored_in_the_dtype_that_is_asked_for(
    result: PruneResult, tmp_path: Path
) -> None:
    result.save(tmp_path / "a", dtype=torch.bfloat16)
    result.save(tmp_path / "b")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in "ab"]
    assert sizes[0] < 0.6 * sizes[1]
    assert load_pruned(tmp_path / "a").dtype == torch.float32


def test_only_a_saved_model_is_replaced_and_only_if_asked(
    result: PruneResult, tmp_path: Path
) -> None:
    result.save(tmp_path / "a")
    (tmp_path / "a" / "leftover").touch()
    with pytest.raises(UserError, match="already exists.*overwrite=True"):
        result.save(tmp_path / "a")
    result.save(tmp_path / "a", overwrite=True)
    assert "leftover" not in names_in(tmp_path / "a")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(UserError, match="rfprune has not written.*choose another folder"):
        result.save(tmp_path / "thesis", overwrite=True)
    assert names_in(tmp_path / "thesis") == {"chapter.tex"}


def test_an_error_leaves_nothing_behind(
    result: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result.save(tmp_path / "a")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rfprune.model.checkpoint.save_file", full)
    for name, overwrite in (("a", True), ("b", False)):
        with pytest.raises(UserError, match="No space left.*make room"):
            result.save(tmp_path / name, overwrite=overwrite)
    assert names_in(tmp_path) == {"a"}
    load_pruned(tmp_path / "a")
