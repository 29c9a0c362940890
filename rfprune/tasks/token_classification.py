"""Token classification: words to tokens, tokens back to words, and the F1 of whole entities."""

import re
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from rfprune.errors import UserError
from rfprune.tasks.batching import TOKEN_LABELS
from rfprune.tasks.max_length import checked_length
from rfprune.tasks.registry import Task

IGNORED = -100
"""The label of a token that is not the first of a word: it is not scored."""

_TAG = re.compile(r"([BIES])-(.+)")
_OUTSIDE = ("O", "")

Span = tuple[int, int, int, str]
"""Of an entity: its row, its first and its last word, its type."""


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


def names_entities(label_names: Sequence[str]) -> bool:
    """Whether the labels are those of parts of entities: B-PER, I-PER and O, say."""
    return any(map(_TAG.fullmatch, label_names)) and all(
        name in _OUTSIDE or _TAG.fullmatch(name) for name in label_names
    )


def tagging_scores(
    predictions: NDArray[Any],
    labels: NDArray[Any],
    lengths: Sequence[int],
    label_names: Sequence[str],
) -> dict[str, float]:
    """Scores of a tagger as fractions of 1: accuracy and, of labels that name entities, precision,
    recall and F1 of these.

    An entity is right if its first word, its last word and its type are, as by the CoNLL-2000
    script (Tjong Kim Sang and Buchholz 2000) and seqeval's default.

    Args:
        predictions: label ids (W,) of the words of all rows, one after the other; so are `labels`.
        lengths: words of each row.
    """
    scores = {"accuracy": float((predictions == labels).mean())}
    if not names_entities(label_names):
        return scores
    found, wanted = (spans(ids, lengths, label_names) for ids in (predictions, labels))
    right = len(found & wanted)
    precision, recall = (right / len(own) if own else 0.0 for own in (found, wanted))
    f1 = 2 * right / (len(found) + len(wanted)) if found or wanted else 0.0
    return {"f1": f1, "precision": precision, "recall": recall, **scores}


def spans(ids: NDArray[Any], lengths: Sequence[int], label_names: Sequence[str]) -> set[Span]:
    """The entities that label ids (W,) name.

    One begins at B or S, where the type changes, after an E or S, and after O; it ends before what
    begins, and before O.
    """
    found: set[Span] = set()
    tags = [_parts(label_names[number]) for number in ids]
    first = 0
    for row, length in enumerate(lengths):
        start, before = 0, ("O", "")
        for place, tag in enumerate([*tags[first : first + length], ("O", "")]):
            begins = tag[0] != "O" and (tag[0] in "BS" or before[0] in "OES" or tag[1] != before[1])
            if before[0] != "O" and (begins or tag[0] == "O"):
                found.add((row, start, place - 1, before[1]))
            start, before = (place if begins else start), tag
        first += length
    return found


def _parts(name: str) -> tuple[str, str]:
    match = _TAG.fullmatch(name)
    return (match[1], match[2]) if match else ("O", "")
