"""Answers from logits, against a search in loops and against the positions of the answers.

Without these spans could be cut at wrong characters or taken from a wrong window, and every score
would be a little too low.
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rfprune.tasks.encoding import encode
from rfprune.tasks.question_answering import (
    Windows,
    best_answers,
    best_spans,
    make_windows,
    null_scores,
    stack_rows,
)
from rfprune.tasks.registry import get_task
from rfprune.tasks.splits import load_split
from rfprune.tasks.squad_scores import squad_scores

Array = NDArray[Any]
SHORT = dataclasses.replace(get_task("squad"), max_length=40, stride=8)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Windows, list[str], Array, Array, int, int]:
    """Windows of up to 4 questions over made-up tokens, contexts, start and end logits, n_best
    and the longest answer. Logits are few numbers, so that there are ties."""
    num_tokens = draw(st.integers(1, 7))
    per_question = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    question = np.repeat(np.arange(len(per_question)), per_question)
    shape = (len(question), num_tokens)
    widths = st.lists(st.integers(0, 2), min_size=num_tokens, max_size=num_tokens)
    offsets = np.zeros((*shape, 2), dtype=np.int32)
    for window in range(len(question)):
        edges = list(itertools.accumulate(draw(widths), initial=draw(st.integers(0, 3))))
        offsets[window] = list(itertools.pairwise(edges))
    floats = st.integers(-3, 3).map(float)
    start, end = (np.array(draw(_table(floats, shape)), dtype=np.float32) for _ in range(2))
    in_context = np.array(draw(_table(st.sampled_from([True, True, False]), shape)))
    windows = Windows(question, in_context, offsets, np.zeros(len(question), dtype=np.int64))
    contexts = ["abcdefghijklmnopqrstuvwxyz"] * len(per_question)
    return windows, contexts, start, end, draw(st.integers(1, 4)), draw(st.integers(1, 3))


def _table(values: st.SearchStrategy[Any], shape: tuple[int, int]) -> st.SearchStrategy[Any]:
    row = st.lists(values, min_size=shape[1], max_size=shape[1])
    return st.lists(row, min_size=shape[0], max_size=shape[0])


def literal_spans(
    windows: Windows, start: Array, end: Array, n_best: int, longest: int, window: int
) -> list[tuple[float, int, int]]:
    """A window's allowed spans, best first, by the loops of the published post-processing."""
    context = [token for token, inside in enumerate(windows.in_context[window]) if inside]
    starts = sorted(context, key=lambda token: -start[window, token])[:n_best]
    ends = sorted(context, key=lambda token: -end[window, token])[:n_best]
    spans = []
    for first, last in itertools.product(starts, ends):
        if last < first or last - first + 1 > longest:
            continue
        if windows.offsets[window, last, 1] <= windows.offsets[window, first, 0]:
            continue
        spans.append((float(start[window, first] + end[window, last]), first, last))
    return sorted(spans, key=lambda span: -span[0])


@given(cases())
def test_spans_are_those_of_the_loops(
    case: tuple[Windows, list[str], Array, Array, int, int],
) -> None:
    windows, _, start, end, n_best, longest = case
    found = best_spans(start, end, windows, n_best=n_best, max_answer_tokens=longest)
    for window, (score, first, last) in enumerate(zip(*found, strict=True)):
        spans = literal_spans(windows, start, end, n_best, longest, window)
        if spans:
            assert (score, first, last) == spans[0]
        else:
            assert score == -np.inf


@given(cases())
def test_answers_are_those_of_the_loops(
    case: tuple[Windows, list[str], Array, Array, int, int],
) -> None:
    windows, contexts, start, end, _, _ = case
    texts, scores = best_answers(start, end, windows, contexts)
    for question, context in enumerate(contexts):
        spans = [
            (*span, window)
            for window in np.flatnonzero(windows.question == question)
            for span in literal_spans(windows, start, end, 20, 30, int(window))
        ]
        if not spans:
            assert (texts[question], scores[question]) == ("", -np.inf)
            continue
        score, first, last, window = max(spans, key=lambda span: span[0])
        characters = windows.offsets[window, first, 0], windows.offsets[window, last, 1]
        assert texts[question] == context[slice(*characters)]
        assert scores[question] == score


@given(cases())
def test_the_null_score_is_the_least_of_the_windows(
    case: tuple[Windows, list[str], Array, Array, int, int],
) -> None:
    windows, contexts, start, end, _, _ = case
    null = null_scores(start, end, windows)
    assert len(null) == len(contexts)
    for question in range(len(contexts)):
        rows = windows.question == question
        assert null[question] == (start[rows, 0] + end[rows, 0]).min()


