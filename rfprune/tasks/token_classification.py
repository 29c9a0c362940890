"""Token classification: words with one label each to tokens, whose first per word is labelled."""

from collections.abc import Sequence
from typing import Any

from rfprune.errors import UserError
from rfprune.tasks.batching import TOKEN_LABELS
from rfprune.tasks.max_length import checked_length
from rfprune.tasks.registry import Task

IGNORED = -100
"""The label of a token that is not the first of a word: it is not scored."""


def encode_words(task: Task, tokenizer: Any, chunk: Any, max_length: int | None) -> dict[str, Any]:
    """Columns of tokenised words; `token_labels` (-100 but at the first token of a word) where
    there are labels. Words beyond `max_length` tokens are cut off, with their labels."""
    words = [list(row) for row in chunk[task.text_columns[0]]]
    length = checked_length(task, tokenizer, max_length)
    try:
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=length)
    except AssertionError as error:  # of tokenizers that mark spaces
        raise UserError(
            f"The tokenizer does not take words ({error}): save it again, made with "
            f"add_prefix_space=True."
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
