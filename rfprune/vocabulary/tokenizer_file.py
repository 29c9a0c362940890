"""tokenizer.json with fewer tokens: every place of the file that holds a token or an id.

All functions take the parsed file and change nothing in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

TokenizerFile = Mapping[str, Any]
"""The parsed tokenizer.json."""


def model_vocabulary(file: TokenizerFile) -> dict[str, int]:
    """The ids of the tokenizer's model, without added tokens that are not in its vocabulary."""
    vocabulary = file["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pairs of piece and score
        return {piece: number for number, (piece, _) in enumerate(vocabulary)}
    return dict(vocabulary)


def added_tokens(file: TokenizerFile) -> dict[str, int]:
    """The ids of added tokens: special tokens, and tokens that are found before the model runs."""
    return {token["content"]: token["id"] for token in file.get("added_tokens") or ()}


def merges(file: TokenizerFile) -> list[tuple[str, str]]:
    """The merges of a BPE by rank; none for other models."""
    pairs = (
        merge.split(" ", 1) if isinstance(merge, str) else merge
        for merge in file["model"].get("merges") or ()
    )
    return [(left, right) for left, right in pairs]


def unknown_token(file: TokenizerFile) -> str | None:
    """The token of text that the vocabulary cannot express; None without one."""
    model = file["model"]
    if model.get("unk_id") is not None:
        return str(model["vocab"][model["unk_id"]][0])
    token = model.get("unk_token")
    return None if token is None else str(token)


def is_byte_level(file: TokenizerFile) -> bool:
    """Whether texts become bytes, each shown as one printable character."""
    steps = [*_steps(file.get("pre_tokenizer")), *_steps(file.get("normalizer"))]
    return any(step.get("type") == "ByteLevel" for step in steps)


def with_ids(file: TokenizerFile, new_ids: Mapping[int, int]) -> dict[str, Any]:
    """The file with the tokens of `new_ids` alone.

    Args:
        new_ids: new ids by old ids, in the same order. All added tokens and the unknown token are
            among them.
    """
    model = dict(file["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in new_ids]
    else:
        kept = {piece: new_ids[old] for piece, old in model["vocab"].items() if old in new_ids}
        model["vocab"] = dict(sorted(kept.items(), key=lambda item: item[1]))
    if model.get("unk_id") is not None:
        model["unk_id"] = new_ids[model["unk_id"]]
    if "merges" in model:
        pieces = {piece for piece, old in model_vocabulary(file).items() if old in new_ids}
        dropped = len(model.get("continuing_subword_prefix") or "")
        model["merges"] = [
            [left, right]
            for left, right in merges(file)
            if left in pieces and right in pieces and left + right[dropped:] in pieces
        ]
    changed = {**file, "model": model}
    changed["added_tokens"] = [
        {**token, "id": new_ids[token["id"]]} for token in file.get("added_tokens") or ()
    ]
    if file.get("padding"):
        padding = file["padding"]
        changed["padding"] = {**padding, "pad_id": new_ids.get(padding["pad_id"], 0)}
    if file.get("post_processor"):
        changed["post_processor"] = _with_ids_in_template(file["post_processor"], new_ids)
    return changed


def _with_ids_in_template(step: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """A post-processor, or several in a sequence, with the new ids of the tokens it adds."""
    changed = dict(step)
    if "processors" in step:
        changed["processors"] = [_with_ids_in_template(one, new_ids) for one in step["processors"]]
    if isinstance(step.get("special_tokens"), Mapping):  # TemplateProcessing
        changed["special_tokens"] = {
            name: {**token, "ids": [new_ids[old] for old in token["ids"]]}
            for name, token in step["special_tokens"].items()
        }
    for name in ("cls", "sep"):  # BertProcessing and RobertaProcessing
        if isinstance(step.get(name), list | tuple):
            token, old = step[name]
            changed[name] = [token, new_ids[old]]
    return changed


def _steps(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer, and those in its sequence."""
    if step is None:
        return
    yield step
    for name in ("pretokenizers", "normalizers"):
        for inner in step.get(name) or ():
            yield from _steps(inner)
