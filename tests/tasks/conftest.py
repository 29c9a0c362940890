"""What the tests of loading data share: writing rows in any format, and being refused."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rfprune.errors import UserError
from rfprune.tasks.registry import get_task
from rfprune.tasks.splits import load_split

Rows = Sequence[dict[str, Any]]


def _write_parquet(path: Path, rows: Rows) -> None:
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(list(rows)), path)


def _write_csv(path: Path, rows: Rows) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def _write_json(path: Path, rows: Rows) -> None:
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


WRITERS = {
    ".parquet": _write_parquet,
    ".csv": _write_csv,
    ".tsv": _write_csv,
    ".jsonl": _write_json,
    ".json": _write_json,
}


@pytest.fixture
def write() -> Callable[..., Path]:
    """`write(root, rows, name="sst2/train.jsonl")`: the path written, in the format of the name."""

    def writing(root: Path, rows: Rows, name: str = "sst2/train.jsonl") -> Path:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[path.suffix](path, rows)
        return path

    return writing


@pytest.fixture
def refused() -> Callable[..., None]:
    """`refused(root, *parts, split="train", task="sst2")`: loading fails with these parts."""

    def refusing(root: Path, *parts: str, split: str = "train", task: str = "sst2") -> None:
        before = _everything_in(root)
        with pytest.raises(UserError) as raised:
            load_split(get_task(task), split, root)
        message = str(raised.value)
        assert "\n" not in message
        for part in parts:
            assert part in message, message
        assert _everything_in(root) == before

    return refusing


def _everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
