"""One table that --validation-fraction splits: by the command, and row by row.

Without these a model could be scored on its calibration data, or on other rows each time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from rfprune.errors import UserError
from rfprune.main import main
from rfprune.tasks.own_data import custom_task, language_task, similarity_task, with_columns
from rfprune.tasks.registry import HeldOut, Task
from rfprune.tasks.splits import load_split
from scripts.evaluate import main as evaluate
from tests.conftest import WORDS

Write = Callable[..., Path]
ROWS = [{"text": f"the film {word}", "label": number % 2} for number, word in enumerate(WORDS)]


def splits(task: Task, data_dir: Path, held_out: HeldOut | None) -> tuple[Any, Any]:
    """Both splits of a task whose columns are those of the data."""
    task = with_columns(type(task)(**vars(task) | {"held_out": held_out}), data_dir, None, None)
    return load_split(task, "train", data_dir), load_split(task, "validation", data_dir)


def binary() -> Task:
    from transformers import BertConfig

    return custom_task(BertConfig(), None, "here")


@pytest.mark.parametrize("name", ["mine.csv", "mine.tsv", "mine.jsonl", "mine.parquet"])
def test_every_row_of_the_file_is_in_one_split(name: str, tmp_path: Path, write: Write) -> None:
    path = write(tmp_path, ROWS, name)
    train, validation = splits(binary(), path, HeldOut(0.25, seed=3))
    assert len(validation) == round(0.25 * len(ROWS))
    both = [*train["text"], *validation["text"]]
    assert sorted(both) == sorted(str(row["text"]) for row in ROWS)
    for split in (train, validation):
        assert split[:] == {
            name: [row[name] for row in ROWS if row["text"] in {*split["text"]}]
            for name in ("text", "label")
        }
    again = splits(binary(), path, HeldOut(0.25, seed=3))
    assert again[1][:] == validation[:]
    assert splits(binary(), path, HeldOut(0.25, seed=4))[1][:] != validation[:]


def test_a_folder_with_one_split_is_the_same_as_its_file(tmp_path: Path, write: Write) -> None:
    path = write(tmp_path, ROWS, "train.csv")
    expected = splits(binary(), path, HeldOut(0.25))[1][:]
    assert splits(binary(), tmp_path, HeldOut(0.25))[1][:] == expected
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert splits(binary(), tmp_path / "saved", HeldOut(0.25))[1][:] == expected


def test_texts_pairs_and_images(tmp_path: Path, write: Write) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one\n\ntwo\n\nthree\nand more\n\nfour\n")
    train, validation = splits(language_task(), text, HeldOut(0.25))
    assert (len(train), len(validation)) == (3, 1)
    text.write_text("one\ntwo\nthree\nfour\n")
    train, validation = splits(language_task(), text, HeldOut(0.25))
    assert sorted([*train["text"], *validation["text"]]) == ["four", "one", "three", "two"]

    pairs = [{"sentence1": word, "sentence2": "film", "score": 0.5} for word in WORDS]
    train, validation = splits(similarity_task(), write(tmp_path, pairs, "p.csv"), HeldOut(0.5))
    assert not {*train["sentence1"]} & {*validation["sentence1"]}

    image = pytest.importorskip("PIL.Image")
    for label in "01":
        (tmp_path / f"images/train/{label}").mkdir(parents=True)
        for number in range(4):
            image.new("RGB", (8, 8)).save(tmp_path / f"images/train/{label}/{number}.png")
    from transformers import ViTConfig

    vit = custom_task(ViTConfig(id2label={0: "0", 1: "1"}), None, "here", "image-classification")
    train, validation = splits(vit, tmp_path / "images", HeldOut(0.25))
    assert (len(train), len(validation)) == (6, 2)
    assert not {*train["image"]} & {*validation["image"]}
    shutil.copytree(tmp_path / "images/train", tmp_path / "images/validation")
    with pytest.raises(UserError, match="validation.*already.*leave the flag out"):
        splits(vit, tmp_path / "images", HeldOut(0.25))


@pytest.mark.parametrize(("fraction", "size"), [(0.01, 1), (0.5, 2), (0.99, 3)])
def test_no_split_is_empty(fraction: float, size: int) -> None:
    parts = [HeldOut(fraction).rows(split, 4) for split in ("train", "validation")]
    assert len(parts[1]) == size and sorted([*parts[0], *parts[1]]) == [0, 1, 2, 3]


def test_what_cannot_be_split_is_refused(tmp_path: Path, write: Write) -> None:
    def refused(data_dir: Path, *parts: str) -> None:
        with pytest.raises(UserError) as caught:
            splits(binary(), data_dir, HeldOut(0.25))
        assert all(part in str(caught.value) for part in parts), caught.value

    refused(write(tmp_path, ROWS[:1], "one.csv"), "has 1 row", "at least 2")
    (tmp_path / "notes.md").write_text("mine")
    refused(tmp_path / "notes.md", "is not a table", ".csv", "convert")
    refused(tmp_path / "missing", "does not exist", "train.csv")
    refused(tmp_path, "no train split")
    write(tmp_path, ROWS, "train.csv")
    refused(write(tmp_path, ROWS, "validation.csv").parent, "is a validation split already",
            "leave the flag out")  # fmt: skip
    with pytest.raises(UserError, match="not a folder.*--validation-fraction"):
        splits(binary(), tmp_path / "train.csv", None)


def command(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    code = main([*flags, "--constraint", "0.5", "--quiet", "--no-cache", "--device", "cpu"])
    return code, capsys.readouterr().err


def test_the_command_splits_one_file(
    tiny_folder: Callable[..., Path], tmp_path: Path, write: Write,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = write(tmp_path, ROWS, "mine.csv")
    flags = ("--model", str(tiny_folder()), "--task", "custom", "--data-dir", str(path),
             "--samples", "10", "--output-dir", str(tmp_path / "out"))  # fmt: skip
    code, error = command(capsys, *flags, "--validation-fraction", "0.25")
    assert code == 0, error
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["evaluated_examples"] == round(0.25 * len(ROWS))
    written = tmp_path / "scores.json"
    score = [*flags[:6], "--validation-fraction", "0.25", "--device", "cpu"]
    assert evaluate([*score, "--output", str(written)]) == 0
    scores = json.loads(written.read_text())
    assert scores["score"] == report["original"]["score"]
    code, error = command(capsys, *flags, "--validation-fraction", "0.5")
    assert code == 2, "another fraction is another output"
    assert "--overwrite" in error


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--task custom --data-dir FILE --validation-fraction 1", ("1", "between 0 and 1", "0.2")),
        ("--task custom --data-dir FILE --validation-fraction x", ("--validation-fraction", "x")),
        ("--task custom --data-dir FILE", ("is not a folder", "--validation-fraction 0.2")),
        ("--task sst2 --data-dir FILE --validation-fraction 0.2", ("sst2", "custom", "leave it")),
        ("--task similarity --validation-fraction 0.2", ("similarity", "--data-dir FILE")),
    ],
)
def test_the_command_refuses_other_values(
    flags: str, parts: tuple[str, ...], tmp_path: Path, write: Write,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = str(write(tmp_path, ROWS, "mine.csv"))
    code, error = command(capsys, "--model", "demo", *flags.replace("FILE", path).split())
    assert code == 2
    assert all(part in error for part in parts), error
