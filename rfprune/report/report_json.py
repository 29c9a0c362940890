"""report.json: one run as numbers, every one of them measured in that run.

Scores are in points of 100, sizes in bytes, latencies in milliseconds (medians), and
`seconds.prune_total` covers collection to compaction, not loading or evaluation.
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rfprune.report.output_folder import REPORT_FILE

SCHEMA = 1
STAGES = ("collect", "search", "rearrange", "compact", "verify", "tune")
_PACKAGES = ("torch", "transformers", "datasets", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    found = {"rfprune": version("rfprune"), "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def ratios(original: Mapping[str, float], pruned: Mapping[str, float]) -> dict[str, float]:
    """pruned/original of every cost that can be a constraint."""
    keys = {"mac": "macs", "params": "params", "memory": "bytes", "latency": "latency_ms"}
    return {metric: pruned[key] / original[key] for metric, key in keys.items()}


def stage_seconds(stages: Mapping[str, float], *, load: float, evaluate: float) -> dict[str, float]:
    """Seconds by stage; a stage that was left out took none."""
    seconds = {"load": load}
    seconds |= dict.fromkeys(STAGES, 0.0) | dict(stages)
    return seconds | {"evaluate": evaluate}


def write_report(report: Mapping[str, Any], folder: Path) -> Path:
    """Write `report` as folder/report.json; what is not a finite number becomes null."""
    path = folder / REPORT_FILE
    text = json.dumps(_finite(report), indent=2, ensure_ascii=False, allow_nan=False)
    # Lists of numbers on one line each; a line break is never within a text.
    text = re.sub(r"\[\n[-+.\deE,\s]+\]", lambda found: " ".join(found[0].split()), text)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def read_report(folder: Path) -> dict[str, Any]:
    """Read folder/report.json.

    Raises:
        ValueError: it is of another schema.
    """
    report: dict[str, Any] = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    if report.get("schema") != SCHEMA:
        raise ValueError(f"{folder / REPORT_FILE} has schema {report.get('schema')}, not {SCHEMA}")
    return report


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
