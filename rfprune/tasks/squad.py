"""From start and end logits to answers: SQuAD's post-processing, vectorised.

A long context is read in overlapping windows. The answer to a question is the best span of any of
its windows: start logit + end logit, context tokens only, at most 30 tokens. All windows are
searched at once with array operations: the whole validation set takes seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rfprune.tasks.registry import Task
from rfprune.tasks.windows import question_windows

# As in the original BERT's script and Hugging Face's example.
N_BEST = 20
MAX_ANSWER_TOKENS = 30

# Questions tokenised, and windows searched, at a time: bounds the memory, costs no time.
_QUESTIONS_AT_A_TIME = 1024
_WINDOWS_AT_A_TIME = 1024
_MADE_FOR_DECODING = ("offset_mapping", "overflow_to_sample_mapping")

Inputs = dict[str, list[NDArray[np.int32]]]


@dataclass(frozen=True, eq=False)
class Windows:
    """What it takes to read answers off W windows, of at most S tokens, of Q questions.

    `question`: (W,), which question, ascending. `in_context`: (W, S), True at the context's
    tokens. `offsets`: (W, S, 2), the characters of the context that a token covers, from and to.
    `null_position`: (W,), where "there is no answer" is read: the CLS token. Positions count from
    a window's first token; there is no padding before it.
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
    """Tokenise Q questions with their contexts: model inputs, W unpadded rows by name, and windows.

    Windows are those of `rfprune.tasks.windows.question_windows`, which raises the same UserErrors.
    """
    inputs: Inputs = {}
    question, offsets, contexts_at = [], [], []
    for first in range(0, len(questions), _QUESTIONS_AT_A_TIME):
        rows = slice(first, first + _QUESTIONS_AT_A_TIME)
        encoded = question_windows(task, tokenizer, questions[rows], contexts[rows], max_length)
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
    """Arrays (s, ...) of several lengths s as one, (len(rows), longest, ...), filled behind."""
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
    """Each window's best span from logits (W, S): score, first and last token, each (W,).

    A span starts at one of the window's `n_best` likeliest context tokens and ends at another,
    covers at most `max_answer_tokens` tokens and at least one character. Score -inf: none does.
    Ties go to the likelier start, then the likelier end, then the earlier token.
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
    """The best answers to Q questions, and their scores (Q,), from their windows' logits (W, S).

    The best span over a question's windows wins, the earlier window on ties. A question whose
    context holds no token is answered by "" with score -inf.
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
    """How much speaks for no answer at all, for each of Q questions, (Q,), from logits (W, S).

    The least over a question's windows of start logit + end logit at the CLS token: an answer
    must be missing everywhere.
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
    """Where each window's CLS token (failing that, its first token) stands, (W,)."""
    return np.array([int(np.argmax(row == cls_token_id)) for row in input_ids], dtype=np.int64)


def _best_spans(
    start: NDArray[np.float64],
    end: NDArray[np.float64],
    offsets: NDArray[np.int32],
    n_best: int,
    max_answer_tokens: int,
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """`best_spans` of one chunk of windows, logits (w, S) being -inf outside the context."""
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
