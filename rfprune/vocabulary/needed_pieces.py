"""Which pieces of a vocabulary texts need, besides those that they are encoded to.

Texts are encoded to the same pieces without the rest of the vocabulary, because

- WordPiece takes the longest piece that fits. It is still there, and no longer one has come. A word
  without an encoding also needs the pieces that were found before the search failed: without them
  the search would take shorter ones, and might succeed.
- BPE applies the merge of lowest rank again and again. All merges inside a piece are kept, in their
  order. At every step the same merge is the lowest, for all others are a subset of what they were.
- Unigram takes the sum of scores that is largest. All parts of it are still there, and what
  competes with it is a subset of what it was, except that a character without a piece of its own
  counts as unknown, at the lowest score of the vocabulary minus 10. The piece with that score is
  kept, so an unknown character costs more than the piece it replaces.
- WordLevel looks up whole words.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Collection, Iterable, Mapping

from rfprune.vocabulary.tokenizer_file import (
    TokenizerFile,
    added_tokens,
    is_byte_level,
    merges,
    model_vocabulary,
    unknown_token,
)

Pair = tuple[str, str]


def needed_pieces(file: TokenizerFile, used: Collection[str]) -> set[str]:
    """The pieces to keep so that every text which is encoded to `used` pieces still is.

    The other pieces that are kept make further texts encodable: all added tokens, the unknown
    token, the alphabet of bytes, and every single character that occurs in the used pieces or is
    printable ASCII.

    Args:
        used: pieces of the vocabulary.
    """
    vocabulary = model_vocabulary(file)
    kept = set(used) | (added_tokens(file).keys() & vocabulary.keys())
    kept |= {piece for piece in [unknown_token(file)] if piece is not None}
    kept |= fixed_pieces(file)
    kept |= characters(file, kept)
    if file["model"]["type"] == "BPE":
        kept |= parts_of_merges(file, kept)
    return kept & vocabulary.keys()


def fixed_pieces(file: TokenizerFile) -> set[str]:
    """Pieces that are kept for every text: bytes, and the lowest score of a Unigram."""
    model, vocabulary = file["model"], model_vocabulary(file)
    kept: set[str] = set()
    if is_byte_level(file):
        kept |= set(byte_characters()) & vocabulary.keys()
    if model.get("byte_fallback"):
        kept |= {f"<0x{byte:02X}>" for byte in range(256)} & vocabulary.keys()
    if model["type"] == "Unigram":
        kept.add(min(model["vocab"], key=lambda entry: entry[1])[0])
    return kept


def byte_characters() -> list[str]:
    """The characters by which byte-level tokenizers show the 256 bytes (Radford et al. 2019)."""
    from tokenizers.pre_tokenizers import ByteLevel

    return list(ByteLevel.alphabet())


def characters(file: TokenizerFile, pieces: Iterable[str]) -> set[str]:
    """The pieces of one character that is in `pieces` or in printable ASCII, with the prefix of
    continuing pieces and the suffix of word ends as well as without."""
    prefix, suffix = _affixes(file)
    alphabet = set(string.printable).union(*pieces)
    vocabulary = model_vocabulary(file)
    forms = {
        start + one + end for one in alphabet for start in ("", prefix) for end in ("", suffix)
    }
    return forms & vocabulary.keys()


def parts_of_merges(file: TokenizerFile, pieces: Iterable[str]) -> set[str]:
    """All pieces that a BPE makes on the way to `pieces`.

    A piece that its merges do not lead to (a special token, or one that is only looked up whole, by
    `ignore_merges`) needs no parts. If merges that could make it exist, all their parts are kept.
    """
    prefix, suffix = _affixes(file)
    ranked = merges(file)
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(ranked)))}
    made_by: dict[str, list[Pair]] = {}
    for pair in ranked:
        made_by.setdefault(merged(pair, prefix), []).append(pair)
    vocabulary = model_vocabulary(file)
    kept: set[str] = set()
    left = list(pieces)
    while left:
        piece = left.pop()
        if piece in kept:
            continue
        kept.add(piece)
        symbols, steps = apply_merges(piece, ranks, prefix, suffix)
        pairs = steps if symbols == [piece] else made_by.get(piece, [])
        left += [part for pair in pairs for part in pair]
    return kept & vocabulary.keys()


def apply_merges(
    piece: str, ranks: Mapping[Pair, int], prefix: str = "", suffix: str = ""
) -> tuple[list[str], list[Pair]]:
    """Encode a piece by itself with a BPE.

    Args:
        piece: with the prefix of continuing pieces and the suffix of word ends, if it has them.
        ranks: of the merges; the lowest is applied first.

    Returns:
        The symbols it is encoded to, and the merges in the order in which they were applied.
    """
    symbols = _first_symbols(piece, prefix, suffix)
    steps: list[Pair] = []
    while len(symbols) > 1:
        pairs = list(itertools.pairwise(symbols))
        best = min(range(len(pairs)), key=lambda at: ranks.get(pairs[at], len(ranks)))
        if pairs[best] not in ranks:
            break
        steps.append(pairs[best])
        symbols[best : best + 2] = [merged(pairs[best], prefix)]
    return symbols, steps


def merged(pair: Pair, prefix: str = "") -> str:
    """The piece that a merge makes; the second part loses its prefix."""
    return pair[0] + pair[1][len(prefix) :]


def _first_symbols(piece: str, prefix: str, suffix: str) -> list[str]:
    """The characters of a piece, marked as a BPE marks those inside and at the end of a word."""
    continues = bool(prefix) and piece.startswith(prefix)
    ends = bool(suffix) and piece.endswith(suffix)
    core = piece[len(prefix) if continues else 0 : len(piece) - len(suffix) if ends else None]
    symbols = [(prefix if at or continues else "") + one for at, one in enumerate(core)]
    if ends and symbols:
        symbols[-1] += suffix
    return symbols


def pieces_before_failure(file: TokenizerFile, words: Iterable[str]) -> set[str]:
    """The pieces that WordPiece finds in words for which it has no encoding, before it fails."""
    vocabulary, prefix = model_vocabulary(file), _affixes(file)[0]
    longest = file["model"].get("max_input_chars_per_word") or 100
    kept: set[str] = set()
    for word in words:
        if len(word) > longest:
            continue  # unknown whatever the vocabulary
        found: list[str] = []
        start = 0
        while start < len(word):
            ends = range(len(word), start, -1)
            candidates = ((prefix if start else "") + word[start:end] for end in ends)
            piece = next((one for one in candidates if one in vocabulary), None)
            if piece is None:
                kept.update(found)
                break
            found.append(piece)
            start += len(piece) - (len(prefix) if start else 0)
    return kept


def _affixes(file: TokenizerFile) -> tuple[str, str]:
    """The prefix of continuing pieces and the suffix of the last piece of a word; often empty."""
    model = file["model"]
    return model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
