"""What `prune` is given, looked at before any work is done with it, and cut to size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rfprune.errors import UserError
from rfprune.model.layerwise import Batch

MOST_LOGITS = 2**25
"""Of a language model in one batch: 128 MiB in float32, a few times over when differentiated."""


def on_device(batch: Any, device: torch.device) -> Batch:
    """A batch on a device; UserError where it is none."""
    if not (isinstance(batch, Mapping) and all(isinstance(v, Tensor) for v in batch.values())):
        raise UserError(
            f"a batch must map names to tensors, as a data collator's output does; got a "
            f"{type(batch).__name__}: collate the examples with tensors first"
        )
    return {name: value.to(device) for name, value in batch.items()}


def check_finite(model: PreTrainedModel) -> None:
    """Refuse weights that are not finite, or not there to look at.

    Raises:
        UserError: the first such parameter is named.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UserError(
                f"parameter '{name}' is not in memory: it was offloaded, and every weight is "
                "looked at and some are changed; load the model onto devices that hold all of it"
            )
        if not torch.isfinite(parameter).all():
            raise UserError(
                f"parameter '{name}' holds NaN or infinity; save or download the checkpoint again"
            )


def cut_to_size(model: PreTrainedModel, batch: Batch) -> list[Batch]:
    """The batch, or smaller ones where a language model would make `MOST_LOGITS` and more of it.

    Such a model has a logit for every word of its vocabulary at every token. More batches also mean
    that some of few examples can be held out.
    """
    vocabulary = model.get_output_embeddings()
    tokens = batch.get("input_ids")
    if vocabulary is None or tokens is None or len({len(values) for values in batch.values()}) > 1:
        return [batch]
    rows = max(1, MOST_LOGITS // (vocabulary.weight.shape[0] * tokens[0].numel()))
    number = max(1, -(-len(tokens) // rows))
    parts = {name: values.tensor_split(number) for name, values in batch.items()}
    return [dict(zip(parts, part, strict=True)) for part in zip(*parts.values(), strict=True)]
