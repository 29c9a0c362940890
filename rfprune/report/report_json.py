"""report.json: the numbers of one run, all measured in that run.

Scores are in points of 100, sizes in bytes, latencies are medians in milliseconds, and
`seconds.prune_total` covers all stages of the pruning without loading and evaluation.
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

Report = Mapping[str, Any]
"""The contents of report.json."""

SCHEMA = 1
STAGES = ("collect", "depth", "search", "rearrange", "compact", "verify", "tune", "sparsify")
_PACKAGES = ("torch", "transformers", "datasets", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Versions of rfprune, Python and the packages that determine the numbers."""
    found = {"rfprune": version("rfprune"), "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def ratios(original: Mapping[str, float], pruned: Mapping[str, float]) -> dict[str, float]:
    """pruned/original of each cost that can be a constraint, by metric."""
    keys = {"mac": "macs", "params": "params", "memory": "bytes", "latency": "latency_ms"}
    return {metric: pruned[key] / original[key] for metric, key in keys.items()}


def stage_seconds(stages: Mapping[str, float], *, load: float, evaluate: float) -> dict[str, float]:
    """Seconds by stage, with 0 for a stage that did not run."""
    seconds = {"load": load}
    seconds |= dict.fromkeys(STAGES, 0.0) | dict(stages)
    return seconds | {"evaluate": evaluate}


def write_report(report: Report, folder: Path) -> Path:
    """Write `report` to folder/report.json; NaN and infinity become null."""
    path = folder / REPORT_FILE
    text = json.dumps(_finite(report), indent=2, ensure_ascii=False, allow_nan=False)
    # Put lists of numbers on one line; line breaks within strings are escaped, so none match.
    text = re.sub(r"\[\n[-+.\deE,\s]+\]", lambda found: " ".join(found[0].split()), text)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def read_report(folder: Path) -> dict[str, Any]:
    """Read folder/report.json.

    Raises:
        ValueError: the report has another schema.
    """
    report: dict[str, Any] = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    if report.get("schema") != SCHEMA:
        raise ValueError(
            f"'{folder / REPORT_FILE}' has schema {report.get('schema')}, and this version reads "
            f"schema {SCHEMA}: run the command again."
        )
    return report


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
