"""What a run says of a constraint on latency, drawn from the entry "promise" of report.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def promise_lines(report: Mapping[str, Any]) -> list[str]:
    """What was promised, predicted and measured; nothing without a constraint on latency."""
    promise = report.get("promise")
    if not promise:
        return []
    timed = len(promise["attempts"])
    choices = f"{timed} choices of sizes were" if timed > 1 else "one choice of sizes was"
    return [
        f"Latency: promised {promise['promised_ms']:.3g} ms, predicted by this device's table "
        f"{promise['predicted_ms']:.3g} ms, measured {promise['measured_ms']:.3g} ms; {choices} "
        f"timed on the way."
    ]
