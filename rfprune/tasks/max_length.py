"""The maximum number of tokens per row."""

from typing import Any

from rfprune.errors import UserError
from rfprune.tasks.registry import Task

NO_LIMIT = 10**9
_SOURCES = "model_max_length in tokenizer_config.json, or max_seq_length of sentence-transformers"


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
    length = min(task.max_length, limit) if max_length is None else max_length
    texts = min(2, len(task.text_columns)) if texts is None else texts
    shortest = tokenizer.num_special_tokens_to_add(pair=texts == 2) + texts
    if task.kind == "question-answering":
        shortest = max(32, shortest)  # room for part of the question and for overlapping windows
    if limit < shortest:
        raise UserError(
            f"The tokenizer of this checkpoint allows {limit} tokens ({_SOURCES}), but {task.name} "
            f"takes at least {shortest}: correct that file, or choose another checkpoint."
        )
    if length > limit:
        raise UserError(
            f"--max-length {length} exceeds the {limit} tokens that the tokenizer of this "
            f"checkpoint allows ({_SOURCES}): for {task.name} choose {shortest} to {limit}, or "
            f"correct that file if the model takes more."
        )
    if length < shortest:
        raise UserError(
            f"--max-length {length} does not fit: for {task.name} this checkpoint takes "
            f"{shortest} to {limit} tokens; choose a number in this range."
        )
    return length
