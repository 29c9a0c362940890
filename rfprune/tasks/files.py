"""Read one local table (parquet, csv, tsv, jsonl, text or a saved dataset) into plain columns.

`datasets.load_dataset` does not serve here: it writes a cache, guesses types (a text "007" becomes
7), takes NA and null for missing values, and its errors name no line.
"""

import csv
import io
import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rfprune.errors import UserError, error_summary
from rfprune.tasks.class_names import ClassNames, class_names_of

EXTENSIONS = (".parquet", ".csv", ".tsv", ".jsonl", ".json")
TEXT = "text"
"""The column of a text file."""

SHOWN_NAMES = 20
"""How many names of a folder's content an error shows."""
SEPARATORS = (",", ";", "\t", "|")
"""Separators of csv and tsv files; which one it is shows in the header line."""

_HEADER = 2**16  # characters in which a header line ends
_QUOTED = re.compile(r'"(?:[^"]|"")*"')


@dataclass(frozen=True)
class Table:
    """Columns of a table as Python values.

    Attributes:
        source: the quoted path, or the name of the dataset, for errors.
        names: of all columns of the table.
        columns: values of the wanted columns that the table has.
        class_names: by id, of the columns that are `ClassLabel`s of the library datasets.
    """

    source: str
    names: tuple[str, ...]
    columns: dict[str, list[Any]]
    class_names: ClassNames = field(default_factory=dict)


def read_table(path: Path, wanted: Collection[str]) -> Table:
    """Read columns of a file, or of a folder made by `save_to_disk`.

    Args:
        path: its suffix decides the format.
        wanted: the columns to read, if the table has them.

    Raises:
        UserError: the file is unreadable, empty, not UTF-8, or not of the format of its suffix.
    """
    readers = {
        ".parquet": _read_parquet,
        ".csv": _read_delimited,
        ".tsv": _read_delimited,
        ".jsonl": _read_json_lines,
        ".json": _read_json_lines,
        ".txt": _read_plain,
    }
    try:
        if path.is_dir():
            return table_of(_load_from_disk(path), wanted, f"'{path}'")
        if path.stat().st_size == 0:
            raise UserError(f"'{path}' is empty: 0 bytes.")
        names, columns = readers[path.suffix](path, wanted)
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror or error}.") from error
    class_names = _class_names_of_parquet(path) if path.suffix == ".parquet" else {}
    return Table(f"'{path}'", tuple(names), columns, class_names)


def _read_plain(path: Path, wanted: Collection[str]) -> tuple[list[str], dict[str, list[Any]]]:
    """A text as a table of one row, in a column of the wanted name."""
    text = _read_text(path)
    if not text.strip():
        raise UserError(f"'{path}' is empty: it holds only white space.")
    names = list(wanted) or [TEXT]
    return names, {name: [text] for name in names}


def table_of(dataset: Any, wanted: Collection[str], source: str) -> Table:
    """The wanted columns that a `datasets.Dataset` has."""
    names = tuple(dataset.column_names)
    plain = dataset.with_format(None)
    columns = {name: plain[name][:] for name in wanted if name in names}
    return Table(source, names, columns, class_names_of(dataset.features.to_dict()))


def _load_from_disk(path: Path) -> Any:
    """A dataset written by `save_to_disk`, in memory."""
    import datasets

    try:
        return datasets.load_from_disk(str(path), keep_in_memory=True)
    except Exception as error:  # the library documents no error type
        raise UserError(
            f"'{path}' is not a readable saved dataset: {error_summary(error)}."
        ) from error


def _read_parquet(path: Path, wanted: Collection[str]) -> tuple[list[str], dict[str, list[Any]]]:
    import pyarrow as pa
    from pyarrow.parquet import read_schema
    from pyarrow.parquet import read_table as read_parquet

    try:
        names = read_schema(path).names
        present = [name for name in wanted if name in names]
        # Through a file of its own: given a path, pyarrow reads folder names as partition keys.
        with path.open("rb") as file:
            table = read_parquet(file, columns=present)
        return names, {name: table.column(name).to_pylist() for name in present}
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"'{path}' is not a readable parquet file: {error_summary(error)}."
        ) from error


