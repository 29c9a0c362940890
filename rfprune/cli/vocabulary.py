"""--vocabulary: the trimmed model and tokenizer of a run, and how they read held-out texts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rfprune.checkpoints.loading import LoadedCheckpoint
from rfprune.errors import RfpruneWarning
from rfprune.settings import TargetSettings
from rfprune.tasks.registry import Task
from rfprune.tasks.splits import load_split
from rfprune.vocabulary.counting import PieceChanges
from rfprune.vocabulary.texts import count_tokens_of_files
from rfprune.vocabulary.trim import TrimmedVocabulary, check_trimmable, trim_to_counts

Batches = Sequence[Mapping[str, Tensor]]
_IDS = ("input_ids", "decoder_input_ids")
_MORE_TOKENS = 0.01  # of the validation texts, above which there is a warning


def trim_checkpoint(
    target: TargetSettings, loaded: LoadedCheckpoint, batches: Batches
) -> TrimmedVocabulary:
    """Keep the tokens of the files of --vocabulary and of the calibration batches.

    Raises:
        UserError: a file or the tokenizer cannot be used.
    """
    check_trimmable(loaded.model, loaded.tokenizer)
    counts = count_tokens_of_files(loaded.tokenizer, target.vocabulary)
    used = {
        number
        for batch in batches
        for name in _IDS
        if name in batch
        for number in batch[name].unique().tolist()
    }
    return trim_to_counts(
        loaded.model,
        loaded.tokenizer,
        counts,
        min_count=target.vocabulary_min_count,
        keep_ids=used,
    )


def with_new_ids(trimmed: TrimmedVocabulary, batches: Batches) -> list[dict[str, Tensor]]:
    """Batches of the original tokenizer as the trimmed one would make them."""
    return [
        {name: trimmed.new_ids(value) if name in _IDS else value for name, value in batch.items()}
        for batch in batches
    ]


def warn_of_more_tokens(changes: PieceChanges) -> None:
    """Warn if validation texts need tokens that the texts of the vocabulary did not."""
    more = changes.tokens_after / max(1, changes.tokens_before) - 1
    if more > _MORE_TOKENS:
        warnings.warn(
            f"The trimmed tokenizer makes {more:.1%} more tokens of the validation texts, so their "
            "score may be lower: give more texts of their kind with --vocabulary",
            RfpruneWarning,
            stacklevel=2,
        )


def held_out_texts(task: Task, data_dir: Path | None, limit: int | None) -> list[str]:
    """The texts of the validation splits."""
    texts: list[str] = []
    for split in task.validation_splits:
        dataset = load_split(task, split, data_dir, labels_required=False)
        for name in task.text_columns:
            texts += _texts(dataset[name][:limit])
    return texts


def _texts(values: Sequence[Any]) -> Iterator[str]:
    for value in values:
        yield value if isinstance(value, str) else " ".join(map(str, value))
