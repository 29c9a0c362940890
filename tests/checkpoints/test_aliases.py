"""Aliases lead to checkpoints; other names are unchanged or refused.

Without these an alias could lead to the checkpoint of another task."""

from pathlib import Path

import pytest

from rfprune.checkpoints import aliases
from rfprune.checkpoints.aliases import CHECKPOINTS, is_alias, resolve_checkpoint
from rfprune.errors import UserError
from rfprune.tasks.registry import TASKS, get_task


@pytest.mark.parametrize("alias", ["bert-base", "bert-large", "distilbert", "roberta-base"])
@pytest.mark.parametrize("task", list(TASKS))
def test_an_alias_leads_to_a_checkpoint_of_its_kind_for_the_task(alias: str, task: str) -> None:
    checkpoint = resolve_checkpoint(alias, get_task(task))
    owner, name = checkpoint.split("/")
    assert owner
    assert alias in name
    letters = name.lower().replace("-", "").replace("_", "")
    assert {"squad": "squad", "squad_v2": "squad2"}.get(task, task) in letters


@pytest.mark.parametrize(
    ("spelling", "alias"),
    [
        ("bert-base-uncased", "bert-base"),
        ("bert-large-uncased", "bert-large"),
        ("distilbert-base-uncased", "distilbert"),
        ("roberta", "roberta-base"),
    ],
)
def test_other_spellings_mean_the_same(spelling: str, alias: str) -> None:
    assert is_alias(spelling)
    assert CHECKPOINTS[spelling] == CHECKPOINTS[alias]


def test_no_checkpoint_stands_for_two_tasks() -> None:
    for known in CHECKPOINTS.values():
        assert len(set(known.values())) == len(known)
        assert set(known) <= set(TASKS)


def test_an_alias_without_a_checkpoint_says_what_it_has_and_the_ways_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(aliases, "CHECKPOINTS", {"small": {"sst2": "a/b", "rte": "c/d"}})
    with pytest.raises(UserError, match=r"small is known for task mrpc.*sst2, rte.*finetune\.py"):
        resolve_checkpoint("small", get_task("mrpc"))
    assert resolve_checkpoint("small", get_task("rte")) == "c/d"


@pytest.mark.parametrize("name", ["textattack/bert-base-uncased-MRPC", "gpt2", "owner/with.dots"])
def test_a_hub_id_passes_through(name: str) -> None:
    assert not is_alias(name)
    assert resolve_checkpoint(name, get_task("mrpc")) == name


def test_a_folder_passes_through_even_with_the_name_of_an_alias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_alias("bert-base")
    (tmp_path / "bert-base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not is_alias("bert-base")
    assert resolve_checkpoint("bert-base", get_task("mrpc")) == "bert-base"
    assert resolve_checkpoint(str(tmp_path), get_task("mrpc")) == str(tmp_path)


@pytest.mark.parametrize(
    "name", ["./missing", "../a/b", "/no/such/folder", "a/b/c", "with space", "", "~/model"]
)
def test_a_missing_folder_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="does not exist.*bert-base"):
        resolve_checkpoint(name, get_task("mrpc"))
