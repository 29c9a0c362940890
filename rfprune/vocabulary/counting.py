"""How often texts use each token, and how two tokenizers differ on texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rfprune.vocabulary.needed_pieces import pieces_before_failure
from rfprune.vocabulary.tokenizer_file import TokenizerFile, unknown_token

_TEXTS_AT_A_TIME = 1000


@dataclass(frozen=True)
class TokenCounts:
    """What texts use.

    Attributes:
        counts: (V,) occurrences by id, special tokens around the texts left out.
        before_failures: pieces that WordPiece finds in words for which it has no encoding.
        num_texts: how many texts there were.
    """

    counts: NDArray[np.int64]
    before_failures: set[str] = field(default_factory=set)
    num_texts: int = 0

    def most(self, other: TokenCounts) -> TokenCounts:
        """The larger count of each token, for two readings of the same texts."""
        return TokenCounts(
            np.maximum(self.counts, other.counts),
            self.before_failures | other.before_failures,
            max(self.num_texts, other.num_texts),
        )


def count_tokens(backend: Any, file: TokenizerFile, texts: Iterable[str]) -> TokenCounts:
    """Encode texts and count their tokens.

    Args:
        backend: a `tokenizers.Tokenizer` without truncation and padding.
        file: its tokenizer.json.
    """
    size = max(backend.get_vocab().values()) + 1
    counts, failures, number = np.zeros(size, np.int64), set[str](), 0
    unknown = unknown_token(file)
    unknown_id = None if unknown is None else backend.token_to_id(unknown)
    for some, encodings in encoded(backend, texts):
        number += len(some)
        for text, ids in zip(some, encodings, strict=True):
            counts += np.bincount(np.asarray(ids, np.int64), minlength=size)
            if file["model"]["type"] == "WordPiece" and unknown_id in ids:
                failures |= pieces_before_failure(file, _words(backend, text))
    return TokenCounts(counts, failures, number)


def encoded(backend: Any, texts: Iterable[str]) -> Iterator[tuple[list[str], list[list[int]]]]:
    """Some texts at a time, with the ids of each; without special tokens around them."""
    remaining = iter(texts)
    while some := list(islice(remaining, _TEXTS_AT_A_TIME)):
        found = backend.encode_batch_fast(some, add_special_tokens=False)
        yield some, [encoding.ids for encoding in found]


def _words(backend: Any, text: str) -> set[str]:
    normalised = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is None:
        return {normalised}
    return {word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normalised)}


@dataclass(frozen=True)
class PieceChanges:
    """How a trimmed tokenizer encodes texts, compared with the original.

    Attributes:
        texts: number of texts.
        changed_texts: texts that are split into other pieces.
        tokens_before: tokens of all texts by the original tokenizer.
        tokens_after: by the trimmed one.
        unknown_before: tokens that stand for text without an encoding, by the original tokenizer.
        unknown_after: by the trimmed one.
    """

    texts: int
    changed_texts: int
    tokens_before: int
    tokens_after: int
    unknown_before: int
    unknown_after: int


def piece_changes(
    before: Any, after: Any, texts: Sequence[str], unknown: str | None
) -> PieceChanges:
    """Encode texts with two `tokenizers.Tokenizer`s and compare the pieces.

    Args:
        unknown: the unknown token; None without one.
    """
    both = (before, after)
    changed, tokens, unknowns = 0, [0, 0], [0, 0]
    for (_, old), (_, new) in zip(*(encoded(one, texts) for one in both), strict=True):
        for ids in zip(old, new, strict=True):
            pieces = [list(map(one.id_to_token, each)) for one, each in zip(both, ids, strict=True)]
            changed += pieces[0] != pieces[1]
            for side, each in enumerate(pieces):
                tokens[side] += len(each)
                unknowns[side] += 0 if unknown is None else each.count(unknown)
    return PieceChanges(len(texts), changed, *tokens, *unknowns)
