"""Divergence of two models' outputs, in nats per example, by the kind of task."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rfprune.tasks.registry import Kind

Logits = tuple[NDArray[Any], ...]


def divergence_of_logits(reference: Logits, other: Logits, kind: Kind = "classification") -> float:
    """Mean over rows of KL(reference || other), in nats, computed in float64.

    For one output (regression) and for embeddings, half the squared difference, the KL divergence
    of normal distributions of unit variance. For several labels per row, the sum over independent
    labels. For several arrays (start and end logits), their sum.

    Args:
        reference: logits (N, C) of one model, see `rfprune.tasks.evaluation.Evaluation`.
        other: logits of the other model for the same rows.
        kind: of the task.

    Raises:
        ValueError: the logits are of different rows.
    """
    divergence = 0.0
    for first, second in zip(reference, other, strict=True):
        same_shape = first.shape == second.shape
        if not same_shape or (np.isfinite(first) != np.isfinite(second)).any():
            raise ValueError("divergence needs two evaluations of the same evaluation set")
        measure = _half_square if first.shape[1] == 1 else _MEASURES.get(kind, _mean_kl)
        divergence += measure(first, second)
    return divergence


def _half_square(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    squares = (reference.astype(np.float64) - other) ** 2
    return float(squares.sum(axis=1).mean() / 2)


def _bernoulli_kl(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Sum over labels; a label is a choice between its logit and 0."""
    parts = [
        _mean_kl(*(np.stack([values[:, label], 0 * values[:, label]], 1) for values in pair))
        for pair in [(reference, other)]
        for label in range(reference.shape[1])
    ]
    return float(sum(parts))


_MEASURES: Mapping[Kind, Callable[[NDArray[np.float32], NDArray[np.float32]], float]] = (
    MappingProxyType({"similarity": _half_square, "multi-label": _bernoulli_kl})
)


def _mean_kl(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Mean over rows of KL(reference || other) of logits (N, C); -inf in both means no class."""
    log_p, log_q = _log_softmax(reference), _log_softmax(other)
    differences = np.zeros_like(log_p)
    np.subtract(log_p, log_q, out=differences, where=np.isfinite(log_p))
    return float((np.exp(log_p) * differences).sum(axis=1).mean())


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-softmax of each row in float64; -inf stays -inf, also in rows of nothing else."""
    values = logits.astype(np.float64)
    peak = values.max(axis=1, keepdims=True)
    values -= np.where(np.isfinite(peak), peak, 0.0)
    total = np.exp(values).sum(axis=1, keepdims=True)
    return values - np.log(np.where(total > 0, total, 1.0))
