"""The precision in which a checkpoint is stored, which need not be the one it is computed in.

A pruned model is stored as its original was: a checkpoint in half precision would otherwise come
out smaller in parameters and larger in bytes.
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

_SHORT = {"F16": torch.float16, "BF16": torch.bfloat16}


def stored_dtype(source: str) -> torch.dtype:
    """float16 or bfloat16 where most weights of a folder or cached hub id are, else float32."""
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
    """Round all weights, in place, to what `dtype` can hold, so that a stored copy is equal.

    False, and nothing done, where a weight is beyond its range.
    """
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


def round_to_stored_dtype(dtype: torch.dtype, model: nn.Module) -> torch.dtype:
    """Round the weights to what will be stored of them, so that this is what is measured."""
    if dtype == next(model.parameters()).dtype or round_weights(model, dtype):
        return dtype
    warnings.warn(
        f"The pruned weights are beyond the range of {str(dtype).removeprefix('torch.')}, the "
        f"dtype of the original's file: they are stored in float32.",
        RfpruneWarning,
        stacklevel=2,
    )
    return torch.float32
