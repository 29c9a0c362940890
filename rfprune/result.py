"""What `prune()` returns."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rfprune.cost.constraint import Constraint
from rfprune.cost.sparsity import MapSparsity
from rfprune.errors import as_path
from rfprune.latency.promise import LatencyPromise
from rfprune.model.checkpoint import check_saved_parts, masks_path, save_pruned
from rfprune.model.layout import Layout
from rfprune.model.masks import Masks
from rfprune.model.staging import check_free, recover, staged
from rfprune.stages.optimal_brain_surgeon import ErrorCurve

Item = TypeVar("Item")


@dataclass(frozen=True)
class PruneResult:
    """A pruned model, what was removed from it, and what it costs.

    Attributes:
        model: the smaller model; `save` writes it to a folder.
        masks: one (U,) per block of `layout`: 0 for units that were removed, the tuned scale of the
            others (1 if the method does not scale units).
        layout: the blocks of the original model.
        removed_layers: indices of the layers of the original that were removed whole; the others
            are renumbered.
        constraint: the requested constraint; None if all units were kept.
        achieved: cost of the pruned model as a fraction of the original's, by metric: "mac"
            (Transformer layers, at the mean length), "params" (all), "memory" (bytes of weights),
            and "latency" if that was constrained.
        seconds: by stage (collect, depth, search, rearrange, compact, verify, tune, sparsify), and
            their sum (prune_total).
        warnings: one sentence for each problem: calibration batches that cannot represent the
            model's data, a block that could not be fitted, or a latency that was not met.
        layers: the number of units of every kind that each layer keeps.
        mean_tokens: mean length of the calibration examples, at which MACs are counted.
        importance: importance (U,) of the units of each block; None for a method without it.
        curves: error curve of each block of `layout`; None for a method without them.
        cached: stages whose result was loaded from the cache; their seconds are those of loading.
        promise: predicted and measured latency; None unless latency was constrained.
        sparsity: the zeros of every linear map within the layers; None without
            `Settings(sparsity=...)`.
    """

    model: PreTrainedModel
    masks: Masks
    layout: Layout
    constraint: Constraint | None
    achieved: dict[str, float]
    seconds: dict[str, float]
    warnings: tuple[str, ...]
    layers: tuple[dict[str, int], ...]
    mean_tokens: float
    importance: tuple[Tensor, ...] | None = None
    curves: tuple[ErrorCurve, ...] | None = None
    cached: tuple[str, ...] = ()
    promise: LatencyPromise | None = None
    sparsity: tuple[MapSparsity, ...] | None = None
    removed_layers: tuple[int, ...] = ()

    @property
    def ratio(self) -> float | None:
        """The ratio of the constraint; None if all units were kept."""
        return None if self.constraint is None else self.constraint.ratio

    def save(
        self,
        folder: str | Path,
        tokenizer: Any = None,
        *,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the pruned model to a folder, as the command does.

        The folder holds config.json, model.safetensors, pruning/masks.safetensors, the tokenizer,
        and modeling_rfprune.py, the code of the model (not after `uniform=True` or
        `depth="layers"`, which make a model of its family's own class). It is written completely
        or not at all.

        Args:
            folder: new or empty.
            tokenizer: of the model, or its image processor; None to save the model alone.
            dtype: of the stored weights; None for that of the model.
            overwrite: replace a folder in which a pruned model was saved.

        Raises:
            UserError: the folder is not empty or cannot be written, or the model's class is not one
                of transformers, so the checkpoint could not be loaded.

        Example:
            >>> from rfprune import load_pruned
            >>> from transformers import AutoModelForSequenceClassification
            >>> result.save("smaller", tokenizer)
            >>> model = AutoModelForSequenceClassification.from_pretrained(
            ...     "smaller", trust_remote_code=True
            ... )
            >>> model = load_pruned("smaller")  # or without code from the folder
        """
        folder = as_path(folder, "folder")
        check_saved_parts(tokenizer, dtype)
        recover(folder)
        marker = masks_path(folder).relative_to(folder).as_posix()
        check_free(folder, overwrite=overwrite, marker=marker)
        with staged(folder, overwrite=overwrite) as temporary:
            save_pruned(
                self.model,
                self.layout,
                self.masks,
                temporary,
                tokenizer,
                removed_layers=self.removed_layers,
                dtype=dtype,
            )


def units_of_layers(layout: Layout, counts: Sequence[int]) -> list[dict[str, int]]:
    """Number of units of every kind in every layer; 0 for a block that was emptied before.

    Args:
        counts: number of units of each block of `layout`.
    """
    decoder = layout.layer_indices(decoder=True)
    layers = [
        {"heads": 0, **({"cross_heads": 0} if layer in decoder else {}), "neurons": 0}
        for layer in range(len(layout.layers))
    ]
    for block, count in zip(layout.blocks, counts, strict=True):
        layers[block.layer][block.sublayer.name] = count
    return layers


@dataclass
class StageTimer:
    """Seconds by stage.

    Attributes:
        seconds: by name of the stage.
        cached: names of the stages that were loaded from the cache.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    cached: set[str] = field(default_factory=set)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the context to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def timed(self, name: str, items: Iterable[Item]) -> Generator[Item]:
        """Add the time that an iterable takes to make its items to a stage."""
        iterator = iter(items)
        while True:
            with self.stage(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item
            del item  # it may be large

    def fork(self) -> StageTimer:
        """A copy that goes on counting on its own."""
        return StageTimer(dict(self.seconds), set(self.cached))

    def report(self) -> dict[str, float]:
        """Seconds by stage, and their sum as "prune_total"."""
        return {**self.seconds, "prune_total": sum(self.seconds.values())}
