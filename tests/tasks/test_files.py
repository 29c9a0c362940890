"""Every format gives the same rows, and every error names its file.

Without these a row could be read differently from a csv than from a parquet file.
"""

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
def test_every_format_gives_the_same_rows_and_nothing_is_written(
    extension: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path, SENTENCES, f"sst2/train{extension}")
    before = everything_in(tmp_path)
    loaded = load_split(SST2, "train", tmp_path)
    assert loaded["sentence"][:] == [row["sentence"] for row in SENTENCES]
    assert loaded["label"][:] == [row["label"] for row in SENTENCES]
    assert everything_in(tmp_path) == before


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


# What can be wrong


@pytest.mark.parametrize(
    ("files", "place", "parts", "asked"),
    [
        ([], "none", ["none'", "does not exist"], {}),
        (["file"], "file", ["file'", "is not a folder"], {}),
        (["sst2/train.csv"], "", ["no dev split", "holds train.csv"], {"split": "dev"}),
        ([], "", ["no train split of sst2", "holds nothing"], {}),
        (["sst2/train.csv"], "", ["no train split of mrpc", "holds sst2"], {"task": "mrpc"}),
        (["sst2/train.csv"], "sst2", ["holds train.csv", "give the folder above"], {}),
        (["train.csv"], "", ["holds train.csv", "move them to", "sst2'"], {}),
        (["sst2/train.csv", "sst2/train.tsv"], "", ["twice", "train.csv", "train.tsv"], {}),
    ],
)
def test_a_split_that_is_not_there(
    files: list[str], place: str, parts: list[str], asked: dict[str, str], tmp_path: Path,
    refused: Refused,
) -> None:  # fmt: skip
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("sentence,label\nfine,1\n")
    refused(tmp_path / place, *parts, **asked)


def test_a_long_folder_is_not_listed_whole(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"other-{number:03}").touch()
    with pytest.raises(UserError, match=r"other-019, \.\.\.") as raised:
        load_split(SST2, "train", tmp_path)
    assert "other-020" not in str(raised.value)


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_missing_column_names_those_found_and_needed(
    extension: str, tmp_path: Path, write: Write, refused: Refused
) -> None:
    rows = [{"text": "fine", "label": 1}]
    path = write(tmp_path, rows, f"sst2/train{extension}")
    refused(tmp_path, str(path), "no column sentence", "needs sentence, label", "text, label")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("train.csv", b"sentence,label\nfine,1\ncaf\xe9", ("not UTF-8", "line 3")),
        ("train.tsv", b"sentence\tlabel\nfine\t1\ncaf\xe9", ("not UTF-8", "line 3")),
        ("train.jsonl", b'{"sentence": "fine", "label": 1}\ncaf\xe9', ("not UTF-8", "line 2")),
        ("train.jsonl", b'{"sentence": "a", "label": 1}\n{"sentence"', ("line 2", "not JSON")),
        ("train.jsonl", b'[{"sentence": "a", "label": 1}]\n', ("line 1", "one object per line")),
        ("train.csv", b"sentence,label\na,1\nb,c,0\n", ("line 3", "3 fields", "line has 2")),
        ("train.csv", b'sentence,label\na,1\n"b,0\n', ("line 3", "cannot be parsed")),
        ("train.csv", b"sentence,sentence\na,b\n", ("twice", "rename")),
        ("train.tsv", b"sentence\tlabel\na\t1\nb\n", ("line 3", "1 fields")),
    ],
)
def test_a_file_that_is_not_what_its_name_says(
    name: str, content: bytes, parts: tuple[str, ...], tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / name).write_bytes(content)
    refused(tmp_path, name, *parts)


def test_a_damaged_parquet_file(tmp_path: Path, write: Write, refused: Refused) -> None:
    path = write(tmp_path, SENTENCES * 50, "sst2/train.parquet")
    content = path.read_bytes()
    flipped = content[:4] + bytes(255 - byte for byte in content[4:200]) + content[200:]
    for damaged in (content[: len(content) // 2], flipped):
        path.write_bytes(damaged)
        refused(tmp_path, str(path), "not a readable parquet file")
    path.write_bytes(content)
    parquet.write_table(parquet.read_table(path).slice(0, 0), path)
    refused(tmp_path, str(path), "no rows")
    texts = pa.array([b"caf\xe9"]).view(pa.string())
    parquet.write_table(pa.table({"sentence": texts, "label": [1]}), path)
    refused(tmp_path, str(path), "not a readable parquet file", "utf-8")


def test_a_damaged_saved_dataset(tmp_path: Path, refused: Refused) -> None:
    datasets.Dataset.from_list(SENTENCES).save_to_disk(tmp_path / "sst2/train")
    for path in (tmp_path / "sst2/train").glob("*.arrow"):
        path.write_bytes(b"nonsense")
    refused(tmp_path, str(tmp_path / "sst2/train"), "not a readable saved dataset")


@pytest.mark.parametrize("separator", [";", "\t", "|", ","])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("quote", ["", '"'])
def test_the_header_shows_the_separator(
    separator: str, suffix: str, quote: str, tmp_path: Path
) -> None:
    rows = [("sentence", "label"), ("a good film, or not", "1"), ("bad", "0")]
    if separator == ",":
        rows[1] = ("a good film", "1")
    path = tmp_path / "sst2" / f"train{suffix}"
    path.parent.mkdir()
    lines = (separator.join(f"{quote}{cell}{quote}" for cell in row) for row in rows)
    path.write_text("\n".join(lines), encoding="utf-8")
    loaded = load_split(SST2, "train", tmp_path)
    assert loaded["sentence"][:] == [row[0] for row in rows[1:]]
    assert loaded["label"][:] == [1, 0]


@pytest.mark.parametrize("header", ["sentence,a;b,label", '"sentence";x,label', "sentence;x|label"])
def test_a_header_with_two_separators_is_read_as_usual(
    header: str, tmp_path: Path, refused: Refused
) -> None:
    path = tmp_path / "sst2" / "train.csv"
    path.parent.mkdir()
    path.write_text(f"{header}\na,b,1\n", encoding="utf-8")
    if header.startswith("sentence,"):
        assert load_split(SST2, "train", tmp_path)["label"][:] == [1]
    else:
        refused(tmp_path, "train.csv")


def test_a_row_with_more_fields_names_the_separator(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "sst2" / "train.csv"
    path.parent.mkdir()
    path.write_text("sentence;label\na;b;1\n", encoding="utf-8")
    refused(tmp_path, "line 2 has 3 fields", "separated by ';'")