def test_chunks_of_windows_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    shape = (7, 50)
    offsets = np.stack([np.arange(50), np.arange(1, 51)], axis=1)[None].repeat(7, axis=0)
    windows = Windows(
        np.arange(7), np.ones(shape, dtype=bool), offsets.astype(np.int32), np.zeros(7, np.int64)
    )
    start, end = generator.normal(size=(2, *shape))
    whole = best_spans(start, end, windows)
    assert len(set(whole[0])) == 7
    monkeypatch.setattr("rfprune.tasks.question_answering._WINDOWS_AT_A_TIME", 3)
    for first, second in zip(whole, best_spans(start, end, windows), strict=True):
        np.testing.assert_array_equal(first, second)


def roberta_like_tokenizer() -> Any:
    """Bytes as tokens, `<s> question </s></s> context </s>`, no token types, spaces in offsets."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    ids = {piece: position for position, piece in enumerate((*special, *signs))}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=512,
        bos_token="<s>",
        cls_token="<s>",
        sep_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


@pytest.fixture(params=["bert", "distilbert", "roberta"])
def tokenizer(request: pytest.FixtureRequest, tiny_tokenizer: Callable[..., Any]) -> Any:
    if request.param == "roberta":
        return roberta_like_tokenizer()
    return tiny_tokenizer(request.param)


def test_windows_cover_the_context_and_point_at_its_characters(tokenizer: Any) -> None:
    contexts = ["The city won, and the river (north) lost. " * 4, "blue", ""]
    questions = ["  who won?", "what?", "which?"]
    inputs, windows = make_windows(SHORT, tokenizer, questions, contexts)
    assert (windows.question == 0).sum() > 1  # several windows: the joins are tested
    assert sorted(set(windows.question)) == [0, 1, 2]
    covered = [set[int]() for _ in contexts]
    for window, question in enumerate(windows.question):
        tokens = inputs["input_ids"][window]
        assert len(tokens) <= SHORT.max_length
        assert not windows.in_context[window, len(tokens) :].any()
        for position in np.flatnonzero(windows.in_context[window]):
            first, last = windows.offsets[window, position]
            piece = tokenizer.decode([tokens[position]]).removeprefix("##").strip()
            assert piece.lower() == contexts[question][first:last].lower()
            covered[question] |= set(range(first, last))
        assert tokens[windows.null_position[window]] == tokenizer.cls_token_id
    for context, characters in zip(contexts, covered, strict=True):
        assert {row for row, sign in enumerate(context) if not sign.isspace()} <= characters
    assert ("token_type_ids" in inputs) == ("token_type_ids" in tokenizer.model_input_names)


def test_many_questions_are_tokenised_as_few(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts = ["red green " * (5 + 7 * row) for row in range(5)]
    questions = [f"what {row} ?" for row in range(5)]
    inputs, windows = make_windows(SHORT, tokenizer, questions, contexts)
    monkeypatch.setattr("rfprune.tasks.question_answering._QUESTIONS_AT_A_TIME", 2)
    chunked_inputs, chunked = make_windows(SHORT, tokenizer, questions, contexts)
    assert len(windows.question) > 5
    for name in ("question", "in_context", "offsets", "null_position"):
        np.testing.assert_array_equal(getattr(windows, name), getattr(chunked, name))
    for name, rows in inputs.items():
        assert [row.tolist() for row in rows] == [row.tolist() for row in chunked_inputs[name]]


def test_the_first_token_stands_for_null_where_there_is_no_cls(
    tiny_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = tiny_tokenizer("bert")
    tokenizer.cls_token = None
    _, windows = make_windows(SHORT, tokenizer, ["who ?"], ["red"])
    assert windows.null_position.tolist() == [0]


def test_logits_at_the_answers_positions_give_the_answers(
    tokenizer: Any, tiny_data_dir: Path
) -> None:
    """Tokens that `encode` names as an answer's are read back as its very text."""
    task = dataclasses.replace(SHORT, max_length=64, stride=20)  # no answer is longer
    dataset = load_split(task, "validation", tiny_data_dir)
    encoded = encode(task, tokenizer, dataset)
    inputs, windows = make_windows(task, tokenizer, dataset["question"], dataset["context"])
    assert [row.tolist() for row in inputs["input_ids"]] == list(encoded["input_ids"])
    assert len(encoded) > len(dataset)
    positions = [np.array(encoded[name]) for name in ("start_positions", "end_positions")]
    rows = np.arange(len(encoded))
    start, end = (np.full(windows.in_context.shape, -5.0) for _ in range(2))
    start[rows, positions[0]], end[rows, positions[1]] = 5.0, 5.0
    texts, _ = best_answers(start, end, windows, dataset["context"])
    answers = [answer["text"] for answer in dataset["answers"]]
    assert squad_scores(texts, answers)["exact_match"] == 100.0
    moved, _ = best_answers(np.roll(start, 1, axis=1), end, windows, dataset["context"])
    assert squad_scores(moved, answers)["exact_match"] < 50.0


def test_rows_of_several_lengths_stack() -> None:
    stacked = stack_rows([np.array([1.0, 2.0]), np.array([3.0])], fill=-np.inf)
    np.testing.assert_array_equal(stacked, [[1.0, 2.0], [3.0, -np.inf]])
