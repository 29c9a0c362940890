"""Random tokenizers of every kind over a small alphabet, so that all special cases occur."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

LETTERS = "abcé字"
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
WORDS = ["".join(word) for size in (1, 2, 3, 4) for word in itertools.product(LETTERS, repeat=size)]


def _some(draw: random.Random, pieces: list[str], least: int = 3) -> list[str]:
    return draw.sample(pieces, draw.randint(least, min(len(pieces), 40)))


def _ids(*pieces: str) -> dict[str, int]:
    return {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}


def _wrapped(tokenizer: Tokenizer) -> Any:
    """With a template, and a mask token behind the vocabulary, as XLM-RoBERTa has it."""
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=ids
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


def word_piece(seed: int) -> Any:
    draw = random.Random(seed)
    pieces = _some(draw, [*WORDS[:60], *("##" + word for word in WORDS[:60])])
    tokenizer = Tokenizer(models.WordPiece(_ids(*SPECIAL, *pieces), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _wrapped(tokenizer)


def word_level(seed: int) -> Any:
    pieces = _some(random.Random(seed), WORDS[:100])
    tokenizer = Tokenizer(models.WordLevel(_ids(*SPECIAL, *pieces), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _wrapped(tokenizer)


def _merges(
    draw: random.Random, symbols: list[str], *, prefix: str = "", suffix: str = ""
) -> tuple[list[str], list[tuple[str, str]]]:
    """Random merges of symbols and of what earlier merges made, and all pieces."""
    pieces, found = list(symbols), []
    for _ in range(draw.randint(5, 40)):
        left, right = draw.choice(pieces), draw.choice(pieces)
        fits = right.startswith(prefix) and not (suffix and left.endswith(suffix))
        made = left + right[len(prefix) :]
        if fits and len(made) < 8 and (left, right) not in found:
            found.append((left, right))
            pieces.append(made)
    return pieces, found


def byte_level_bpe(seed: int, **options: Any) -> Any:
    draw = random.Random(seed)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    common = [*"abcĠ", *(one for one in alphabet if one in "éÃ©åŃĹĊ")]
    pieces, merges = _merges(draw, common)
    if options:
        pieces += _some(draw, WORDS[:30])  # found whole, without merges
    model = models.BPE(vocab=_ids(*SPECIAL, *alphabet, *pieces), merges=merges, **options)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrapped(tokenizer)


def ignore_merges_bpe(seed: int) -> Any:
    return byte_level_bpe(seed, ignore_merges=True)


def suffix_bpe(seed: int) -> Any:
    draw = random.Random(seed)
    symbols = [*LETTERS[:4], *(one + "</w>" for one in LETTERS[:4])]
    pieces, merges = _merges(draw, symbols, suffix="</w>")
    model = models.BPE(
        vocab=_ids(*SPECIAL, *pieces), merges=merges, unk_token="<unk>", end_of_word_suffix="</w>"
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _wrapped(tokenizer)


def prefix_bpe(seed: int) -> Any:
    draw = random.Random(seed)
    symbols = [*LETTERS[:4], *("##" + one for one in LETTERS[:4])]
    pieces, merges = _merges(draw, symbols, prefix="##")
    model = models.BPE(
        vocab=_ids(*SPECIAL, *pieces),
        merges=merges,
        unk_token="<unk>",
        continuing_subword_prefix="##",
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _wrapped(tokenizer)


def byte_fallback_bpe(seed: int) -> Any:
    """As Llama 2 and Gemma: a piece may be made in several ways, and unknown text is bytes."""
    draw = random.Random(seed)
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces, merges = _merges(draw, [*LETTERS[:4], "▁"])
    made = {left + right for left, right in merges}
    merges += [
        (piece[:at], piece[at:])
        for piece in sorted(made)
        for at in range(1, len(piece))
        if piece[:at] in pieces and piece[at:] in pieces
    ]
    model = models.BPE(
        vocab=_ids(*SPECIAL, *in_bytes, *pieces),
        merges=list(dict.fromkeys(merges)),
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(Regex(" +"), "▁")]
    )
    return _wrapped(tokenizer)


def unigram(seed: int, *, byte_fallback: bool = False) -> Any:
    """Scores over a wide range, so that an unknown character can cost less than a piece."""
    draw = random.Random(seed)
    pieces = ["▁", *_some(draw, [*WORDS[:60], *("▁" + word for word in WORDS[:60])])]
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    scores = [(piece, -draw.choice([1.0, 2.0, 5.0, 20.0, 60.0])) for piece in pieces]
    listed = [*((token, 0.0) for token in (*SPECIAL, *in_bytes)), *scores]
    tokenizer = Tokenizer(models.Unigram(listed, unk_id=3, byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return _wrapped(tokenizer)


def byte_fallback_unigram(seed: int) -> Any:
    return unigram(seed, byte_fallback=True)


KINDS: dict[str, Callable[[int], Any]] = {
    one.__name__: one
    for one in (
        word_piece,
        word_level,
        byte_level_bpe,
        ignore_merges_bpe,
        suffix_bpe,
        prefix_bpe,
        byte_fallback_bpe,
        unigram,
        byte_fallback_unigram,
    )
}
