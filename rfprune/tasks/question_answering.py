"""Question answering: contexts to overlapping windows, and logits back to answers.

A long context is split into overlapping windows, each preceded by the question. The answer is the
best-scoring span over all windows of a question (start logit + end logit, context tokens only, at
most 30 tokens). All windows are searched with array operations, so the full SQuAD validation set
takes seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rfprune.errors import UserError
from rfprune.tasks.max_length import checked_length
from rfprune.tasks.registry import Task

# A question keeps at most a third of the window, so there is always room for context.
QUESTION_SHARE = 3
POSITIONS = ("start_positions", "end_positions")


def tokenize_windows(
    task: Task,
    tokenizer: Any,
    questions: Sequence[str],
    contexts: Sequence[str],
    max_length: int | None = None,
) -> Any:
    """Tokenise each question with every window over its context.

    Windows overlap by the task's stride, or by a third of a window shorter than three strides. A
    question is cut to a third of the window.

    Returns:
        The tokenizer's `BatchEncoding`, with `offset_mapping`, and `overflow_to_sample_mapping`
        from window to question.

    Raises:
        UserError: the tokenizer is slow, or does not allow the length.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"Task {task.name} needs a fast tokenizer for character offsets, and the checkpoint "
            f"has none: save its tokenizer.json with "
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
    """Questions without surrounding white space, cut to at most this many tokens."""
    stripped = [question.strip() for question in questions]
    offsets = tokenizer(stripped, add_special_tokens=False, return_offsets_mapping=True)
    return [
        question if len(spans) <= max_tokens else question[: spans[max_tokens - 1][1]]
        for question, spans in zip(stripped, offsets["offset_mapping"], strict=True)
    ]


def encode_questions(
    task: Task, tokenizer: Any, chunk: Any, max_length: int | None
) -> dict[str, Any]:
    """Columns of windows, and the token positions of the answers if there are answers."""
    questions, contexts = (chunk[name] for name in task.text_columns)
    windows = tokenize_windows(task, tokenizer, questions, contexts, max_length)
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
    """First and last token of the characters start to end; None if the window lacks some of them.

    Args:
        offsets: (S, 2), first character of each token and the one after its last.
        in_context: (S,), True for context tokens.
        start: first character of the span.
        end: the character after its last.
    """
    context = offsets[in_context]
    if len(context) == 0 or start < context[0, 0] or end > context[-1, 1]:
        return None
    touching = in_context & (offsets[:, 0] < end) & (offsets[:, 1] > start)
    found = np.flatnonzero(touching)
    return (int(found[0]), int(found[-1])) if len(found) else None


# As in BERT's original script and Hugging Face's example.
N_BEST = 20
MAX_ANSWER_TOKENS = 30

# Questions tokenised and windows searched at a time, which bounds the memory.
_QUESTIONS_AT_A_TIME = 1024
_WINDOWS_AT_A_TIME = 1024
_MADE_FOR_DECODING = ("offset_mapping", "overflow_to_sample_mapping")

Inputs = dict[str, list[NDArray[np.int32]]]


@dataclass(frozen=True, eq=False)
class Windows:
    """W windows of at most S tokens over the contexts of Q questions.

    Positions count from a window's first token, without padding before it.

    Attributes:
        question: (W,), the question of each window, ascending.
        in_context: (W, S), True for the tokens of the context.
        offsets: (W, S, 2), the first character that a token covers and the one after its last.
        null_position: (W,), the CLS token, which stands for no answer.
    """

    question: NDArray[np.int64]
    in_context: NDArray[np.bool_]
    offsets: NDArray[np.int32]
    null_position: NDArray[np.int64]


def make_windows(
    task: Task,
    tokenizer: Any,
    questions: Sequence[str],
    contexts: Sequence[str],
    max_length: int | None = None,
) -> tuple[Inputs, Windows]:
    """Tokenise Q questions with their contexts.

    Returns:
        Model inputs by name, W unpadded rows each, and the windows.

    Raises:
        UserError: as for `tokenize_windows`.
    """
    inputs: Inputs = {}
    question, offsets, contexts_at = [], [], []
    for first in range(0, len(questions), _QUESTIONS_AT_A_TIME):
        rows = slice(first, first + _QUESTIONS_AT_A_TIME)
        encoded = tokenize_windows(task, tokenizer, questions[rows], contexts[rows], max_length)
        question.append(first + np.array(encoded["overflow_to_sample_mapping"], dtype=np.int64))
        offsets += [np.array(row, dtype=np.int32) for row in encoded["offset_mapping"]]
        for window in range(len(encoded["input_ids"])):
            parts = encoded.sequence_ids(window)
            contexts_at.append(np.array([part == 1 for part in parts]))
        for name, values in encoded.items():
            if name not in _MADE_FOR_DECODING:
                arrays = [np.array(row, dtype=np.int32) for row in values]
                inputs.setdefault(name, []).extend(arrays)
    windows = Windows(
        question=np.concatenate(question),
        in_context=stack_rows(contexts_at, fill=False),
        offsets=stack_rows(offsets, fill=0),
        null_position=_null_positions(inputs["input_ids"], tokenizer.cls_token_id),
    )
    return inputs, windows


