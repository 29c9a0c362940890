"""How statistics are collected from a model: as a whole, or layer by layer.

A model is run as a whole if its statistics and autograd fit into half of the free memory. The
gradients are the same to the bit either way.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from rfprune import distributed
from rfprune.model.batch import Batch
from rfprune.model.encoder_decoder import block_token_mask
from rfprune.model.residency import execution_device, is_offloaded
from rfprune.stages.calibration import Calibration
from rfprune.stages.layer_sweep import head_needs, layer_passes
from rfprune.stages.output_gradients import LinearOutputs
from rfprune.stages.passes import Pass, ValuesOf, batch_values, whole_model_pass

STATES_IN_MEMORY = 2**30
"""Bytes of hidden states that a sweep keeps in memory; the others are on disk."""


@contextmanager
def passes(
    calibration: Calibration,
    description: str,
    *,
    values_of: ValuesOf | None = None,
    sums_bytes: int = 0,
) -> Iterator[Iterator[Pass]]:
    """A context with the passes in which the gradients of an objective are collected.

    The passes free memory and disk at the end of the context.

    Args:
        description: of the progress bar.
        values_of: of the objective; that of the calibration by default.
        sums_bytes: of the statistics that this process collects, for all blocks.
    """
    values_of = values_of or partial(batch_values, calibration)
    hidden = not calibration.progress
    with (
        tqdm(desc=description, unit="batch", disable=hidden, leave=False) as bar,
        closing(_passes(calibration, values_of, bar, sums_bytes)) as found,
    ):
        yield found


def _passes(
    calibration: Calibration, values_of: ValuesOf, bar: tqdm[None], sums_bytes: int
) -> Generator[Pass]:
    limit = calibration.max_bytes
    if limit is None:
        device = execution_device(calibration.model)
        limit = distributed.broadcast_from_main(lambda: available_bytes(device)) // 2
    if is_offloaded(calibration.model) or sums_bytes + autograd_bytes(calibration) > limit:
        needs = head_needs(calibration, values_of)
        if not needs.layers:
            in_memory = min(STATES_IN_MEMORY, limit // 4)
            yield from layer_passes(
                calibration, values_of, needs, bar, max_bytes=in_memory, sums_bytes=sums_bytes
            )
            return
    yield whole_model_pass(calibration, values_of, bar)


def autograd_bytes(calibration: Calibration) -> int:
    """About the bytes that autograd keeps of the layers on the largest batch."""
    layout = calibration.layout
    features = sum(4 * block.num_units * block.unit_width for block in layout.blocks)
    features += 8 * layout.hidden_size * len(layout.layers)
    masks = (block_token_mask(layout, layout.blocks[0], one) for one in calibration.batches)
    itemsize: int = calibration.model.dtype.itemsize
    return max(mask.numel() for mask in masks) * features * itemsize


def available_bytes(device: torch.device) -> int:
    """Bytes of memory that are free on a device, for each of the processes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    try:  # the limit of a container
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
    except (OSError, ValueError):
        limit = available
    return int(min(available, limit)) // distributed.world_size()


def check_objective(calibration: Calibration, batch: Batch) -> None:
    """Differentiate the objective of one batch.

    Raises:
        UserError: the objective is not defined for this model and batch.
    """
    one = replace(calibration, batches=[batch])
    values_of = partial(batch_values, one)
    if head_needs(one, values_of).layers:
        watch = LinearOutputs(one.model, [block.consumer for block in one.layout.blocks])
        next(whole_model_pass(one, values_of, tqdm(disable=True)).gradients(0, watch))
