"""The dense export: an ordinary checkpoint in the original shapes, with zeros for removed units."""

from __future__ import annotations

from pathlib import Path

from rfprune.export.contract import Export, ExportJob, check_outputs, file_bytes
from rfprune.model.dense import save_dense


def write_dense(folder: Path, job: ExportJob) -> dict[str, Export]:
    """Write folder/dense, a checkpoint of the original architecture; see `to_dense`."""
    result, path = job.result, folder / "dense"
    dense = save_dense(
        result.model, result.layout, result.masks, path, job.tokenizer, dtype=job.stored
    )
    difference = check_outputs("dense", result.model.eval(), dense.eval(), job.batches)
    return {"dense": Export("dense", file_bytes(path, "*.safetensors"), difference)}
