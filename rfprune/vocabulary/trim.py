"""trim_vocabulary(): a model and its tokenizer with the tokens that texts need.

TextPruner (Yang et al. 2022, "TextPruner: A Model Pruning Toolkit for Pre-Trained Language Models",
arXiv 2203.15996) and lm-vocab-trimmer (Ushio et al. 2023, "An Efficient Multilingual Language Model
Compression through Vocabulary Trimming", arXiv 2305.15020) do the same by token frequency. Here
everything that encodes the kept tokens is kept as well, so texts of the corpus keep their pieces.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rfprune.errors import UserError, as_path
from rfprune.model.saved_tokenizer import save_tokenizer
from rfprune.model.staging import check_free, recover, staged
from rfprune.model.unwrapped import unwrapped
from rfprune.vocabulary.counting import PieceChanges, TokenCounts, count_tokens, piece_changes
from rfprune.vocabulary.embeddings import ids_to_keep, num_tokens, with_rows
from rfprune.vocabulary.needed_pieces import needed_pieces
from rfprune.vocabulary.tokenizer_file import added_tokens, unknown_token, with_ids

TOKENIZER_FILE = "tokenizer.json"
_SETTINGS_FILE = "tokenizer_config.json"
_WITHOUT_IDS = (TOKENIZER_FILE, _SETTINGS_FILE, "special_tokens_map.json", ".jinja")
"""Ends of the names of files that hold no ids, or whose ids are changed."""


@dataclass(frozen=True)
class TrimmedVocabulary:
    """A model and a tokenizer with fewer tokens.

    Attributes:
        model: a copy of the original with fewer rows of its embeddings and output layers.
        tokenizer: the original's, with only the kept tokens.
        original_tokenizer: the tokenizer before trimming.
        old_ids: the original id of every token.
        num_original: rows of the original's embeddings.
    """

    model: PreTrainedModel
    tokenizer: Any
    original_tokenizer: Any
    old_ids: tuple[int, ...]
    num_original: int

    def new_ids(self, ids: Tensor) -> Tensor:
        """Ids of the original tokenizer as ids of the trimmed one.

        Args:
            ids: integers of any shape; negative ones, such as -100 in labels, stay.

        Raises:
            UserError: a token was not kept.
        """
        table = torch.full((self.num_original,), -1, dtype=ids.dtype)
        table[torch.tensor(self.old_ids)] = torch.arange(len(self.old_ids), dtype=ids.dtype)
        table = table.to(ids.device)
        found = torch.where(ids < 0, ids, table[ids.clamp(min=0)])
        missing = ids[(ids >= 0) & (found < 0)]
        if missing.numel():
            token = self.original_tokenizer.convert_ids_to_tokens(int(missing[0]))
            raise UserError(
                f"token {token!r} was not kept: add texts that use it to those of the vocabulary"
            )
        return found

    def compare(self, texts: Iterable[str]) -> PieceChanges:
        """Count how often the trimmed tokenizer splits texts differently."""
        before, after = _plain_backend(self.original_tokenizer), _plain_backend(self.tokenizer)
        return piece_changes(before, after, list(texts), unknown_token(_file_of(before)))

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write model and tokenizer to a folder: completely or not at all.

        Args:
            folder: new or empty.
            overwrite: replace a folder that holds a tokenizer.

        Raises:
            UserError: the folder holds something, or cannot be written.
        """
        folder = as_path(folder, "folder")
        recover(folder)
        check_free(folder, overwrite=overwrite, marker=TOKENIZER_FILE)
        with staged(folder, overwrite=overwrite) as temporary:
            self.model.save_pretrained(temporary)
            save_tokenizer(self.tokenizer, temporary)


def trim_vocabulary(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    min_count: int = 1,
    keep_ids: Collection[int] = (),
) -> TrimmedVocabulary:
    """Remove the tokens that texts do not need from a model and its tokenizer.

    With `min_count=1` the texts are tokenised as before, so their hidden states are bit-identical.
    Also kept: all added tokens (special ones among them), the unknown token, ids in the
    configurations, the alphabet of bytes, and the single characters of the texts and of ASCII.
    Other texts are encoded with the remaining pieces.

    Args:
        model: a model of transformers, pruned or not. It is left untouched.
        tokenizer: its fast tokenizer.
        texts: in the languages and style that the model will be used for.
        min_count: tokens that occur less often are removed. Above 1, some of the texts themselves
            are tokenised differently.
        keep_ids: further ids to keep.

    Returns:
        The smaller model and tokenizer. Ids are renumbered without gaps in their old order.

    Raises:
        UserError: there are no texts, or the tokenizer is slow or does not belong to the model.

    Example:
        >>> from rfprune import trim_vocabulary
        >>> trimmed = trim_vocabulary(model, tokenizer, ["A fine film.", "A dull plot."])
        >>> trimmed.model.config.vocab_size == len(trimmed.tokenizer)
        True
        >>> trimmed.compare(["A fine plot."]).changed_texts
        0
        >>> trimmed.save("fewer-tokens")
    """
    check_trimmable(model, tokenizer)
    if isinstance(texts, str | bytes):
        raise UserError(f"texts is a single {type(texts).__name__}; give a list of texts")
    backend = _plain_backend(tokenizer)
    counts = count_tokens(backend, _file_of(backend), _checked(texts))
    return trim_to_counts(model, tokenizer, counts, min_count=min_count, keep_ids=keep_ids)


