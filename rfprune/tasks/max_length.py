"""How many tokens a row of a task may have, by the tokenizer."""

from typing import Any

from rfprune.errors import UserError
from rfprune.tasks.registry import Task

NO_LIMIT = 10**9


def tokenizer_limit(tokenizer: Any) -> int:
    """The most tokens that it gives; tokenizers that know no limit state one of 1e30."""
    return int(min(tokenizer.model_max_length, NO_LIMIT))


def checked_length(
    task: Task, tokenizer: Any, max_length: int | None, *, texts: int | None = None
) -> int:
    """The number of tokens a row may have, the task's own if None.

    `texts`: that a row is made of, one for each of the task's columns if None. UserError where the
    length does not fit the tokenizer.
    """
    limit = tokenizer_limit(tokenizer)
    if max_length is None:
        max_length = min(task.max_length, limit)
    texts = min(2, len(task.text_columns)) if texts is None else texts
    shortest = tokenizer.num_special_tokens_to_add(pair=texts == 2) + texts
    if task.kind == "question-answering":
        shortest = max(32, shortest)  # room for a piece of the question and for moving windows
    if not shortest <= max_length <= limit:
        raise UserError(
            f"A maximal length of {max_length} tokens does not fit: for {task.name} this "
            f"checkpoint takes {shortest} to {limit}."
        )
    return max_length
