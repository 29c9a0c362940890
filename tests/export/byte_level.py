"""Tiny tokenizers of the two kinds that llama.cpp knows, for the tests of GGUF files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>")
WORDS = ("the", "cat", "sat", "on", "hat", "that", "at")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def byte_level_tokenizer(*steps: Any, whole_words: bool = False, normalizer: Any = None) -> Any:
    """Byte-level BPE: bytes, a few merges, and a token that is no part of BPE."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs, tokens = _merges([*WORDS, *(f"\u0120{word}" for word in WORDS)])
    ids = {token: number for number, token in enumerate([*SPECIAL, *alphabet, *tokens])}
    tokenizer = Tokenizer(models.BPE(ids, pairs, ignore_merges=whole_words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        list(steps) or [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return _with_special_tokens(tokenizer)


def sentencepiece_tokenizer(*, prefix: bool = True, splits: bool = False) -> Any:
    """SentencePiece's BPE as transformers stores it: with bytes for unknown characters.

    Args:
        splits: split at spaces after they have been replaced, as Gemma's tokenizer.json says.
    """
    characters = sorted(set("".join(WORDS)) | {"\u2581"})
    pairs, tokens = _merges([*WORDS, *(f"\u2581{word}" for word in WORDS)])
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *tokens, *characters]
    ids = {token: number for number, token in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(ids, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    steps = [normalizers.Prepend("\u2581")] * prefix + [normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    if splits:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", ids["<s>"])]
    )
    return _with_special_tokens(tokenizer)


def _merges(words: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """All pairs that make the words letter by letter, and the tokens that they make."""
    tokens = list(dict.fromkeys(word[:end] for word in words for end in range(2, len(word) + 1)))
    tokens.sort(key=len)
    known = {*tokens, *"".join(words)}
    pairs = [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]
    return pairs, tokens


def _with_special_tokens(tokenizer: Any) -> Any:
    tokenizer.add_tokens(["<tool>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
    )
