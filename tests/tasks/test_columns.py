"""Rows that are wrong are named; labels come out as numbers, or not at all."""

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
    ("label", "parts"),
    [
        (2, ("label is 2", "0 negative, 1 positive")),
        (-1, ("label is -1",)),
        (0.5, ("label is 0.5",)),
        (None, ("label is missing",)),
        ("positive", ("label is 'positive'",)),
        ([1], ("label is [1]",)),
        (float("nan"), ("label is nan",)),
    ],
)
def test_a_label_out_of_range_or_of_the_wrong_type(
    label: Any, parts: tuple[str, ...], tmp_path: Path, write: Write, refused: Refused
) -> None:
    path = write(tmp_path, [GOOD, {"sentence": "fine", "label": label}])
    refused(tmp_path, f"'{path}', row 2", *parts)


@pytest.mark.parametrize("score", [-0.1, 5.1, "high", None, float("inf")])
def test_a_score_out_of_range_or_of_the_wrong_type(
    score: Any, tmp_path: Path, write: Write, refused: Refused
) -> None:
    good = {"sentence1": "a", "sentence2": "b", "label": 5}
    write(tmp_path, [good, good | {"label": score}], "stsb/train.jsonl")
    refused(tmp_path, "row 2", "a number from 0 to 5", task="stsb")


def test_numbers_may_come_as_text_or_as_whole_floats(tmp_path: Path, write: Write) -> None:
    write(tmp_path, [{"sentence": "a", "label": "1"}, {"sentence": "b", "label": 0.0}])
    labels = load_split(SST2, "train", tmp_path)["label"][:]
    assert labels == [1, 0]
    assert all(isinstance(label, int) for label in labels)


@pytest.mark.parametrize("text", [None, 7, ["fine"]])
def test_missing_text_and_text_of_the_wrong_type(
    text: Any, tmp_path: Path, write: Write, refused: Refused
) -> None:
    write(tmp_path, [GOOD, {"sentence": text, "label": 1}])
    refused(tmp_path, "row 2", "sentence is", "missing" if text is None else repr(text))


def test_an_empty_cell_is_missing_text(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2/train.csv").write_text("sentence,label\nfine,1\n,0\n")
    refused(tmp_path, "row 2", "sentence is missing")


def test_text_outside_unicode(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2/train.jsonl").write_text('{"sentence": "\\ud800", "label": 1}\n')
    refused(tmp_path, "train.jsonl", "Unicode")


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


def test_questions_without_an_answer_are_for_squad_v2(
    tmp_path: Path, write: Write, refused: Refused
) -> None:
    rows: list[dict[str, Any]] = [QUESTION | {"answers": {"text": [], "answer_start": []}}]
    write(tmp_path, rows, "squad/train.jsonl")
    write(tmp_path, rows, "squad_v2/train.jsonl")
    refused(tmp_path, "row 1", "--task squad_v2", task="squad")
    assert len(load_split(SQUAD_V2, "train", tmp_path)) == 1
