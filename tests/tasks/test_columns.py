"""Rows with wrong values are refused by number; labels come out as numbers.

Without these a model could be scored against labels that were misread.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rfprune.errors import UserError
from rfprune.tasks.registry import get_task
from rfprune.tasks.splits import load_split

SST2, STSB, SQUAD_V2 = (get_task(name) for name in ("sst2", "stsb", "squad_v2"))
Write = Callable[..., Path]
Refused = Callable[..., None]

GOOD = {"sentence": "fine", "label": 1}


def test_scores_and_answers_keep_their_types(tiny_data_dir: Path) -> None:
    assert all(isinstance(x, float) for x in load_split(STSB, "train", tiny_data_dir)["label"])
    answers = load_split(SQUAD_V2, "train", tiny_data_dir)["answers"][:]
    assert {len(answer["text"]) for answer in answers} == {0, 1}


def test_labels_are_neither_needed_nor_checked_when_not_wanted(
    tmp_path: Path, write: Write
) -> None:
    write(tmp_path, [{"sentence": "fine", "label": -1}])
    assert load_split(SST2, "train", tmp_path, labels_required=False).column_names == ["sentence"]
    with pytest.raises(UserError, match="label"):
        load_split(SST2, "train", tmp_path)


@pytest.mark.parametrize(
    ("task", "label", "parts"),
    [
        ("sst2", 2, ("label is 2", "0 negative, 1 positive")),
        ("sst2", None, ("label is missing",)),
        ("sst2", [1], ("label is [1]",)),
        ("sst2", float("nan"), ("label is nan",)),
        *(("stsb", x, ("a number from 0 to 5",)) for x in (-0.1, 5.1, None, float("inf"))),
    ],
)
def test_a_label_out_of_range_or_of_the_wrong_type(
    task: str, label: Any, parts: tuple[str, ...], tmp_path: Path, write: Write, refused: Refused
) -> None:
    texts = {"sentence": "a", "sentence1": "a", "sentence2": "b"}
    rows = [texts | {"label": 1}, texts | {"label": label}]
    path = write(tmp_path, rows, f"{task}/train.jsonl")
    refused(tmp_path, f"'{path}', row 2", *parts, "correct or drop the row", task=task)


def test_numbers_may_come_as_text_or_as_whole_floats(tmp_path: Path, write: Write) -> None:
    write(tmp_path, [{"sentence": "a", "label": "1"}, {"sentence": "b", "label": 0.0}])
    labels = load_split(SST2, "train", tmp_path)["label"][:]
    assert labels == [1, 0]
    assert all(isinstance(label, int) for label in labels)


QUESTION = {"id": "q", "question": "what ?", "context": "the film ."}


@pytest.mark.parametrize(
    "answers",
    [
        None,
        "the film",
        {"text": ["film"]},
        {"text": ["film"], "answer_start": [4, 5]},
        {"text": [3], "answer_start": [4]},
        {"text": ["film"], "answer_start": [-1]},
        {"text": "film", "answer_start": 4},
    ],
)
def test_answers_of_the_wrong_form(
    answers: Any, tmp_path: Path, write: Write, refused: Refused
) -> None:
    write(tmp_path, [QUESTION | {"answers": answers}], "squad_v2/train.jsonl")
    refused(tmp_path, "row 1", "answers must be", "answer_start", task="squad_v2")
