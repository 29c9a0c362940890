"""Every format gives the same rows; what is wrong is named; nothing is ever written."""

from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from rfprune.errors import UserError
from rfprune.tasks.files import EXTENSIONS
from rfprune.tasks.registry import get_task
from rfprune.tasks.splits import load_split

SST2 = get_task("sst2")
Write = Callable[..., Path]
Refused = Callable[..., None]

SENTENCES = [
    {"sentence": 'he said "fine", twice', "label": 1, "idx": 0},
    {"sentence": "tab\tand\nline", "label": 0, "idx": 1},
    {"sentence": "naïve café \u2028 \u0085 日本", "label": 1, "idx": 2},
    {"sentence": ' "quoted" ', "label": 0, "idx": 3},
]


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Formats


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_every_format_gives_the_same_rows(extension: str, tmp_path: Path, write: Write) -> None:
    write(tmp_path, SENTENCES, f"sst2/train{extension}")
    loaded = load_split(SST2, "train", tmp_path)
    assert loaded["sentence"][:] == [row["sentence"] for row in SENTENCES]
    assert loaded["label"][:] == [row["label"] for row in SENTENCES]


@pytest.mark.parametrize("place", ["sst2", ".", "split"])
def test_a_saved_dataset_gives_the_same_rows(place: str, tmp_path: Path) -> None:
    made = datasets.Dataset.from_list(SENTENCES)
    if place == "split":
        made.with_format("torch").save_to_disk(tmp_path / "sst2" / "train")
    else:
        datasets.DatasetDict(train=made, validation=made).save_to_disk(tmp_path / place)
    before = everything_in(tmp_path)
    loaded = load_split(SST2, "train", tmp_path)
    assert loaded["sentence"][:] == [row["sentence"] for row in SENTENCES]
    assert loaded["label"][:] == [row["label"] for row in SENTENCES]
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_nothing_is_written_anywhere(
    extension: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    write(tmp_path, SENTENCES, f"data/sst2/train{extension}")
    before = everything_in(tmp_path)
    load_split(SST2, "train", tmp_path / "data")
    assert everything_in(tmp_path) == before
    assert not cache.exists()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), min_size=1),
        min_size=1,
        max_size=5,
    ),
    extension=st.sampled_from([".csv", ".tsv", ".jsonl"]),
)
def test_any_text_survives_any_text_format(
    texts: list[str], extension: str, tmp_path: Path, write: Write
) -> None:
    rows = [{"sentence": text, "label": 0} for text in texts]
    path = write(tmp_path, rows, f"sst2/train{extension}")
    loaded = load_split(SST2, "train", tmp_path)
    path.unlink()
    assert loaded["sentence"][:] == texts


def test_a_tsv_without_quoting_keeps_its_quotes(tmp_path: Path) -> None:
    """GLUE's own files: read by csv's rules, the first quote would swallow lines."""
    lines = ["sentence\tlabel", '"great" film\t1', 'he said "no\t0', 'the "end"\t1', '"\t0']
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2/train.tsv").write_text("\r\n".join(lines) + "\r\n", newline="")
    loaded = load_split(SST2, "train", tmp_path)
    assert loaded["sentence"][:] == ['"great" film', 'he said "no', 'the "end"', '"']
    assert loaded["label"][:] == [1, 0, 1, 0]


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2/train.csv").write_text("sentence,label\nfine,1\n", encoding="utf-8-sig")
    assert load_split(SST2, "train", tmp_path)["sentence"][:] == ["fine"]


def test_one_row_is_a_set(tmp_path: Path, write: Write) -> None:
    write(tmp_path, SENTENCES[:1])
    assert len(load_split(SST2, "train", tmp_path)) == 1


# What can be wrong


def test_a_missing_folder(tmp_path: Path, refused: Refused) -> None:
    refused(tmp_path / "none", str(tmp_path / "none"), "does not exist")


