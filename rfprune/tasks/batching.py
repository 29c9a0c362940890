"""From encoded rows to padded batches, longest rows first.

Batches equal those of Hugging Face's collators where these apply (a test compares them). They are
not used here since they need a padding token, which GPT-2 lacks, and leave answer positions where
they were when the padding is on the left.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rfprune.errors import UserError
from rfprune.tasks.image_classification import IMAGE, pixels
from rfprune.tasks.question_answering import POSITIONS

TOKEN_LABELS = "token_labels"
"""The column with a label per token, -100 for none; it is called `labels` in a batch."""

LABELS = ("labels", TOKEN_LABELS, *POSITIONS)
_NOT_A_LABEL = -100

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class LazyBatches(Sequence[Batch]):
    """Batches that are made at each access, for images, which would fill the memory."""

    columns: Mapping[str, Sequence[Any]]
    rows: Sequence[Sequence[int]]
    processor: Any

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: Any) -> Any:
        rows = self.rows[number]
        chosen = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return collate(chosen, self.processor)

    def __iter__(self) -> Iterator[Batch]:
        return (self[number] for number in range(len(self)))


def length_sorted_rows(encoded: Any, batch_size: int) -> list[list[int]]:
    """Row numbers of each batch, longest rows first: if memory runs out, it does so at once."""
    if batch_size < 1:
        raise UserError(
            f"A batch size of {batch_size} is too small: choose --batch-size 1 or more."
        )
    lengths = np.array([_length(row) for row in encoded[first_column(encoded)][:]])
    order = np.argsort(-lengths, kind="stable").tolist()
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def first_column(encoded: Any) -> str:
    """The column that every row has: images, or token ids."""
    return IMAGE if IMAGE in getattr(encoded, "column_names", encoded) else "input_ids"


def _length(row: Any) -> int:
    """Tokens of a row, or of its longest choice; 1 for an image."""
    if isinstance(row, str | dict):
        return 1
    return max((len(part) for part in row), default=0) if _is_several(row) else len(row)


def _is_several(row: Sequence[Any]) -> bool:
    return len(row) > 0 and not isinstance(row[0], int | np.integer)


def make_batches(
    encoded: Any, tokenizer: Any, batch_size: int, *, with_labels: bool = False
) -> list[dict[str, Tensor]]:
    """Batches of up to `batch_size` rows, in the order of `length_sorted_rows`.

    Args:
        encoded: a `datasets.Dataset` of `rfprune.tasks.encoding.encode`.
        tokenizer: or the image processor.
        batch_size: rows per batch.
        with_labels: whether batches have labels.

    Returns:
        Per batch, int64 tensors (B, S), S the longest row of the batch, or (B, C, S) for C choices
        per row; for images pixel_values (B, channels, height, width). Labels are (B,), int64, or
        float32 for a regression; (B, L) float32 for several labels per row; (B, S) for tokens.

    Raises:
        UserError: labels are needed and the data has none, or the batch size is below 1.
    """
    names = [name for name in encoded.column_names if with_labels or name not in LABELS]
    if with_labels and not set(LABELS) & set(names):
        raise UserError(
            f"The data has no labels ({', '.join(names)}), but they are needed here: add a column "
            f"of labels, or leave --use-labels out."
        )
    chosen = encoded.select_columns(names)
    return [collate(chosen[rows], tokenizer) for rows in length_sorted_rows(encoded, batch_size)]


def collate(columns: Mapping[str, list[Any]], processor: Any) -> dict[str, Tensor]:
    """One batch from columns of rows: padded on the tokenizer's side, see `make_batches`."""
    if IMAGE in columns:
        batch = {"pixel_values": pixels(columns[IMAGE], processor)}
        return batch | {name: torch.tensor(columns[name]) for name in columns if name != IMAGE}
    rows = columns["input_ids"]
    if not _is_several(rows[0]):
        return _padded(columns, processor)
    flat = {
        name: [part for row in values for part in row]
        for name, values in columns.items()
        if name not in LABELS
    }
    batch = {
        name: values.unflatten(0, (len(rows), -1))
        for name, values in _padded(flat, processor).items()
    }
    return batch | {name: torch.tensor(columns[name]) for name in columns if name in LABELS}


def _padded(columns: Mapping[str, list[Any]], tokenizer: Any) -> dict[str, Tensor]:
    lengths = [len(row) for row in columns["input_ids"]]
    longest = max(lengths)
    left = tokenizer.padding_side == "left"
    fill = {
        "input_ids": tokenizer.pad_token_id or 0,
        "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0),
        TOKEN_LABELS: _NOT_A_LABEL,
    }
    batch: dict[str, Tensor] = {}
    for name, rows in columns.items():
        if name in LABELS and name != TOKEN_LABELS:
            batch[name] = torch.tensor(rows)
            if left and name in POSITIONS:
                batch[name] += longest - torch.tensor(lengths)
            continue
        padded = torch.full((len(rows), longest), fill.get(name, 0))
        for target, row in zip(padded, rows, strict=True):
            where = slice(longest - len(row), None) if left else slice(len(row))
            target[where] = torch.tensor(row)
        batch["labels" if name == TOKEN_LABELS else name] = padded
    return batch
