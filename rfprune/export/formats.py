"""The formats of `--export`: checks, writes, scores and times the requested ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rfprune.export.contract import Export, ExportJob, evaluate_export, time_on_cpu
from rfprune.export.dense import write_dense
from rfprune.export.gguf import check_gguf, write_gguf
from rfprune.export.onnx import check_onnx, write_onnx
from rfprune.export.openvino import write_openvino
from rfprune.latency.timed_batch import typical_batch
from rfprune.settings import Options

Writer = Callable[[Path, ExportJob], Mapping[str, Export]]


class Format(NamedTuple):
    """One format of `--export`.

    Attributes:
        write: writes it to a folder, and returns each export by its name in the report.
        check: refuses a model and tokenizer before any work, if their kind alone decides that.
    """

    write: Writer
    check: Callable[[Any, Any, Options], None] | None = None


FORMATS: dict[str, Format] = {
    "dense": Format(write_dense),
    "onnx": Format(write_onnx, lambda model, *_: check_onnx(model, "onnx")),
    "openvino": Format(write_openvino, lambda model, *_: check_onnx(model, "openvino")),
    "gguf": Format(
        write_gguf,
        lambda model, tokenizer, options: check_gguf(
            model, tokenizer, options.output.gguf_types, options.settings
        ),
    ),
}
"""By the name that `--export` takes. They are written in this order: openvino reads the file that
onnx has written, if there is one."""


def check_formats(model: Any, tokenizer: Any, options: Options) -> None:
    """Raise a UserError unless a pruned model can have the requested formats."""
    for name in options.output.export:
        check = FORMATS[name].check
        if check is not None:
            check(model, tokenizer, options)


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
    for name, one in FORMATS.items():
        if name in formats:
            exports |= one.write(folder, job)
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
