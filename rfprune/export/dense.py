"""The dense export: an ordinary checkpoint in the original shapes, with zeros for removed units.

Layers that were removed whole stay removed.
"""

from __future__ import annotations

from pathlib import Path

from rfprune.export.contract import Export, ExportJob, check_outputs, file_bytes
from rfprune.model.dense import save_dense
from rfprune.model.depth import masks_of_layers_that_stay, without_layers


def write_dense(folder: Path, job: ExportJob) -> dict[str, Export]:
    """Write folder/dense, a checkpoint of the original architecture; see `to_dense`."""
    result, path = job.result, folder / "dense"
    layout = without_layers(result.layout, result.removed_layers)
    masks = masks_of_layers_that_stay(result.layout, result.masks, result.removed_layers)
    dense = save_dense(result.model, layout, masks, path, job.tokenizer, dtype=job.stored)
    difference = check_outputs("dense", result.model.eval(), dense.eval(), job.batches)
    return {"dense": Export("dense", file_bytes(path, "*.safetensors"), difference)}