def stack_rows(rows: Sequence[NDArray[Any]], *, fill: float) -> NDArray[Any]:
    """Arrays (s, ...) of different lengths s as one (rows, longest, ...), filled at the end."""
    longest = max(len(row) for row in rows)
    stacked = np.full((len(rows), longest, *rows[0].shape[1:]), fill, dtype=rows[0].dtype)
    for target, row in zip(stacked, rows, strict=True):
        target[: len(row)] = row
    return stacked


def best_spans(
    start_logits: NDArray[np.floating[Any]],
    end_logits: NDArray[np.floating[Any]],
    windows: Windows,
    *,
    n_best: int = N_BEST,
    max_answer_tokens: int = MAX_ANSWER_TOKENS,
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """The best span of each window.

    A span starts at one of the `n_best` likeliest start tokens in the context and ends at one of
    the `n_best` likeliest end tokens. It covers at most `max_answer_tokens` tokens and at least one
    character. Ties go to the likelier start, then the likelier end, then the earlier token.

    Args:
        start_logits: (W, S).
        end_logits: (W, S).
        windows: of these logits.
        n_best: start and end tokens to combine.
        max_answer_tokens: length of the longest span.

    Returns:
        Score (-inf if there is no span), first token and last token, each (W,).
    """
    parts = []
    for first in range(0, len(windows.question), _WINDOWS_AT_A_TIME):
        rows = slice(first, first + _WINDOWS_AT_A_TIME)
        start = np.where(windows.in_context[rows], start_logits[rows].astype(np.float64), -np.inf)
        end = np.where(windows.in_context[rows], end_logits[rows].astype(np.float64), -np.inf)
        offsets = windows.offsets[rows]
        parts.append(_best_spans(start, end, offsets, n_best, max_answer_tokens))
    scores, starts, ends = (np.concatenate(column) for column in zip(*parts, strict=True))
    return scores, starts, ends


def best_answers(
    start_logits: NDArray[np.floating[Any]],
    end_logits: NDArray[np.floating[Any]],
    windows: Windows,
    contexts: Sequence[str],
) -> tuple[list[str], NDArray[np.float64]]:
    """The best answers to Q questions and their scores (Q,), from logits (W, S).

    The best span over all windows of a question wins; on ties, that of the earlier window. The
    answer is "" with score -inf if the context has no tokens.
    """
    scores, starts, ends = best_spans(start_logits, end_logits, windows)
    # Sorted by question, then by falling score; lexsort is stable.
    order = np.lexsort((-scores, windows.question))
    _, first = np.unique(windows.question[order], return_index=True)
    best = order[first]
    texts = []
    for context, window in zip(contexts, best, strict=True):
        from_character = windows.offsets[window, starts[window], 0]
        to_character = windows.offsets[window, ends[window], 1]
        texts.append(context[from_character:to_character] if np.isfinite(scores[window]) else "")
    return texts, scores[best]


def null_scores(
    start_logits: NDArray[np.floating[Any]],
    end_logits: NDArray[np.floating[Any]],
    windows: Windows,
) -> NDArray[np.float64]:
    """The score of giving no answer to each of Q questions, (Q,), from logits (W, S).

    The minimum over a question's windows of start logit + end logit at the CLS token, since the
    answer must be missing in every window.
    """
    rows = np.arange(len(windows.question))
    null = start_logits[rows, windows.null_position].astype(np.float64)
    null += end_logits[rows, windows.null_position]
    least = np.full(windows.question[-1] + 1, np.inf)
    np.minimum.at(least, windows.question, null)
    return least


def _null_positions(
    input_ids: Sequence[NDArray[np.int32]], cls_token_id: int | None
) -> NDArray[np.int64]:
    """The position of each window's CLS token, or of its first token without one, (W,)."""
    return np.array([int(np.argmax(row == cls_token_id)) for row in input_ids], dtype=np.int64)


def _best_spans(
    start: NDArray[np.float64],
    end: NDArray[np.float64],
    offsets: NDArray[np.int32],
    n_best: int,
    max_answer_tokens: int,
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """`best_spans` of one chunk of windows; logits (w, S) are -inf outside the context."""
    starts = np.argsort(-start, axis=1, kind="stable")[:, :n_best]
    ends = np.argsort(-end, axis=1, kind="stable")[:, :n_best]
    start_scores = np.take_along_axis(start, starts, axis=1)[:, :, None]
    end_scores = np.take_along_axis(end, ends, axis=1)[:, None, :]
    from_character = np.take_along_axis(offsets[..., 0], starts, axis=1)[:, :, None]
    to_character = np.take_along_axis(offsets[..., 1], ends, axis=1)[:, None, :]
    num_tokens = ends[:, None, :] - starts[:, :, None] + 1
    allowed = (
        (num_tokens >= 1) & (num_tokens <= max_answer_tokens) & (to_character > from_character)
    )
    # (w, n_best, n_best), flattened so that one argmax finds the pair.
    scores = np.where(allowed, start_scores + end_scores, -np.inf).reshape(len(start), -1)
    best = scores.argmax(axis=1)
    rows = np.arange(len(start))
    # Fewer than n_best tokens leave fewer columns.
    best_start, best_end = np.divmod(best, ends.shape[1])
    return scores[rows, best], starts[rows, best_start], ends[rows, best_end]