def _class_names_of_parquet(path: Path) -> ClassNames:
    """The class names that the library datasets writes into a parquet file, if it wrote it."""
    from pyarrow.parquet import read_schema

    metadata = (read_schema(path).metadata or {}).get(b"huggingface", b"{}")
    try:
        return class_names_of(json.loads(metadata)["info"]["features"])
    except (ValueError, KeyError, TypeError, AttributeError):  # another writer's entry
        return {}


def _read_json_lines(path: Path, wanted: Collection[str]) -> tuple[list[str], dict[str, list[Any]]]:
    rows: list[dict[str, Any]] = []
    names: dict[str, None] = {}
    # Not splitlines(): JSON allows the rarer line separators inside its strings.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"'{path}', line {number} is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise UserError(
                f"'{path}', line {number} is not a JSON object: write one object per line."
            )
        names |= dict.fromkeys(row)
        rows.append(row)
    columns = {name: [row.get(name) for row in rows] for name in wanted if name in names}
    return list(names), columns


def _read_delimited(path: Path, wanted: Collection[str]) -> tuple[list[str], dict[str, list[Any]]]:
    """Columns of a csv or tsv file; an empty cell is a missing value."""
    text = _read_text(path)
    separator = _separator(text, "\t" if path.suffix == ".tsv" else ",")
    rows = _tab_separated(path, text) if separator == "\t" else _quoted(path, text, separator)
    header, *rows = rows
    if len(set(header)) != len(header):
        raise UserError(
            f"'{path}' names a column twice in its first line ({', '.join(header)}): rename one."
        )
    columns = {
        name: [row[position] or None for row in rows]
        for position, name in enumerate(header)
        if name in wanted
    }
    return header, columns


def _separator(text: str, usual: str) -> str:
    """The separator of a file: the usual one, unless another one alone splits the header line."""
    known = [one for one in (usual, *SEPARATORS) if _num_fields(text, one) > 1]
    return known[0] if usual in known or len(set(known)) == 1 else usual


def _num_fields(text: str, separator: str) -> int:
    """Number of columns in the header line; 0 if it cannot be parsed."""
    try:
        rows = csv.reader(io.StringIO(text[:_HEADER], newline=""), delimiter=separator, strict=True)
        return len(next((row for row in rows if row), []))
    except csv.Error:
        return 0


def _tab_separated(path: Path, text: str) -> list[list[str]]:
    """Rows of a tsv file, with or without csv quoting.

    GLUE's own files have none: quotes are plain characters there. A file counts as such if a cell
    has quotes that csv rules could not have written.
    """
    rows = [line.removesuffix("\r").split("\t") for line in text.split("\n") if line.strip()]
    rectangular = all(len(row) == len(rows[0]) for row in rows)
    cells = (cell for row in rows for cell in row if '"' in cell)
    if rows and rectangular and not all(_QUOTED.fullmatch(cell) for cell in cells):
        return rows
    return _quoted(path, text, "\t")


def _quoted(path: Path, text: str, delimiter: str = ",") -> list[list[str]]:
    """Rows of a file with csv quoting, all of one length."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    try:
        for row in reader:
            if row and rows and len(row) != len(rows[0]):
                raise UserError(
                    f"'{path}', line {reader.line_num} has {len(row)} fields, but its first line "
                    f"has {len(rows[0])}, separated by {delimiter!r}: correct the line, or quote "
                    f"the text with a separator."
                )
            if row:
                rows.append(row)
    except csv.Error as error:
        raise UserError(f"'{path}', line {reader.line_num} cannot be parsed: {error}.") from error
    if not rows:
        raise UserError(f"'{path}' is empty: it has no header line.")
    return rows


def _read_text(path: Path) -> str:
    """The text of a file without a byte order mark; UserError if it is not UTF-8."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"'{path}' is not UTF-8 (line {line}, byte {error.start}): save it as UTF-8."
        ) from error
