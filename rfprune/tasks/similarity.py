"""Similarity of pairs of texts: the cosine of their embeddings."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rfprune.tasks.max_length import checked_length
from rfprune.tasks.registry import Task


def encode_pairs(task: Task, tokenizer: Any, chunk: Any, max_length: int | None) -> dict[str, Any]:
    """Columns of tokenised texts, two rows per pair."""
    length = checked_length(task, tokenizer, max_length, texts=1)
    texts = [text for pair in zip(*(chunk[name] for name in task.text_columns), strict=True)
             for text in pair]  # fmt: skip
    return dict(tokenizer(texts, truncation=True, max_length=length))


def cosines(embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosines (N,) of normalised embeddings (2N, d), the two of a pair in adjacent rows."""
    pairs = embeddings.astype(np.float64).reshape(-1, 2, embeddings.shape[1])
    products: NDArray[np.float64] = (pairs[:, 0] * pairs[:, 1]).sum(axis=1)
    return products