def trim_to_counts(
    model: PreTrainedModel,
    tokenizer: Any,
    counts: TokenCounts,
    *,
    min_count: int = 1,
    keep_ids: Collection[int] = (),
) -> TrimmedVocabulary:
    """`trim_vocabulary` for texts whose tokens have been counted."""
    number: Any = min_count
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise UserError(f"min_count {min_count!r:.60} is not a whole number of at least 1")
    if not (counts.counts >= min_count).any():
        often = "" if min_count == 1 else f" that occurs {min_count} times"
        raise UserError(
            f"the texts of the vocabulary hold no token{often}: give texts of the kind that the "
            "model is for"
        )
    check_trimmable(model, tokenizer)
    model = unwrapped(model)
    file = _file_of(_plain_backend(tokenizer))
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    pieces = {number: piece for piece, number in vocabulary.items()}
    counted = {int(number) for number in (counts.counts >= min_count).nonzero()[0]}
    given = {int(number) for number in keep_ids}
    if outside := {number for number in given if not 0 <= number < num_tokens(model)}:
        raise UserError(
            f"keep_ids has {min(outside)}, but the model has the ids 0 to {num_tokens(model) - 1}"
        )
    wanted = counted | given | ids_to_keep(model)
    used = {pieces[number] for number in wanted if number in pieces} - added_tokens(file).keys()
    needed = needed_pieces(file, used | counts.before_failures)
    kept = {vocabulary[piece] for piece in needed} | set(added_tokens(file).values())
    rows = [*sorted(kept), *sorted(wanted - kept - pieces.keys())]
    new_ids = {old: new for new, old in enumerate(rows)}
    return TrimmedVocabulary(
        with_rows(model, rows),
        _rebuilt(tokenizer, with_ids(file, new_ids), new_ids),
        tokenizer,
        tuple(rows),
        num_tokens(model),
    )


def check_trimmable(model: PreTrainedModel, tokenizer: Any) -> None:
    """Check that a tokenizer can be trimmed, and is that of a model.

    Raises:
        UserError: it is slow, or has ids beyond the model's embeddings.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"the vocabulary of a {type(tokenizer).__name__} cannot be trimmed: load a fast "
            "tokenizer, which has a tokenizer.json"
        )
    largest, rows = max(tokenizer.get_vocab().values()), num_tokens(unwrapped(model))
    if largest >= rows:
        raise UserError(
            f"the tokenizer makes ids up to {largest} and the model has {rows} embeddings: give "
            "the tokenizer that the model was trained with"
        )


def count_tokens_of(tokenizer: Any, texts: Iterable[str]) -> TokenCounts:
    """`count_tokens` for a tokenizer of transformers."""
    backend = _plain_backend(tokenizer)
    return count_tokens(backend, _file_of(backend), texts)


def _checked(texts: Iterable[Any]) -> Iterable[str]:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"text {number} is a {type(text).__name__}; give texts as str")
        yield text


def _plain_backend(tokenizer: Any) -> Any:
    """A copy of the `tokenizers.Tokenizer` inside, which neither truncates nor pads."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def _file_of(backend: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(backend.to_str())
    return found


def _rebuilt(tokenizer: Any, file: dict[str, Any], new_ids: dict[int, int]) -> Any:
    """The tokenizer as its own class reads it from the changed tokenizer.json."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        for path in folder.iterdir():  # vocab.txt, tokenizer.model, ...: they hold all tokens
            if path.is_file() and not path.name.endswith(_WITHOUT_IDS):
                path.unlink()
        (folder / TOKENIZER_FILE).write_text(json.dumps(file), encoding="utf-8")
        settings = json.loads((folder / _SETTINGS_FILE).read_text(encoding="utf-8"))
        if "added_tokens_decoder" in settings:
            settings["added_tokens_decoder"] = {
                str(new_ids[int(old)]): token
                for old, token in settings["added_tokens_decoder"].items()
            }
        (folder / _SETTINGS_FILE).write_text(json.dumps(settings), encoding="utf-8")
        rebuilt = type(tokenizer).from_pretrained(folder)
    rebuilt.name_or_path = tokenizer.name_or_path
    rebuilt.model_max_length = tokenizer.model_max_length
    expected = {
        piece: new_ids[old] for piece, old in tokenizer.get_vocab().items() if old in new_ids
    }
    if rebuilt.get_vocab() != expected:
        raise UserError(
            f"a {type(tokenizer).__name__} numbers its tokens in its own way, and cannot be "
            "trimmed: save it as a PreTrainedTokenizerFast, and load that"
        )
    return rebuilt
