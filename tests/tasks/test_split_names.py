"""Splits have the names that the flags give them, in every place where data can be.

Without this a dataset with dev and test instead of validation has to be copied and renamed.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from rfprune.errors import UserError
from rfprune.tasks.own_data import (
    blank_custom_task,
    language_task,
    task_from_training_data,
    with_columns,
)
from rfprune.tasks.registry import HeldOut, get_task, with_splits
from rfprune.tasks.splits import load_split

Write = Callable[..., Path]


def rows(word: str) -> list[dict[str, Any]]:
    return [{"text": f"{word} {i}", "label": i % 2} for i in range(4)]


CUSTOM = replace(blank_custom_task(), label_names=("no", "yes"))


@pytest.mark.parametrize("form", [".csv", ".jsonl", ".parquet", "saved"])
def test_named_splits_are_read(form: str, tmp_path: Path, write: Write) -> None:
    if form == "saved":
        datasets.DatasetDict(
            {name: datasets.Dataset.from_list(rows(name)) for name in ("dev", "test", "train")}
        ).save_to_disk(tmp_path)
    else:
        for name in ("dev", "test", "train"):
            write(tmp_path, rows(name), f"{name}{form}")
    task = with_columns(with_splits(CUSTOM, "dev", "test"), tmp_path, None, None)
    assert (task.train_split, task.validation_splits) == ("dev", ("test",))
    for split in ("dev", "test"):
        assert load_split(task, split, tmp_path)["text"][:] == [row["text"] for row in rows(split)]
    blank = with_splits(blank_custom_task(), "dev", "test")
    assert task_from_training_data(tmp_path, None, None, task=blank).train_split == "dev"


def test_the_hub_is_asked_for_the_named_split(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, name: str | None, split: str) -> Any:
        if split != "dev":
            raise ValueError(f"Unknown split \"{split}\". Should be one of ['dev', 'test'].")
        return datasets.Dataset.from_list([{"text": "a film"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = with_splits(language_task(), "dev", None)
    assert load_split(task, "dev", None)["text"][:] == ["a film"]
    with pytest.raises(UserError, match="one of .'dev', 'test'.*--validation-split NAME"):
        load_split(task, "validation", None)


@pytest.mark.parametrize(("split", "flag"), [("train", "--train"), ("validation", "--validation")])
def test_a_missing_split_names_the_flag_and_what_is_there(
    split: str, flag: str, tmp_path: Path, write: Write
) -> None:
    write(tmp_path, rows("a"), "dev.csv")
    with pytest.raises(UserError, match=rf"no {split} split.*{flag}-split NAME.* dev\.csv"):
        load_split(replace(CUSTOM, text_columns=("text",), label_column="label"), split, tmp_path)


def test_a_split_cannot_be_both() -> None:
    for train, validation in (("dev", "dev"), ("validation", None), (None, "train")):
        with pytest.raises(UserError, match=r"--train-split or --validation-split"):
            with_splits(CUSTOM, train, validation)
    mnli = with_splits(get_task("mnli"), None, "validation_mismatched")
    assert mnli.validation_splits == ("validation_mismatched",)


def test_rows_are_held_out_of_the_named_training_split(tmp_path: Path, write: Write) -> None:
    for name in ("dev", "validation"):
        write(tmp_path, rows(name), f"{name}.csv")
    held_out = replace(CUSTOM, held_out=HeldOut(0.5))
    with pytest.raises(UserError, match="--validation-split test.*--validation-fraction 0.5"):
        with_splits(held_out, None, "test")
    task = with_columns(with_splits(held_out, "validation", None), tmp_path, None, None)
    found = [load_split(task, split, tmp_path)["text"][:] for split in ("validation", "train")]
    assert all(text.startswith("validation") for half in found for text in half)


@pytest.mark.parametrize("name", ["", "..", "a/b", "dev.csv ", "train[:10%]"])
def test_other_names_are_refused_at_once(name: str) -> None:
    from rfprune.cli.parser import parse

    with pytest.raises(UserError, match="--validation-split .*such as dev"):
        parse(["--model", "demo", "--task", "sst2", "--validation-split", name])
