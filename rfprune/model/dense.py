"""A pruned model in its original shapes, with zeros where units were removed.

It is as large and slow as the original and computes what the pruned model computes. Any tool that
knows the architecture loads it, since it has no code of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rfprune.model.checkpoint import stored_state
from rfprune.model.layout import Layout, Producer, recorded_blocks, unit_features
from rfprune.model.linear import is_transposed, linear
from rfprune.model.original_class import fill, make_on_meta, original_config
from rfprune.model.saved_tokenizer import save_tokenizer


def to_dense(
    model: PreTrainedModel, layout: Layout | None = None, masks: Sequence[Tensor] = ()
) -> PreTrainedModel:
    """Put a pruned model back into its original shapes.

    Args:
        model: pruned; it is not changed.
        layout: of the model before this pruning.
        masks: of `layout`, one (U,) per block. They say which neurons were kept; without them the
            kept neurons come first. Heads always return to their own places, since a position bias
            may depend on them.

    Returns:
        A model of the original class, equal to `model` up to rounding. Removed units have zero
        weights in producers and consumer; a sublayer without units keeps its bias.
    """
    neurons = {} if layout is None else _kept_neurons(layout, masks)
    dense = make_on_meta(model, original_config(model.config))
    state = dict(model.state_dict())
    for block in recorded_blocks(model):
        state |= _in_full_shapes(block, neurons.get(block["consumer"]), state, dense)
    fill(dense, model, state)
    return dense


def save_dense(
    model: PreTrainedModel,
    layout: Layout,
    masks: Sequence[Tensor],
    folder: Path,
    tokenizer: Any,
    *,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Save a pruned model in its original shapes, with its tokenizer.

    Args:
        model: see `to_dense`, also for `layout` and `masks`.
        folder: where to.
        tokenizer: saved beside the model.
        dtype: of the stored weights, see `rfprune.model.checkpoint.save_pruned`.

    Returns:
        The model that was saved.
    """
    dense = to_dense(model, layout, masks)
    dense.save_pretrained(folder, state_dict=None if dtype is None else stored_state(dense, dtype))
    save_tokenizer(tokenizer, folder)
    return dense


def _kept_neurons(layout: Layout, masks: Sequence[Tensor]) -> dict[str, Tensor]:
    """Indices of the kept neurons by the path of their consumer."""
    return {
        block.consumer: torch.nonzero(mask).flatten()
        for block, mask in zip(layout.blocks, masks, strict=True)
        if block.kind == "neuron"
    }


def _in_full_shapes(
    block: Mapping[str, Any],
    neurons: Tensor | None,
    small: Mapping[str, Tensor],
    dense: nn.Module,
) -> dict[str, Tensor]:
    """The parameters of a block in their original shapes, by name."""
    units = torch.arange(block["num_units"]) if neurons is None else neurons
    if block["units"] is not None:
        units = torch.tensor(block["units"], dtype=torch.long)
    consumer = f"{block['consumer']}.weight"
    shapes = {name: value.shape for name, value in dense.state_dict().items()}
    dimension = 0 if is_transposed(linear(dense, block["consumer"])) else 1
    columns = unit_features(units, block["unit_width"])
    num_units = shapes[consumer][dimension] // block["unit_width"]
    state = {consumer: _scattered(small[consumer], shapes[consumer], columns, dimension)}
    for entry in block["producers"]:
        producer = Producer(**entry)
        transposed = is_transposed(linear(dense, producer.path))
        rows = producer.rows_of(units, num_units)
        for name in (f"{producer.path}.weight", f"{producer.path}.bias"):
            if name in shapes:
                values = small.get(name, small[consumer].new_zeros(0))
                dimension = len(shapes[name]) - 1 if transposed else 0
                state[name] = _scattered(values, shapes[name], rows, dimension)
    for name, shape in shapes.items():  # of an emptied sublayer: the norms of its queries and keys
        if name.startswith(f"{block['inner']}.") and name not in state and name not in small:
            state[name] = small[consumer].new_ones(shape)
    return state


def _scattered(values: Tensor, shape: torch.Size, indices: Tensor, dimension: int) -> Tensor:
    """Zeros of a shape with `values` at `indices` of one dimension."""
    full = values.new_zeros(shape)
    if len(indices):
        full.index_copy_(dimension, indices.to(values.device), values)
    return full