def test_a_file_in_place_of_the_folder(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    refused(path, str(path), "is not a folder")


def test_a_missing_split_lists_what_is_there(
    tmp_path: Path, write: Write, refused: Refused
) -> None:
    write(tmp_path, SENTENCES)
    refused(tmp_path, "no validation split of sst2", "holds train.jsonl", split="validation")


def test_a_missing_task_lists_what_is_there(tmp_path: Path, write: Write, refused: Refused) -> None:
    refused(tmp_path, "no train split of sst2", "holds nothing")
    write(tmp_path, SENTENCES)
    refused(tmp_path, "no train split of mrpc", "holds sst2", task="mrpc")


def test_the_task_s_own_folder_is_one_too_deep(
    tmp_path: Path, write: Write, refused: Refused
) -> None:
    write(tmp_path, SENTENCES)
    refused(tmp_path / "sst2", "holds train.jsonl", f"give the folder above, '{tmp_path}'")


def test_files_outside_of_the_task_s_folder(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "train.csv").write_text("sentence,label\nfine,1\n")
    refused(tmp_path, "holds train.csv", f"move them to '{tmp_path / 'sst2'}'")


def test_a_folder_full_of_other_things_is_not_listed_whole(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"other-{number:03}").touch()
    with pytest.raises(UserError) as raised:
        load_split(SST2, "train", tmp_path)
    assert "other-019, ..." in str(raised.value)
    assert "other-020" not in str(raised.value)


def test_a_split_that_is_there_twice(tmp_path: Path, write: Write, refused: Refused) -> None:
    write(tmp_path, SENTENCES, "sst2/train.csv")
    write(tmp_path, SENTENCES, "sst2/train.parquet")
    refused(tmp_path, "twice", "train.csv", "train.parquet")


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_missing_column_names_those_found_and_wanted(
    extension: str, tmp_path: Path, write: Write, refused: Refused
) -> None:
    rows = [{"text": "fine", "label": 1}]
    path = write(tmp_path, rows, f"sst2/train{extension}")
    refused(tmp_path, str(path), "no column sentence", "needs sentence, label", "text, label")


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_an_empty_file(extension: str, tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / f"sst2/train{extension}"
    path.parent.mkdir()
    path.touch()
    refused(tmp_path, str(path), "empty")


@pytest.mark.parametrize(
    ("name", "content"),
    [("train.csv", "sentence,label\n"), ("train.tsv", "sentence\tlabel\n"), ("train.csv", "\n\n")],
)
def test_a_file_without_rows(name: str, content: str, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / name).write_text(content)
    refused(tmp_path, name, "empty")


def test_a_parquet_file_without_rows(tmp_path: Path, write: Write, refused: Refused) -> None:
    path = write(tmp_path, SENTENCES, "sst2/train.parquet")
    parquet.write_table(parquet.read_table(path).slice(0, 0), path)
    refused(tmp_path, str(path), "no rows")


@pytest.mark.parametrize("extension", [".csv", ".tsv", ".jsonl"])
def test_text_that_is_not_utf_8_is_named_with_its_line(
    extension: str, tmp_path: Path, write: Write, refused: Refused
) -> None:
    path = write(tmp_path, [{"sentence": "fine", "label": 1}] * 2, f"sst2/train{extension}")
    path.write_bytes(path.read_bytes() + b"caf\xe9")
    lines = path.read_bytes().count(b"\n")
    refused(tmp_path, str(path), "not UTF-8", f"line {lines + 1}")


def test_a_parquet_file_with_text_that_is_not_utf_8(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "sst2").mkdir()
    texts = pa.array([b"caf\xe9"]).view(pa.string())
    table = pa.table({"sentence": texts, "label": [1]})
    parquet.write_table(table, tmp_path / "sst2/train.parquet")
    refused(tmp_path, "train.parquet", "not a readable parquet file", "utf-8")


@pytest.mark.parametrize("damage", ["text", "cut", "flipped"])
def test_a_damaged_parquet_file(
    damage: str, tmp_path: Path, write: Write, refused: Refused
) -> None:
    path = write(tmp_path, SENTENCES * 50, "sst2/train.parquet")
    content = path.read_bytes()
    path.write_bytes(
        {
            "text": b"sentence,label\n",
            "cut": content[: len(content) // 2],
            "flipped": content[:4] + bytes(255 - byte for byte in content[4:200]) + content[200:],
        }[damage]
    )
    refused(tmp_path, str(path), "not a readable parquet file")


def test_a_damaged_saved_dataset(tmp_path: Path, refused: Refused) -> None:
    datasets.Dataset.from_list(SENTENCES).save_to_disk(tmp_path / "sst2/train")
    for path in (tmp_path / "sst2/train").glob("*.arrow"):
        path.write_bytes(b"nonsense")
    refused(tmp_path, str(tmp_path / "sst2/train"), "not a readable saved dataset")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("train.jsonl", '{"sentence": "a", "label": 1}\n{"sentence"', ("line 2", "not JSON")),
        ("train.jsonl", '[{"sentence": "a", "label": 1}]\n', ("line 1", "not a JSON object")),
        ("train.csv", "sentence,label\na,1\nb,c,0\n", ("line 3", "3 fields", "first line has 2")),
        ("train.csv", 'sentence,label\na,1\n"b,0\n', ("line 3", "cannot be parsed")),
        ("train.csv", "sentence,sentence\na,b\n", ("twice",)),
        ("train.tsv", "sentence\tlabel\na\t1\nb\n", ("line 3", "1 fields")),
    ],
)
def test_a_file_that_is_not_what_its_name_says(
    name: str, content: str, parts: tuple[str, ...], tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / name).write_text(content)
    refused(tmp_path, name, *parts)
