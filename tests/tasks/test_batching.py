"""Padded batches: every row once, longest first, equal to those of Hugging Face's collators.

Without these a label could slide to another row or a token to another place.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers

from rfprune.errors import UserError
from rfprune.tasks.batching import collate, length_sorted_rows, make_batches
from rfprune.tasks.encoding import encode
from rfprune.tasks.registry import get_task
from rfprune.tasks.splits import load_split
from tests.tasks.test_encoding import one_question, plain

SST2, STSB, SQUAD = (get_task(name) for name in ("sst2", "stsb", "squad"))
Tokenizers = Callable[..., Any]


def test_batches_hold_every_row_once_longest_first(tiny_tokenizer: Tokenizers) -> None:
    tokenizer = tiny_tokenizer()
    encoded = encode(SST2, tokenizer, plain(["the " * (number % 7 + 1) for number in range(20)]))
    order = length_sorted_rows(encoded, 6)
    assert sorted(row for rows in order for row in rows) == list(range(20))
    batches = make_batches(encoded, tokenizer, 6, with_labels=True)
    assert [len(batch["input_ids"]) for batch in batches] == [6, 6, 6, 2]
    widths = [batch["input_ids"].shape[1] for batch in batches]
    assert widths == sorted(widths, reverse=True)
    for rows, batch in zip(order, batches, strict=True):
        assert batch["labels"].tolist() == [encoded[row]["labels"] for row in rows]
        for position, row in enumerate(rows):
            ids = encoded[row]["input_ids"]
            assert batch["input_ids"][position, : len(ids)].tolist() == ids
            assert batch["attention_mask"][position].sum() == len(ids)
            assert (batch["input_ids"][position, len(ids) :] == tokenizer.pad_token_id).all()


def test_tensors_have_the_types_that_models_take(
    tiny_tokenizer: Tokenizers, tiny_data_dir: Path
) -> None:
    for task, dtype in ((SST2, torch.int64), (STSB, torch.float32)):
        encoded = encode(task, tiny_tokenizer(), load_split(task, "train", tiny_data_dir))
        batch = make_batches(encoded, tiny_tokenizer(), 8, with_labels=True)[0]
        assert batch["labels"].dtype == dtype
        assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64


def test_padding_on_the_left_moves_the_answer_along(tiny_tokenizer: Tokenizers) -> None:
    tokenizer = tiny_tokenizer()
    rows = datasets.concatenate_datasets(
        [one_question("the film", "film"), one_question("the city and the film", "film")]
    )
    for side in ("right", "left"):
        tokenizer.padding_side = side
        batch = make_batches(encode(SQUAD, tokenizer, rows), tokenizer, 2, with_labels=True)[0]
        assert (batch["attention_mask"] == 0).sum() == 3
        for ids, first, last in zip(
            batch["input_ids"], batch["start_positions"], batch["end_positions"], strict=True
        ):
            assert tokenizer.decode(ids[first : last + 1]) == "film"
    assert batch["attention_mask"][1].tolist()[:3] == [0, 0, 0]


def test_missing_labels_are_refused(tiny_tokenizer: Tokenizers) -> None:
    encoded = encode(SST2, tiny_tokenizer(), plain(["the film"]).remove_columns("label"))
    assert set(make_batches(encoded, tiny_tokenizer(), 1)[0]) == {
        "input_ids",
        "attention_mask",
        "token_type_ids",
    }
    with pytest.raises(UserError, match="has no labels.*needed.*--use-labels"):
        make_batches(encoded, tiny_tokenizer(), 1, with_labels=True)


def test_a_tokenizer_without_padding_pads_what_the_mask_hides(tiny_tokenizer: Tokenizers) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    batch = collate({"input_ids": [[5, 6], [7]], "attention_mask": [[1, 1], [1]]}, tokenizer)
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["input_ids"].shape == (2, 2)


IDS: Sequence[Any] = [[5, 6, 7, 8], [5, 6], [9]]
MASKS: Sequence[Any] = [[1] * len(row) for row in IDS]
COLLATORS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "labels": (
        transformers.DataCollatorWithPadding,
        {"input_ids": IDS, "attention_mask": MASKS, "labels": [1, 0, 1]},
        "labels",
    ),
    "regression": (
        transformers.DataCollatorWithPadding,
        {"input_ids": IDS, "attention_mask": MASKS, "labels": [0.5, 1.5, 2.0]},
        "labels",
    ),
    "token types": (
        transformers.DataCollatorWithPadding,
        {"input_ids": IDS, "token_type_ids": MASKS, "attention_mask": MASKS},
        "labels",
    ),
    "words": (
        transformers.DataCollatorForTokenClassification,
        {"input_ids": IDS, "attention_mask": MASKS, "token_labels": [[1, -100, 0, 2], [0, 1], [2]]},
        "token_labels",
    ),
    "choices": (
        transformers.DataCollatorForMultipleChoice,
        {"input_ids": [IDS[:2], IDS[1:]], "attention_mask": [MASKS[:2], MASKS[1:]],
         "labels": [1, 0]},
        "labels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("case", COLLATORS)
def test_batches_are_those_of_hugging_faces_collators(
    case: str, side: str, tiny_tokenizer: Tokenizers
) -> None:
    collator, columns, label = COLLATORS[case]
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    names = {name: "labels" if name == label else name for name in columns}
    rows = [
        {names[name]: values[row] for name, values in columns.items()}
        for row in range(len(columns["input_ids"]))
    ]
    expected = collator(tokenizer)(rows)
    found = collate(columns, tokenizer)
    assert found.keys() == expected.keys()
    assert (found["attention_mask"] == 0).any(), "padding is needed"
    for name, values in found.items():
        assert values.dtype == expected[name].dtype
        assert torch.equal(values, expected[name]), name
