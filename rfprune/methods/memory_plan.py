"""How much memory a run takes, from the shapes of a model alone, before it is loaded.

The largest terms are those of one block at a time. With p input features of its output projection
and d outputs, the fit of the block has float64 moments (p, p) of training and of held-out tokens,
and their factor. An offloaded run on a CPU has only one of the three in memory at a time; see
`rfprune.stages.reconstruct`. The block's other terms are (p, d). A run that is offloaded has one
layer of the original and of the student in memory, else both models are there.
All terms are upper bounds: as if all units of the largest block were kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rfprune.cost.params import total_params
from rfprune.errors import UserError
from rfprune.model.batch import MAX_LOGITS
from rfprune.model.layout import Block, Layout, layout_of
from rfprune.stages.least_squares import ROWS

GIGABYTE = 10**9

LATER_BYTES = 600 * 10**6
"""What libraries take that are imported late (data, figures), pages of files of weights that are
still mapped, and memory that is not given back; more than a run of 1B parameters needed."""

_FLOAT64 = 8


@dataclass(frozen=True)
class Load:
    """The calibration data of a run.

    Attributes:
        examples: of all batches.
        batch_size: examples of the largest batch.
        length: tokens of the longest example.
    """

    examples: int
    batch_size: int
    length: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a run takes at its peak, by what takes them."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self.parts.values())

    def check(self, limit: int, text: str) -> None:
        """Check that the run stays within a limit.

        Args:
            limit: in bytes.
            text: the limit as the user wrote it.

        Raises:
            UserError: it does not; the least possible limit is named.
        """
        if self.total <= limit:
            return
        parts = ", ".join(f"{name} {size / GIGABYTE:.2f}" for name, size in self.parts.items())
        least = -(-self.total // 10**7) / 100
        raise UserError(
            f"--max-memory {text} is too little: with its layers offloaded, this run needs "
            f"{least:.2f} GB ({parts}); give --max-memory {least:.2f}GB, or a smaller "
            "--batch-size, fewer --samples or a smaller --max-length"
        )


def peak_resident_bytes() -> int | None:
    """The most memory that this process has had, by the operating system's count; None where it
    keeps none (it is Linux's)."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, flags=re.MULTILINE)
    return None if found is None else 1024 * int(found[1])


def plan_memory(
    model: PreTrainedModel,
    dtype: torch.dtype,
    load: Load,
    device: torch.device,
    *,
    process_bytes: int,
    offloaded: bool,
) -> MemoryPlan:
    """The memory that a run takes.

    Args:
        model: with or without weights.
        dtype: of its weights when they are loaded.
        load: the calibration data.
        device: that the run computes on, whose memory is counted.
        process_bytes: of the process without the model, libraries that are imported late included.
        offloaded: whether the layers are loaded one by one.
    """
    layout = layout_of(model)
    layers = [
        dtype.itemsize * sum(weight.numel() for weight in model.get_submodule(path).parameters())
        for path in layout.layers
    ]
    others = dtype.itemsize * total_params(model) - sum(layers)
    tokens = load.batch_size * load.length
    states = 2 * load.examples * load.length * layout.hidden_size * dtype.itemsize
    activations = max(
        _activations(layout, layer, load, dtype.itemsize) for layer in range(len(layout.layers))
    )
    on_disk = offloaded and device.type == "cpu"  # moments that are not used
    logits = 0
    if model.get_output_embeddings() is not None:
        logits = 6 * 4 * min(MAX_LOGITS, tokens * model.config.vocab_size)
    return MemoryPlan(
        {
            "Python and its libraries": process_bytes,
            "embeddings and head": others if offloaded else 2 * others,
            "layers": 2 * (max(layers) if offloaded else sum(layers)),
            "moments of the largest block": max(
                _moments(block, layout.hidden_size, on_disk=on_disk) for block in layout.blocks
            ),
            "a batch": max(activations, logits),
            "hidden states": states,
        }
    )


def _moments(block: Block, hidden_size: int, *, on_disk: bool) -> int:
    """Bytes of the fit of a block: moments, factor, and products with the outputs; or of the
    regression map of the block's inputs before, or of the error curve, if these take more.

    Args:
        on_disk: whether moments are on disk while they are not used.
    """
    features = block.num_units * block.unit_width
    square, product = features**2, features * hidden_size
    moments = (1 if on_disk else 3) * square + (5 if on_disk else 8) * product
    rows = 2 * min(ROWS, features) * features
    aligned = 11 * hidden_size**2
    curve = (3.5 * square + 3 * product) / 2  # in float32
    return _FLOAT64 * (max(moments, int(curve), aligned) + rows)


def _activations(layout: Layout, layer: int, load: Load, itemsize: int) -> int:
    """Bytes that autograd keeps of one layer on the largest batch."""
    blocks = layout.blocks_of_layer(layer)
    tokens = load.batch_size * load.length
    features = sum(4 * block.num_units * block.unit_width for block in blocks)
    heads = sum(_num_query_heads(block) for block in blocks)
    scores = 4 * load.batch_size * heads * load.length**2
    return 2 * itemsize * (tokens * (features + 8 * layout.hidden_size) + scores)


def _num_query_heads(block: Block) -> int:
    """Query heads of an attention; a unit may hold several."""
    if block.kind == "neuron":
        return 0
    return block.num_units * block.unit_width // block.head_width
