"""Rows become the tokens and windows that the tokenizer makes of them.

Without these a text could be cut at another length, or an answer point at other tokens.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rfprune.errors import UserError
from rfprune.tasks.encoding import encode
from rfprune.tasks.question_answering import tokenize_windows
from rfprune.tasks.registry import get_task
from rfprune.tasks.splits import load_split

SST2, STSB, SQUAD, SQUAD_V2 = (get_task(name) for name in ("sst2", "stsb", "squad", "squad_v2"))
MRPC = get_task("mrpc")
Tokenizers = Callable[..., Any]


# Sentences


def plain(sentences: Sequence[str]) -> datasets.Dataset:
    rows = [{"sentence": text, "label": number % 2} for number, text in enumerate(sentences)]
    return datasets.Dataset.from_list(rows)


def test_encoding_is_the_tokenizer_s_own(tiny_tokenizer: Tokenizers, tiny_data_dir: Path) -> None:
    tokenizer, rows = tiny_tokenizer(), load_split(MRPC, "validation", tiny_data_dir)
    encoded = encode(MRPC, tokenizer, rows)
    assert len(encoded) == len(rows)
    for row, made in zip(rows, encoded, strict=True):
        assert made["input_ids"] == tokenizer(row["sentence1"], row["sentence2"])["input_ids"]
        assert made["labels"] == row["label"]
        assert set(made["token_type_ids"]) == {0, 1}


def test_many_rows_are_encoded_in_order(
    tiny_tokenizer: Tokenizers, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = plain(["the " * number for number in range(1, 10)])
    at_once = encode(SST2, tiny_tokenizer(), rows)["input_ids"][:]
    monkeypatch.setattr("rfprune.tasks.encoding.ROWS_AT_A_TIME", 4)
    assert encode(SST2, tiny_tokenizer(), rows)["input_ids"][:] == at_once
    assert [len(row) for row in at_once] == list(range(3, 12))


def test_tokens_are_cut_at_the_task_s_length_or_at_the_one_given(
    tiny_tokenizer: Tokenizers,
) -> None:
    rows = plain(["the " * 300])
    assert len(encode(SST2, tiny_tokenizer(), rows)["input_ids"][0]) == 64
    assert len(encode(SST2, tiny_tokenizer(), rows, 10)["input_ids"][0]) == 10
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 20
    assert len(encode(SST2, tokenizer, rows)["input_ids"][0]) == 20


@pytest.mark.parametrize(
    ("task", "length"), [(SST2, 2), (SST2, 0), (MRPC, 4), (SST2, 513), (SQUAD, 31)]
)
def test_a_length_that_does_not_fit_is_refused(
    task: Any, length: int, tiny_tokenizer: Tokenizers, tiny_data_dir: Path
) -> None:
    rows = load_split(task, "train", tiny_data_dir)
    with pytest.raises(UserError, match=f"--max-length {length} .* to 512"):
        encode(task, tiny_tokenizer(), rows, length)


@pytest.mark.parametrize(
    ("limit", "message"),
    [(20, "--max-length 30 exceeds the 20 tokens that the tokenizer"), (2, "allows 2 tokens")],
)
def test_a_limit_of_the_tokenizer_is_named(
    limit: int, message: str, tiny_tokenizer: Tokenizers
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = limit
    with pytest.raises(UserError, match=rf"{message}.*model_max_length in tokenizer_config\.json"):
        encode(SST2, tokenizer, plain(["the film"]), 30)


def test_a_model_without_token_types_gets_none(tiny_tokenizer: Tokenizers) -> None:
    encoded = encode(SST2, tiny_tokenizer("distilbert"), plain(["the film"]))
    assert set(encoded.column_names) == {"input_ids", "attention_mask", "labels"}


# Questions


def one_question(context: str, answer: str | None, question: str = "what ?") -> datasets.Dataset:
    answers: dict[str, Any] = {"text": [], "answer_start": []}
    if answer is not None:
        answers = {"text": [answer], "answer_start": [context.rindex(answer)]}
    row = {"id": "q", "question": question, "context": context, "answers": answers}
    return datasets.Dataset.from_list([row])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_answer_positions_point_at_the_answer(data: Any, tiny_tokenizer: Tokenizers) -> None:
    tokenizer = tiny_tokenizer()
    words = data.draw(st.lists(st.sampled_from(["film", "zx", "city", "qqq"]), min_size=30))
    context = " ".join(words)
    start = data.draw(st.integers(0, len(words) - 1))
    end = data.draw(st.integers(start + 1, min(start + 4, len(words))))
    answer = " ".join(words[start:end])
    offset = len(" ".join(words[:start])) + (start > 0)
    row = {"question": "what ?", "context": context}
    answers = {"text": [answer], "answer_start": [offset]}
    dataset = datasets.Dataset.from_list([row | {"answers": answers}])
    found = 0
    for window in encode(SQUAD, tokenizer, dataset, 40):
        first, last = window["start_positions"], window["end_positions"]
        if (first, last) == (0, 0):
            continue
        found += 1
        assert tokenizer.decode(window["input_ids"][first : last + 1]).replace(" ##", "") == answer
    assert found >= 1, "windows overlap enough to hold a short answer whole"


def test_a_window_without_the_answer_and_a_question_without_one_point_at_cls(
    tiny_tokenizer: Tokenizers,
) -> None:
    context = "the film " * 40 + "zebra"
    encoded = encode(SQUAD, tiny_tokenizer(), one_question(context, "zebra"), 48)
    starts = encoded["start_positions"][:]
    assert starts[0] == 0
    assert starts[-1] > 0
    none = encode(SQUAD_V2, tiny_tokenizer(), one_question(context, None), 48)
    assert set(none["start_positions"]) == set(none["end_positions"]) == {0}


def test_an_endless_question_is_cut(tiny_tokenizer: Tokenizers) -> None:
    """The tokenizer itself fails where a question leaves no room for context."""
    long = one_question("the film", "film", question="what " * 500)
    encoded = encode(SQUAD, tiny_tokenizer(), long, 48)
    assert encoded["start_positions"][0] == 1 + 16 + 1 + 1
    short = one_question("the film", "film", question="what " * 16)
    assert encode(SQUAD, tiny_tokenizer(), short, 48)["input_ids"][:] == encoded["input_ids"][:]


def test_questions_need_a_fast_tokenizer(tiny_tokenizer: Tokenizers) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="fast tokenizer"):
        tokenize_windows(SQUAD, Slow(), ["what ?"], ["the film"])


# The real data


@pytest.mark.shared
@pytest.mark.parametrize("task", ["mrpc", "sst2", "stsb", "cola", "rte", "wnli", "mnli", "squad"])
def test_real_data_loads_whole(shared: Path, task: str) -> None:
    official = {"mrpc": 408, "sst2": 872, "stsb": 1500, "cola": 1043, "rte": 277, "wnli": 71}
    official |= {"mnli": 9815 + 9832, "squad": 10570}
    known = get_task(task)
    loaded = [load_split(known, split, shared / "data") for split in known.validation_splits]
    assert sum(map(len, loaded)) == official[task]


@pytest.mark.shared
def test_real_data_in_a_copy_that_only_reads(shared: Path, tmp_path: Path) -> None:
    """Data may lie where nothing can be written."""
    folder = tmp_path / "mrpc"
    shutil.copytree(shared / "data/mrpc", folder)
    folder.chmod(0o500)
    assert len(load_split(MRPC, "train", tmp_path)) == 3668
