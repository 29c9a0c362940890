"""The formats of `--export`: writes, scores and times the requested ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rfprune.export.contract import Export, ExportJob, evaluate_export, time_on_cpu
from rfprune.export.dense import write_dense
from rfprune.export.onnx import write_onnx
from rfprune.latency.timed_batch import typical_batch

Writer = Callable[[Path, ExportJob], Mapping[str, Export]]

FORMATS: dict[str, Writer] = {"dense": write_dense, "onnx": write_onnx}
"""Format -> function that writes it to a folder; returns each export by its name in the report."""


def write_exports(formats: Sequence[str], folder: Path, job: ExportJob) -> dict[str, Any]:
    """Write exports into subfolders of an output folder, and score and time them.

    Args:
        formats: names in FORMATS.

    Returns:
        The entry "exports" of report.json: paths relative to `folder`, sizes in bytes, latencies
        in milliseconds on the CPU.

    Raises:
        UserError: the model cannot be exported, or an export computes something else.
    """
    exports: dict[str, Export] = {}
    for name, write in FORMATS.items():
        if name in formats:
            exports |= write(folder, job)
    runtimes = {name: export.runtime for name, export in exports.items() if export.runtime}
    entries = {name: export.entry for name, export in exports.items()}
    if not runtimes:
        return entries
    for name, runtime in runtimes.items():
        entries[name] |= evaluate_export(runtime, job)
    original = job.original.to("cpu")  # in place, for a model
    try:
        models = {"original": original, "pruned": job.pruned_on_cpu, **runtimes}
        milliseconds, conditions = time_on_cpu(models, typical_batch(job.batches))
    finally:
        job.original.to(job.result.model.device)
    for name in runtimes:
        entries[name]["latency_ms"] = milliseconds[name]
    pytorch = {f"{name}_ms": milliseconds[name] for name in ("original", "pruned")}
    return entries | {"latency": conditions | pytorch}
