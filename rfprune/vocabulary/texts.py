"""The texts of a vocabulary, from files: plain text, or tables with columns of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rfprune.errors import UserError
from rfprune.tasks.files import EXTENSIONS, read_table
from rfprune.tasks.language_modeling import text_pieces
from rfprune.vocabulary.counting import TokenCounts
from rfprune.vocabulary.trim import count_tokens_of


def count_tokens_of_files(tokenizer: Any, paths: Sequence[Path]) -> TokenCounts:
    """Count the tokens of all files.

    A plain text is read twice, as running text with its line breaks and line by line, since some
    tokenizers mark the beginning of a text; of the two counts of a token the larger one holds.

    Raises:
        UserError: a file is missing, empty, binary or not UTF-8, or a table has no text.
    """
    lines, running = list[str](), list[str]()
    for path in paths:
        if path.suffix in EXTENSIONS:
            texts = texts_of_table(path)
            lines += texts
            running += texts
        else:
            text = read_text(path)
            lines += text.splitlines()
            running += text_pieces(text)
    return count_tokens_of(tokenizer, lines).most(count_tokens_of(tokenizer, running))


def read_text(path: Path) -> str:
    """A plain text in UTF-8, with or without a byte order mark.

    Raises:
        UserError: the file is missing, empty, binary, or in another encoding.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--vocabulary {path} cannot be read: {error.strerror or error}") from error
    if b"\0" in content:
        raise UserError(
            f"--vocabulary {path} is binary: give plain text in UTF-8, or a table "
            f"({', '.join(EXTENSIONS)})"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--vocabulary {path} is not UTF-8 (byte {error.start}): convert it, for example with "
            "iconv -t UTF-8"
        ) from error
    if not text.strip():
        raise UserError(f"--vocabulary {path} holds no text: give a file with texts")
    return text


def texts_of_table(path: Path) -> list[str]:
    """All texts of a table: of every column, and of lists of texts.

    Raises:
        UserError: the table cannot be read, or has no text.
    """
    columns = read_table(path, read_table(path, ()).names).columns
    found = [text for values in columns.values() for text in _texts(values)]
    if not any(text.strip() for text in found):
        raise UserError(f"--vocabulary {path} has no column with text: give a table with texts")
    return found


def _texts(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list | tuple):
            yield from _texts(value)
        elif isinstance(value, dict):
            yield from _texts(value.values())
