"""Token classification: the first token of each word carries the label of the word."""

from collections.abc import Sequence
from typing import Any

from rfprune.errors import UserError
from rfprune.tasks.batching import TOKEN_LABELS
from rfprune.tasks.max_length import checked_length
from rfprune.tasks.registry import Task

IGNORED = -100
"""The label of tokens that are not the first of a word; they are not scored."""


def encode_words(task: Task, tokenizer: Any, chunk: Any, max_length: int | None) -> dict[str, Any]:
    """Columns of tokenised words, and `token_labels` if there are labels.

    Words beyond `max_length` tokens are cut off together with their labels.
    """
    words = [list(row) for row in chunk[task.text_columns[0]]]
    length = checked_length(task, tokenizer, max_length)
    try:
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=length)
    except AssertionError as error:  # raised by tokenizers that mark spaces
        raise UserError(
            f"The tokenizer does not take lists of words ({error}): create it with "
            f"add_prefix_space=True, and save it again."
        ) from error
    columns = dict(encoded)
    if task.label_column in chunk:
        labels = chunk[task.label_column]
        columns[TOKEN_LABELS] = [
            _of_first_tokens(encoded.word_ids(row), labels[row]) for row in range(len(words))
        ]
    return columns


def _of_first_tokens(word_ids: Sequence[int | None], labels: Sequence[int]) -> list[int]:
    found, before = [], None
    for word in word_ids:
        found.append(IGNORED if word is None or word == before else labels[word])
        before = word
    return found
