"""What llama.cpp computes from a GGUF file, in PyTorch: a model of its source, for tests.

Written after src/models/llama.cpp, deci.cpp, qwen2.cpp, qwen3.cpp, smollm3.cpp and gemma3.cpp of
llama.cpp, and knows nothing of rfprune: sizes, weights and positions come from the file alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, gelu, linear, silu

TURNS_HALVES = ("qwen2", "qwen3", "gemma3")
"""Architectures whose rotary positions turn the two halves of a head."""


class GgufFile:
    """Metadata and float32 tensors of a file."""

    def __init__(self, path: Path) -> None:
        import gguf

        reader = gguf.GGUFReader(path)
        self.fields: Mapping[str, Any] = {
            name: field.contents() for name, field in reader.fields.items()
        }
        self.tensors = {
            each.name: torch.tensor(gguf.dequantize(each.data, each.tensor_type)).reshape(
                each.shape.tolist()[::-1]
            )
            for each in reader.tensors
        }
        self.types = {each.name: each.tensor_type.name for each in reader.tensors}
        self.architecture: str = self.fields["general.architecture"]

    def entry(self, name: str) -> Any:
        """An entry of the architecture."""
        return self.fields[f"{self.architecture}.{name}"]

    def of_layer(self, name: str, layer: int) -> int:
        """A size that may differ from layer to layer."""
        value = self.entry(name)
        return int(value[layer] if isinstance(value, list) else value)

    def project(self, name: str, hidden: Tensor) -> Tensor:
        """A linear map with its optional bias."""
        return linear(hidden, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def norm(self, name: str, hidden: Tensor) -> Tensor:
        """RMSNorm."""
        variance = hidden.pow(2).mean(-1, keepdim=True)
        scale = torch.rsqrt(variance + self.entry("attention.layer_norm_rms_epsilon"))
        return hidden * scale * self.tensors[f"{name}.weight"]


def logits(path: Path, ids: Tensor) -> Tensor:
    """(B, S) -> (B, S, V), without padding."""
    file = GgufFile(path)
    assert file.of_layer("attention.head_count", 0) > 0, "the sizes of all heads come from layer 0"
    hidden = embedding(ids, file.tensors["token_embd.weight"])
    is_gemma = file.architecture == "gemma3"
    if is_gemma:
        hidden = hidden * file.entry("embedding_length") ** 0.5
    for layer in range(file.entry("block_count")):
        block = f"blk.{layer}"
        before = hidden
        if file.of_layer("attention.head_count", layer):
            normed = file.norm(f"{block}.attn_norm", hidden)
            mixed = attention(file, layer, normed)
            hidden = before + (
                file.norm(f"{block}.post_attention_norm", mixed) if is_gemma else mixed
            )
        if file.architecture == "deci" and not file.of_layer("feed_forward_length", layer):
            hidden = before  # the layer is skipped whole
            continue
        normed = file.norm(f"{block}.ffn_norm", hidden)
        gate = file.project(f"{block}.ffn_gate", normed)
        gate = gelu(gate, approximate="tanh") if is_gemma else silu(gate)
        up = file.project(f"{block}.ffn_up", normed)
        assert gate.shape[-1] == file.of_layer("feed_forward_length", layer)
        down = file.project(f"{block}.ffn_down", gate * up)
        hidden = hidden + (file.norm(f"{block}.post_ffw_norm", down) if is_gemma else down)
    output = file.tensors.get("output.weight", file.tensors["token_embd.weight"])
    return linear(file.norm("output_norm", hidden), output)


def attention(file: GgufFile, layer: int, hidden: Tensor) -> Tensor:
    """Causal attention of one layer with the layer's own numbers of heads."""
    block, width = f"blk.{layer}", file.entry("attention.key_length")
    counts = [file.of_layer(f"attention.head_count{kind}", layer) for kind in ("", "_kv", "_kv")]
    slides = file.architecture == "gemma3" and (layer + 1) % 6 > 0
    base = file.entry("rope.freq_base_swa" if slides else "rope.freq_base")
    parts = []
    for name, count in zip("qkv", counts, strict=True):
        part = file.project(f"{block}.attn_{name}", hidden)
        part = part.reshape(*hidden.shape[:2], count, width)
        if f"{block}.attn_{name}_norm.weight" in file.tensors:
            part = file.norm(f"{block}.attn_{name}_norm", part)
        has_rotary = file.architecture != "smollm3" or (layer + 1) % 4
        parts.append(turned(file, part, base) if name != "v" and has_rotary else part)
    queries, keys, values = parts
    keys, values = (each.repeat_interleave(counts[0] // counts[1], 2) for each in (keys, values))
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) / width**0.5
    everything = torch.ones(scores.shape[-2:], dtype=torch.bool)
    unseen = everything.triu(1)
    if slides:
        unseen |= everything.tril(-file.entry("attention.sliding_window"))
    weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
    mixed = torch.einsum("bhqk,bkhd->bqhd", weights, values)
    return file.project(f"{block}.attn_output", mixed.flatten(2))


def turned(file: GgufFile, heads: Tensor, base: float) -> Tensor:
    """Rotary positions of (B, S, H, D)."""
    width = file.entry("rope.dimension_count")
    powers = torch.arange(0, width, 2) / width
    frequencies = base**-powers
    if "rope_freqs.weight" in file.tensors:
        frequencies = frequencies / file.tensors["rope_freqs.weight"]
    angles = torch.arange(heads.shape[1])[:, None, None] * frequencies
    if file.architecture in TURNS_HALVES:
        first, second = heads.chunk(2, -1)
    else:
        first, second = heads[..., ::2], heads[..., 1::2]
    one = first * angles.cos() - second * angles.sin()
    other = first * angles.sin() + second * angles.cos()
    if file.architecture in TURNS_HALVES:
        return torch.cat([one, other], -1)
    return torch.stack([one, other], -1).flatten(-2)
