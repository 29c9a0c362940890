"""--max-memory: where the weights are placed so that a run keeps within it, or its refusal."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import psutil
import torch
from transformers import PreTrainedModel

from rfprune.checkpoints.loading import shapes_of
from rfprune.errors import RfpruneWarning
from rfprune.methods.memory_plan import (
    GIGABYTE,
    LATER_BYTES,
    Load,
    MemoryPlan,
    peak_resident_bytes,
    plan_memory,
)
from rfprune.settings import Options, num_bytes
from rfprune.tasks.max_length import NO_LIMIT
from rfprune.tasks.registry import Task


@dataclass(frozen=True)
class Placement:
    """Where the layers of a run are, and what its statistics may take.

    Attributes:
        offload: "cpu" or "disk"; None if they are where the model computes.
        free_bytes: bytes of the limit that the plan leaves free; None without a limit.
    """

    offload: str | None
    free_bytes: int | None = None


def placement(options: Options, task: Task, device: torch.device, dtype: torch.dtype) -> Placement:
    """Place the layers of a run; on a GPU the limit is set for the allocator as well.

    Raises:
        UserError: the run needs more than --max-memory even with its layers elsewhere.
    """
    run = options.run
    offload = None if device.type == run.offload else run.offload
    if run.max_memory is None:
        return Placement(offload)
    limit = num_bytes(run.max_memory) or 0
    process_bytes = psutil.Process().memory_info().rss + LATER_BYTES
    elsewhere = "disk"
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
        process_bytes, elsewhere = 0, "cpu"

    def planned(*, offloaded: bool) -> MemoryPlan:
        model, load = _model_and_load(options, task)
        return plan_memory(
            model, dtype, load, device, process_bytes=process_bytes, offloaded=offloaded
        )

    plan = planned(offloaded=offload is not None)
    if plan.total > limit and offload is None:
        offload = elsewhere
        plan = planned(offloaded=True)
    plan.check(limit, run.max_memory)
    return Placement(offload, limit - plan.total)


def warn_of_exceeded_memory(options: Options) -> None:
    """Warn if the process has taken more than --max-memory after all, by the system's own count."""
    limit, peak = num_bytes(options.run.max_memory or ""), peak_resident_bytes()
    if limit and peak is not None and options.run.device != "cuda" and peak > limit:
        warnings.warn(
            f"The run took {peak / GIGABYTE:.2f} GB, more than the {options.run.max_memory} of "
            "--max-memory.",
            RfpruneWarning,
            stacklevel=2,
        )


def _model_and_load(options: Options, task: Task) -> tuple[PreTrainedModel, Load]:
    """The model without its weights, and its calibration data."""
    data = options.data
    model = shapes_of(options.target.model, task)
    positions = getattr(model.config, "max_position_embeddings", None) or NO_LIMIT
    length = data.max_length or min(task.max_length, positions)
    return model, Load(data.samples, data.batch_size, length)
