"""The models that are measured: checkpoints with their data, random weights, and pruned copies.

Weights do not change time, shapes do. A pruned copy with random weights keeps what a global
allocation leaves: more in the lower layers than in the upper ones, and no two layers alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rfprune.cli.validation import check_task
from rfprune.errors import UserError
from rfprune.settings import Settings
from scripts.profile_latency import SYNTHETIC

if TYPE_CHECKING:
    from torch import Tensor

    from rfprune.checkpoints.loading import LoadedCheckpoint
    from rfprune.model.layout import Layout
    from rfprune.tasks.evaluation import EvaluationSet
    from rfprune.tasks.registry import Task

Batch = Mapping[str, "Tensor"]
Kept = tuple[int, ...]
"""Units that each block of a layout keeps."""

STRUCTURE_LENGTH = 128
"""Tokens at which the MACs of a drawn structure are counted: every length runs the same model."""

EMPTIED_FROM = 0.3
"""From this fraction down, the weakest attention and the weakest FFN are emptied."""

DEPTH_SLOPE = 1.5
"""Natural logarithm of how much more a unit of the first layer is worth than one of the last."""


@dataclass(frozen=True)
class Checkpoint:
    """A model with its task and its data."""

    loaded: LoadedCheckpoint
    task: Task
    data_dir: Path | None
    max_length: int
    batch_size: int

    @property
    def model(self) -> Any:
        """The model, in eval mode."""
        return self.loaded.model

    def batches(self, samples: int, seed: int, *, labels: bool = False) -> list[dict[str, Tensor]]:
        """Calibration batches of this many training examples, on the model's device."""
        from rfprune.tasks.calibration import calibration_batches

        drawn = calibration_batches(
            self.task,
            self.loaded.tokenizer,
            self.data_dir,
            num_samples=samples,
            batch_size=self.batch_size,
            max_length=self.max_length,
            seed=seed,
            with_labels=labels,
        )
        device = self.model.device
        return [{name: value.to(device) for name, value in batch.items()} for batch in drawn]

    def evaluation_set(self, limit: int | None) -> EvaluationSet:
        """The validation data, or a random sample of it."""
        from rfprune.tasks.evaluation import prepare_evaluation

        return prepare_evaluation(
            self.task,
            self.loaded.tokenizer,
            self.data_dir,
            batch_size=self.batch_size,
            max_length=self.max_length,
            limit=limit,
        )


def load_checkpoint(options: argparse.Namespace) -> Checkpoint:
    """The checkpoint, task and data that the flags name.

    Raises:
        UserError: one of them is unknown or cannot be loaded.
    """
    import torch

    from rfprune.checkpoints.device import pick_device
    from rfprune.checkpoints.loading import load, resolve_data_dir, resolve_max_length, resolve_task

    check_task(options.task)
    task = resolve_task(
        options.task, options.model, data_dir=options.data_dir, text_columns=None, label_column=None
    )
    device = pick_device(getattr(options, "device", "cpu"))
    dtype = getattr(torch, getattr(options, "dtype", "float32"))
    loaded = load(options.model, task, device=device, dtype=dtype)
    max_length = resolve_max_length(loaded, task, getattr(options, "max_length", None))
    data_dir = resolve_data_dir(options.model, options.data_dir)
    return Checkpoint(loaded, task, data_dir, max_length, options.batch_size)


def settings_of(**choices: Any) -> Settings:
    """Settings that keep any number of neurons, as published comparisons do."""
    return Settings(**{"round_to": 1, **choices})


def num_examples(batches: Sequence[Batch]) -> int:
    """Rows of all batches together."""
    return sum(len(batch["input_ids"]) for batch in batches)


def add_model_or_synthetic(parser: argparse.ArgumentParser) -> None:
    """Add --model and --synthetic; one of them must be given."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--synthetic", choices=SYNTHETIC, help="random weights in this size")
    group.add_argument("--model", metavar="FOLDER", help="a dense checkpoint")


def random_batch(model: Any, batch_size: int, length: int) -> dict[str, Tensor]:
    """Random tokens without padding on the model's device; the tokens change no time.

    Raises:
        UserError: the model has fewer positions.
    """
    import torch

    positions = getattr(model.config, "max_position_embeddings", length + 2) - 2  # RoBERTa's offset
    if length > positions:
        raise UserError(f"--length {length} is more than the {positions} tokens of this model.")
    generator = torch.Generator().manual_seed(0)
    highest = model.config.vocab_size
    ids = torch.randint(highest // 2, highest, (batch_size, length), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {name: value.to(model.device) for name, value in batch.items()}


def draw_structure(layout: Layout, ratio: float, *, seed: int, round_to: int = 1) -> Kept:
    """Units that each block keeps at a fraction of the MACs; a smaller fraction keeps a subset.

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


def pruned_to(model: Any, layout: Layout, kept: Kept) -> Any:
    """A compact copy in which each block keeps its first units."""
    import torch

    from rfprune.model.compact import compact

    masks = [
        (torch.arange(block.num_units) < count).float()
        for block, count in zip(layout.blocks, kept, strict=True)
    ]
    return compact(model, layout, masks).eval()


def greedy_tokens(model: Any, prompts: Tensor, number: int) -> Tensor:
    """The tokens that a language model adds greedily, end tokens included: (B, S) -> (B, number).

    Without a cache and without any other rule of generation, as other runtimes do it.
    """
    import torch

    texts = prompts
    with torch.no_grad():
        for _ in range(number):
            added = model(input_ids=texts, use_cache=False).logits[:, -1:].argmax(-1)
            texts = torch.cat([texts, added], 1)
    return texts[:, prompts.shape[1] :]


def layers_of(layout: Layout, kept: Sequence[int]) -> list[dict[str, int]]:
    """Heads and neurons left in every layer."""
    layers = [{"heads": 0, "neurons": 0} for _ in layout.layers]
    for block, count in zip(layout.blocks, kept, strict=True):
        layers[block.layer][f"{block.kind}s"] = count
    return layers
