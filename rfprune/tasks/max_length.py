"""The maximum number of tokens per row."""

from typing import Any

from rfprune.errors import UserError
from rfprune.tasks.registry import Task

NO_LIMIT = 10**9


def tokenizer_limit(tokenizer: Any) -> int:
    """The tokenizer's maximum length; tokenizers without one say 1e30, which becomes 1e9."""
    return int(min(tokenizer.model_max_length, NO_LIMIT))


def checked_length(
    task: Task, tokenizer: Any, max_length: int | None, *, texts: int | None = None
) -> int:
    """The maximum number of tokens per row, checked against the tokenizer.

    Args:
        task: its length is the default.
        tokenizer: bounds the length.
        max_length: None: the task's own, or the tokenizer's if that is less.
        texts: texts per row; None: one per text column.

    Raises:
        UserError: the length does not fit the tokenizer.
    """
    limit = tokenizer_limit(tokenizer)
    if max_length is None:
        max_length = min(task.max_length, limit)
    texts = min(2, len(task.text_columns)) if texts is None else texts
    shortest = tokenizer.num_special_tokens_to_add(pair=texts == 2) + texts
    if task.kind == "question-answering":
        shortest = max(32, shortest)  # room for part of the question and for overlapping windows
    if not shortest <= max_length <= limit:
        raise UserError(
            f"--max-length {max_length} does not fit: for {task.name} this checkpoint takes "
            f"{shortest} to {limit} tokens; choose a number in this range."
        )
    return max_length
