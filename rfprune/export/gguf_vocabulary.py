"""A tokenizer as llama.cpp reads it: tokens, their types, and how text is cut into them.

llama.cpp knows two kinds. "gpt2" is byte-level BPE: a named pre-tokenizer cuts the text into words,
and merges are applied within each. "llama" is SentencePiece's BPE: pieces are merged in the order
of their scores, and unknown characters become bytes.

llama.cpp has its pre-tokenizers built in and knows them by name, so a tokenizer is recognised by
the rules in its tokenizer.json. One with other rules is refused: it would cut texts differently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rfprune.errors import UserError

Rules = tuple[tuple[str, Any], ...]

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PRE_TOKENIZERS: Mapping[str, tuple[Rules, bool]] = {
    "gpt-2": ((("ByteLevel", True),), False),
    "smollm": ((("Digits", True), ("ByteLevel", True)), False),
    "llama-bpe": (
        (("Split", rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}"), ("ByteLevel", False)),
        True,
    ),
    "qwen2": (
        (("Split", rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_SIGNS}"), ("ByteLevel", False)),
        False,
    ),
    "tekken": ((("Split", _TEKKEN), ("ByteLevel", False)), True),
}
"""llama.cpp's name of a pre-tokenizer -> its rules, and whether words of the vocabulary are taken
whole before any merge. "gpt-2" is that of GPT-2, "smollm" of SmolLM2, "llama-bpe" of Llama 3 and
SmolLM3, "qwen2" of Qwen2 and Qwen3, "tekken" of Mistral NeMo."""

_SPACE = "\u2581"  # SentencePiece's sign for a space


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in llama.cpp's terms.

    Attributes:
        model: "gpt2" or "llama".
        pre: name of the pre-tokenizer; "default" for "llama", which has none.
        tokens: one per row of the embeddings, in the order of ids.
        types: by token; numbers of `gguf.TokenType`.
        scores: by token, for "llama": the highest is merged first; else empty.
        merges: pairs of tokens, for "gpt2": the first is merged first; else empty.
        space_prefix: whether a space is put before a text, for "llama".
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    space_prefix: bool = False


def read_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer of transformers.

    Args:
        size: rows of the embeddings; ids without a token become unused tokens.

    Raises:
        UserError: llama.cpp cannot cut texts as this tokenizer does.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal(f"a {type(tokenizer).__name__} has no tokenizer.json")
    rules = json.loads(backend.to_str())
    model = rules["model"]
    if model["type"] != "BPE":
        raise _refusal(f"its model is {model['type']}, not BPE")
    ids = _tokens_with_embeddings(tokenizer, size)
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    tokens, types = _tokens_and_types(tokenizer, ids, size, model)
    if model.get("byte_fallback"):
        prefix = _space_prefix(rules)
        scores = _scores(pairs, tokens)
        return Vocabulary("llama", "default", tokens, types, scores, space_prefix=prefix)
    merges = tuple(" ".join(part.replace(" ", "\u0120") for part in pair) for pair in pairs)
    return Vocabulary("gpt2", _pre_tokenizer(rules), tokens, types, merges=merges)


def add_vocabulary(writer: Any, tokenizer: Any, size: int) -> None:
    """Add a tokenizer to a file: its vocabulary, special tokens and chat template.

    Args:
        writer: a `gguf.GGUFWriter`.
        size: rows of the embeddings.

    Raises:
        UserError: see `read_vocabulary`.
    """
    vocabulary = read_vocabulary(tokenizer, size)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    else:
        writer.add_token_merges(vocabulary.merges)
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None and number < size:
            getattr(writer, f"add_{name}_token_id")(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _refusal(reason: str) -> UserError:
    return UserError(
        f"llama.cpp cannot cut texts as this model's tokenizer does ({reason}): leave gguf out of "
        "--export"
    )


def _tokens_with_embeddings(tokenizer: Any, size: int) -> dict[str, int]:
    """The vocabulary without special tokens beyond the embeddings.

    Such is <image_soft_token> in the text models of Gemma 3, the last token of their tokenizer.
    """
    ids: dict[str, int] = tokenizer.get_vocab()
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    if any(number >= size and number not in special for number in ids.values()):
        raise _refusal(f"it has {max(ids.values()) + 1} tokens, but the model has {size}")
    return {token: number for token, number in ids.items() if number < size}


def _tokens_and_types(
    tokenizer: Any, ids: Mapping[str, int], size: int, model: Mapping[str, Any]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    from gguf import TokenType

    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for token, number in ids.items():
        is_byte = model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
        tokens[number] = token
        types[number] = int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for number, added in tokenizer.added_tokens_decoder.items():
        if number >= size:
            continue
        special = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
        types[number] = int(special)
        if not added.special:
            tokens[number] = tokens[number].replace(_SPACE, " ")
    unknown = ids.get(model.get("unk_token") or "")
    if unknown is not None:
        types[unknown] = int(TokenType.UNKNOWN)
    return tuple(tokens), tuple(types)


def _scores(pairs: Sequence[Sequence[str]], tokens: Sequence[str]) -> tuple[float, ...]:
    """SentencePiece's scores: minus the rank of the merge that makes a piece."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), rank)
    return tuple(-float(ranks.get(token, 0)) for token in tokens)


def _pre_tokenizer(rules: Mapping[str, Any]) -> str:
    """llama.cpp's name for the rules of a byte-level tokenizer."""
    normalizers = {each["type"] for each in _steps(rules["normalizer"], "normalizers")}
    if not normalizers <= {"NFC"}:  # Qwen2's, which llama.cpp leaves out
        raise _refusal(f"it changes texts by {', '.join(sorted(normalizers))}")
    steps = _steps(rules["pre_tokenizer"], "pretokenizers")
    found = tuple(map(_rule, steps))
    whole_words = bool(rules["model"].get("ignore_merges"))
    for name, known in PRE_TOKENIZERS.items():
        if (found, whole_words) == known:
            return name
    names = ", ".join(PRE_TOKENIZERS)
    raise _refusal(f"its pre-tokenizer is none of {names}")


def _steps(entry: Any, key: str) -> list[Any]:
    """The steps of a normalizer or pre-tokenizer, which may be one, several or none."""
    if entry is None:
        return []
    return list(entry[key]) if entry["type"] == "Sequence" else [entry]


def _rule(step: Mapping[str, Any]) -> tuple[str, Any]:
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return kind, step["use_regex"]
    if kind == "Digits":
        return kind, step["individual_digits"]
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return kind, step["pattern"].get("Regex")
    return kind, None


def _space_prefix(rules: Mapping[str, Any]) -> bool:
    """Whether a tokenizer made from SentencePiece puts a space before a text."""
    normalizers = _steps(rules["normalizer"], "normalizers")
    steps = _steps(rules["pre_tokenizer"], "pretokenizers")
    if any(each.get("pattern") == {"String": " "} for each in normalizers):
        # Gemma's pre-tokenizer splits at spaces, but its normalizer has replaced all of them.
        steps = [each for each in steps if each.get("pattern") != {"String": " "}]
    kinds = [each["type"] for each in normalizers]
    if not steps and kinds in (["Prepend", "Replace"], ["Replace"]):
        return "Prepend" in kinds
    if not kinds and [each["type"] for each in steps] == ["Metaspace"] and not steps[0]["split"]:
        return bool(steps[0]["prepend_scheme"] != "never")
    raise _refusal(
        f"the rules {', '.join(kinds + [each['type'] for each in steps])} are not SentencePiece's"
    )
