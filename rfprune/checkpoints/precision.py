"""The dtype of stored weights, which may differ from the dtype of the computation.

A pruned model is stored in the dtype of its original. A half-precision checkpoint would otherwise
lose parameters and grow in bytes.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rfprune.errors import RfpruneWarning
from rfprune.model.residency import is_offloaded, stored_tensors
from rfprune.model.weight_store import read_as

_SHORT = {"F16": torch.float16, "BF16": torch.bfloat16}


def stored_dtype(source: str) -> torch.dtype:
    """The dtype of most weights in a folder or cached hub repository: float16, bfloat16 or float32.

    float32 also where there are no weights to look at.
    """
    sizes: Counter[str] = Counter()
    for path in _weight_files(source):
        with safe_open(path, framework="pt") as file:
            for name in list(file.keys()):
                entry = file.get_slice(name)
                sizes[entry.get_dtype()] += torch.Size(entry.get_shape()).numel()
    if not sizes:
        return torch.float32
    return _SHORT.get(sizes.most_common(1)[0][0], torch.float32)


def _weight_files(source: str) -> Iterable[Path]:
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source, "config.json")
        if not isinstance(cached, str):
            return []
        folder = Path(cached).parent
    return sorted(folder.glob("model*.safetensors"))


def round_weights(model: nn.Module, dtype: torch.dtype) -> bool:
    """Round all weights in place to values of `dtype`, so that storing them loses nothing.

    Returns:
        False, with all weights unchanged, if one of them is beyond the range of `dtype`.
    """
    if is_offloaded(model):
        return _round_offloaded(model, dtype)
    tensors: list[Tensor] = [
        tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()
    ]
    rounded = [tensor.detach().to(dtype) for tensor in tensors]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in rounded):
        return False
    with torch.no_grad():
        for tensor, value in zip(tensors, rounded, strict=True):
            tensor.copy_(value)
    return True


def _round_offloaded(model: nn.Module, dtype: torch.dtype) -> bool:
    """The same for a result whose layers are offloaded."""
    for _, tensor in stored_tensors(model):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.to(dtype)).all()):
            return False
    read_as(model, dtype)
    for parameter in model.parameters():
        if not parameter.is_meta:  # it may be shared with the original
            parameter.data = parameter.detach().to(dtype).to(parameter.dtype)
    return True


def round_to_stored_dtype(dtype: torch.dtype, model: nn.Module) -> torch.dtype:
    """Round the weights to the dtype they will be stored in, before the model is scored.

    Returns:
        `dtype`, or float32 with a RfpruneWarning if a weight is beyond its range.
    """
    if dtype == next(model.parameters()).dtype or round_weights(model, dtype):
        return dtype
    warnings.warn(
        f"The pruned weights exceed the range of {str(dtype).removeprefix('torch.')}, the dtype of "
        f"the original's file, and are stored in float32.",
        RfpruneWarning,
        stacklevel=2,
    )
    return torch.float32
