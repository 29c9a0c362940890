"""Warnings about calibration batches that cannot represent the model's data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from rfprune.model.batch import SIGNALS, Batch, token_mask
from rfprune.model.layout import Layout

_OFFSET = 2  # RoBERTa has 514 position embeddings for 512 tokens


def sample_warnings(model: PreTrainedModel, layout: Layout, batches: Sequence[Batch]) -> list[str]:
    """One sentence for each way in which the batches cannot represent a model's data.

    They hold one example, repeat a few examples, hold fewer tokens than a layer has neurons, or
    every text is as long as the model allows, and was probably truncated.

    Args:
        batches: with token masks.
    """
    examples = [example for batch in batches for example in _examples(batch)]
    number, different = len(examples), len(set(examples))
    lengths = [int(length) for batch in batches for length in token_mask(batch).sum(dim=1)]
    neurons = [block.num_units for block in layout.blocks if block.sublayer.kind == "neuron"]
    found = []
    if number == 1:
        found.append(
            "There is only 1 calibration example, which cannot represent the model's data: give "
            "hundreds."
        )
    elif 2 * different <= number:
        found.append(
            f"Only {different} of the {number} calibration examples are different, which cannot "
            f"represent the model's data: give hundreds of different ones."
        )
    if sum(lengths) < max(neurons, default=0):
        found.append(
            f"The calibration examples have {sum(lengths)} tokens in total, fewer than the "
            f"{max(neurons)} neurons of a layer, which is too little data to fit the weights: give "
            f"more examples."
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if (
        isinstance(positions, int)
        and number > 1
        and "input_ids" in batches[0]
        and model.get_output_embeddings() is None  # language models read blocks of one length
        and min(lengths) >= positions - _OFFSET
    ):
        found.append(
            f"All {number} calibration examples fill the model's {min(lengths)} positions and were "
            f"probably truncated, so the model is fitted to long texts: give whole texts of the "
            f"usual lengths."
        )
    return found


def _examples(batch: Batch) -> list[Any]:
    """A value per example that is equal for equal examples, whatever their padding."""
    tokens = batch.get("input_ids")
    if tokens is None:
        inputs = next(batch[name] for name in ("inputs_embeds", *SIGNALS) if name in batch)
        return [*zip(*_moments(inputs), strict=True)]
    rows, mask = tokens.flatten(1).cpu(), batch.get("attention_mask")
    if mask is None:
        return [tuple(row.tolist()) for row in rows]
    real = mask.flatten(1).bool().cpu()
    return [tuple(row[kept].tolist()) for row, kept in zip(rows, real, strict=True)]


def _moments(values: Tensor) -> list[list[float]]:
    """Sum and sum of squares of each example; equal examples have equal ones."""
    flat = values.flatten(1).double().cpu()
    return [flat.sum(dim=1).tolist(), flat.square().sum(dim=1).tolist()]
