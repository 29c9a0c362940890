"""The conditions that a latency was measured under: device, versions, batch shape, threads."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from rfprune.model.layerwise import layer_calls
from rfprune.model.layout import Layout


@dataclass(frozen=True)
class Conditions:
    """What a latency depends on besides the model.

    Attributes:
        device: "cpu", "cuda" or "mps".
        device_name: the product name of the GPU or processor.
        platform: operating system and architecture.
        torch: its version.
        transformers: its version.
        dtype: of the weights, such as "float32".
        batch_size: rows of the batch, B.
        sequence_length: tokens of each row, S.
        attention: implementation in transformers ("sdpa", "eager", ...).
        threads: of PyTorch on the CPU.
        padded: whether the batch has padding, and so an attention mask.
    """

    device: str
    device_name: str
    platform: str
    torch: str
    transformers: str
    dtype: str
    batch_size: int
    sequence_length: int
    attention: str
    threads: int
    padded: bool


def conditions_of(
    model: PreTrainedModel, layout: Layout, batch: Mapping[str, Tensor]
) -> Conditions:
    """The conditions under which `model` runs on `batch` on its current device."""
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    tokens = batch.get("input_ids")
    if tokens is None:  # the model splits an image into tokens
        with torch.no_grad():
            tokens, _ = layer_calls(model, layout, inputs)
    mask = batch.get("attention_mask")
    return Conditions(
        device=model.device.type,
        device_name=device_name(model.device),
        platform=f"{platform.system()} {platform.machine()}",
        torch=torch.__version__,
        transformers=transformers.__version__,
        dtype=str(model.dtype).removeprefix("torch."),
        batch_size=tokens.shape[0],
        sequence_length=tokens.shape[1],
        attention=str(model.config._attn_implementation),
        threads=torch.get_num_threads(),
        padded=mask is not None and not bool(mask.all()),
    )


def device_name(device: torch.device) -> str:
    """The product name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
