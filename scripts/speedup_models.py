"""What scripts/benchmark_speedup.py times: a model, pruned copies of it, and ways to run them.

Weights do not matter for time, shapes do. What a copy keeps is drawn as a global allocation leaves
it: more in the lower layers than in the upper ones, and no two layers alike.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rfprune.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from rfprune.model.layout import Layout

Batch = Mapping[str, "Tensor"]
Kept = tuple[int, ...]
"""Units that each block of a layout keeps."""

SYNTHETIC: Mapping[str, Mapping[str, int]] = {
    "bert-base": {},
    "minilm": {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536},
}
"""What `transformers.BertConfig` is asked for; its defaults are those of BERT-base."""

RUNTIMES = {"cpu": ("eager", "compile", "onnx"), "cuda": ("eager", "compile", "compile-graphs")}
"""Ways to run a model, by device."""

STRUCTURE_LENGTH = 128
"""Tokens at which the MACs of a constraint are counted: every length runs the same model."""

EMPTIED_FROM = 0.3
"""From this constraint down, the weakest attention and the weakest FFN are emptied."""

DEPTH_SLOPE = 1.5
"""Natural logarithm of how much more a unit of the first layer is worth than one of the last."""


def load_dense(synthetic: str | None, folder: str | None) -> Any:
    """A model with random weights, by name, or the checkpoint in a folder; float32, on the CPU.

    Raises:
        UserError: the folder holds no model that transformers can load.
    """
    import torch
    import transformers

    from rfprune.checkpoints.loading import quiet_transformers

    if synthetic is not None:
        config = transformers.BertConfig(**SYNTHETIC[synthetic])
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config).eval()
    assert folder is not None
    try:
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(folder)
            name = (config.architectures or ["none"])[0]
            model_class = getattr(transformers, name, transformers.AutoModel)
            return model_class.from_pretrained(folder, dtype=torch.float32).eval()
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"--model {folder} holds no model to load ({reason}).") from error


def draw_structure(layout: Layout, ratio: float, *, seed: int, round_to: int = 1) -> Kept:
    """Units that each block keeps at a fraction of the MACs; a smaller ratio keeps a subset.

    Args:
        round_to: neurons are kept in multiples of it (or all), the nearest to what was drawn.
    """
    import numpy as np

    from rfprune.cost.macs import mac_costs

    costs = mac_costs(layout, STRUCTURE_LENGTH)
    random = np.random.default_rng(seed)
    depth = max(1, len(layout.layers) - 1)
    worth = [  # of each unit, for each of its MACs
        np.exp(
            random.normal(-DEPTH_SLOPE * block.layer / depth, 0.5)
            + random.normal(0.0, 1.0, block.num_units)
        )
        for block in layout.blocks
    ]
    if ratio <= EMPTIED_FROM:
        for kind in ("head", "neuron"):
            own = [b for b, block in enumerate(layout.blocks) if block.kind == kind]
            worth[min(own, key=lambda b: worth[b].mean())][:] = 0.0
    blocks = np.repeat(np.arange(len(worth)), [len(values) for values in worth])
    order = np.argsort(-np.concatenate(worth), kind="stable")
    spent = np.cumsum([costs.tables[b][1] for b in blocks[order]])
    budget = ratio * costs.original
    counts = np.bincount(blocks[order][spent <= budget], minlength=len(worth))
    return tuple(
        _rounded(int(count), block.num_units, round_to) if block.kind == "neuron" else int(count)
        for block, count in zip(layout.blocks, counts, strict=True)
    )


def _rounded(count: int, num_units: int, round_to: int) -> int:
    if count == 0:
        return 0
    return min(num_units, max(1, round(count / round_to)) * round_to)


def prune_to(model: Any, layout: Layout, kept: Kept) -> Any:
    """A compact copy in which each block keeps its first units."""
    import torch

    from rfprune.model.compact import compact

    masks = [
        (torch.arange(block.num_units) < count).float()
        for block, count in zip(layout.blocks, kept, strict=True)
    ]
    return compact(model, layout, masks).eval()


def make_batch(model: Any, batch_size: int, length: int) -> dict[str, Tensor]:
    """Random tokens without padding, as a tokenizer gives them, on the model's device."""
    import torch

    generator = torch.Generator().manual_seed(0)
    highest = model.config.vocab_size
    ids = torch.randint(highest // 2, highest, (batch_size, length), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {name: value.to(model.device) for name, value in batch.items()}


def runner(runtime: str, model: Any) -> Callable[[Batch], object]:
    """A function that runs a model on a batch by a runtime.

    Compiled code and ONNX files are made for batches of any size and length (PyTorch makes its own
    for a batch of one). Each compiled model compiles at its first batch.
    """
    if runtime == "onnx":
        return _onnx_runner(model)
    if runtime == "eager":
        return lambda batch: model(**batch)
    import torch

    def forward(batch: Batch) -> object:
        return model(**batch)

    # torch keeps compiled variants by code object, and tries all of them at each call: with one
    # code object for all models, what is timed would depend on how many models there are.
    forward.__code__ = forward.__code__.replace(co_name=f"forward_{id(model)}")
    mode = "reduce-overhead" if runtime == "compile-graphs" else None
    return torch.compile(forward, dynamic=True, mode=mode)


def _onnx_runner(model: Any) -> Callable[[Batch], object]:
    from rfprune.export.onnx import OnnxModel, export_onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, make_batch(model, 2, 16), path)
        exported = OnnxModel(path)
    return lambda batch: exported(**batch)


def layers_of(layout: Layout, kept: Sequence[int]) -> list[dict[str, int]]:
    """Heads and neurons left in every layer."""
    layers = [{"heads": 0, "neurons": 0} for _ in layout.layers]
    for block, count in zip(layout.blocks, kept, strict=True):
        layers[block.layer][f"{block.kind}s"] = count
    return layers
