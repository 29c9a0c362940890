"""Question answering: windows over a context, each behind the question, and where answers are."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rfprune.errors import UserError
from rfprune.tasks.lengths import checked_length
from rfprune.tasks.registry import Task

# A question keeps at most this part of the window, so that there is always room for context.
QUESTION_SHARE = 3
POSITIONS = ("start_positions", "end_positions")


def question_windows(
    task: Task,
    tokenizer: Any,
    questions: Sequence[str],
    contexts: Sequence[str],
    max_length: int | None = None,
) -> Any:
    """The tokenizer's `BatchEncoding` of windows over each context, each behind its question.

    Has `offset_mapping`, and `overflow_to_sample_mapping` from window to question. Windows
    overlap by the task's stride, or by a third of a window shorter than three strides. A question
    that would leave a window too little context is cut (to a third of the window).
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"Task {task.name} needs a fast tokenizer, for character offsets, and the "
            f"checkpoint has none: save its tokenizer.json with "
            f"AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(...)."
        )
    length = checked_length(task, tokenizer, max_length)
    return tokenizer(
        _cut_questions(tokenizer, questions, length // QUESTION_SHARE),
        list(contexts),
        truncation="only_second",
        max_length=length,
        stride=min(task.stride, length // QUESTION_SHARE),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )


def _cut_questions(tokenizer: Any, questions: Sequence[str], max_tokens: int) -> list[str]:
    """Questions without white space before them (some have it), of at most so many tokens."""
    stripped = [question.strip() for question in questions]
    offsets = tokenizer(stripped, add_special_tokens=False, return_offsets_mapping=True)
    return [
        question if len(spans) <= max_tokens else question[: spans[max_tokens - 1][1]]
        for question, spans in zip(stripped, offsets["offset_mapping"], strict=True)
    ]


def question_rows(task: Task, tokenizer: Any, chunk: Any, max_length: int | None) -> dict[str, Any]:
    """Columns of windows, with the answer's token positions where there are answers."""
    questions, contexts = (chunk[name] for name in task.text_columns)
    windows = question_windows(task, tokenizer, questions, contexts, max_length)
    skipped = ("offset_mapping", "overflow_to_sample_mapping")
    columns = {name: values for name, values in windows.items() if name not in skipped}
    if task.label_column in chunk:
        columns |= _answer_positions(windows, tokenizer.cls_token_id, chunk[task.label_column])
    return columns


def _answer_positions(
    windows: Any, cls_token_id: int | None, answers: Sequence[Any]
) -> dict[str, list[int]]:
    """First and last token of the first answer in each window, or the CLS token's index twice."""
    positions: dict[str, list[int]] = {name: [] for name in POSITIONS}
    for window, example in enumerate(windows["overflow_to_sample_mapping"]):
        token_ids = windows["input_ids"][window]
        outside = token_ids.index(cls_token_id) if cls_token_id in token_ids else 0
        answer = answers[example]
        first, last = outside, outside
        if answer["text"]:
            in_context = np.array([part == 1 for part in windows.sequence_ids(window)])
            start = answer["answer_start"][0]
            span = _tokens_of_span(
                np.array(windows["offset_mapping"][window]),
                in_context,
                start,
                start + len(answer["text"][0]),
            )
            first, last = span or (outside, outside)
        positions["start_positions"].append(first)
        positions["end_positions"].append(last)
    return positions


def _tokens_of_span(
    offsets: np.ndarray[Any, Any], in_context: np.ndarray[Any, Any], start: int, end: int
) -> tuple[int, int] | None:
    """First and last token touching characters start to end; None unless the window has them all.

    `offsets` is (S, 2), characters from and to; `in_context` is (S,), true for context tokens.
    """
    context = offsets[in_context]
    if len(context) == 0 or start < context[0, 0] or end > context[-1, 1]:
        return None
    touching = in_context & (offsets[:, 0] < end) & (offsets[:, 1] > start)
    found = np.flatnonzero(touching)
    return (int(found[0]), int(found[-1])) if len(found) else None
