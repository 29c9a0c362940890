"""What a run says of its exports, drawn from the entry "exports" of report.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEADINGS = ("run by", "score", "size", "latency", "original / this")
_RUN_BY = {"onnx": "pruned, ONNX Runtime", "onnx_int8": "pruned, ONNX Runtime, int8"}


def export_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Original and pruned in PyTorch beside what ONNX Runtime ran; none without ONNX."""
    exports = report.get("exports") or {}
    conditions = exports.get("latency")
    if conditions is None:
        return []
    original_ms = conditions["original_ms"]
    rows = []
    for name in ("original", "pruned"):
        column = report[name]
        entry = {"score": column["score"], "bytes": column["bytes"]}
        entry["latency_ms"] = conditions[f"{name}_ms"]
        rows.append((f"{name}, PyTorch", entry))
    rows += [(label, exports[name]) for name, label in _RUN_BY.items() if name in exports]
    slowest = max(entry["latency_ms"] for _, entry in rows)
    digits = 0 if slowest >= 100 else 1 if slowest >= 10 else 2  # of the same row of the main table
    return [
        (
            label,
            "undefined" if entry["score"] is None else f"{entry['score']:.2f}",
            f"{entry['bytes'] / 1e6:.2f} MB",
            f"{entry['latency_ms']:.{digits}f} ms",
            f"{original_ms / entry['latency_ms']:.2f}x",
        )
        for label, entry in rows
    ]


def export_caption(report: Mapping[str, Any]) -> str:
    """Under what conditions the rows hold."""
    conditions = (report.get("exports") or {}).get("latency")
    if conditions is None:
        return "Exports"
    threads = conditions["threads"]
    return (
        f"Exports, in one run on the CPU (batch {conditions['batch_size']} x "
        f"{conditions['sequence_length']}, {threads} thread{'s' if threads > 1 else ''})"
    )


def export_lines(report: Mapping[str, Any]) -> list[str]:
    """A sentence for every export: where it is, and how far its outputs are from the model's."""
    lines = []
    for name, entry in (report.get("exports") or {}).items():
        if name == "latency":
            continue
        text = f"{entry['path']}: {entry['bytes'] / 1e6:.2f} MB"
        if entry.get("max_difference") is not None:
            shapes = ", ".join(" x ".join(map(str, shape)) for shape in entry["checked_on"])
            text += (
                f"; its logits differ from the pruned model's by at most "
                f"{entry['max_difference']:.1e} (inputs of {shapes})"
            )
        lines.append(f"{text}.")
    return lines
