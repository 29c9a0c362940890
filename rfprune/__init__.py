"""Structured pruning of Hugging Face Transformers without retraining.

    result = prune(model, batches, Constraint("mac", 0.5))

Names are imported when first used, so `import rfprune` and `rfprune --help` answer at once.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rfprune.cost.constraint import Constraint
    from rfprune.errors import RfpruneWarning, UserError
    from rfprune.latency.table import LatencyTable
    from rfprune.model.checkpoint import load_pruned, save_pruned
    from rfprune.pruning import prune, prune_family
    from rfprune.result import PruneResult
    from rfprune.settings import Settings

__all__ = [
    "Constraint",
    "LatencyTable",
    "PruneResult",
    "RfpruneWarning",
    "Settings",
    "UserError",
    "__version__",
    "load_pruned",
    "prune",
    "prune_family",
    "save_pruned",
]

_MODULES = {
    "Constraint": "rfprune.cost.constraint",
    "LatencyTable": "rfprune.latency.table",
    "PruneResult": "rfprune.result",
    "RfpruneWarning": "rfprune.errors",
    "Settings": "rfprune.settings",
    "UserError": "rfprune.errors",
    "load_pruned": "rfprune.model.checkpoint",
    "prune": "rfprune.pruning",
    "prune_family": "rfprune.pruning",
    "save_pruned": "rfprune.model.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("rfprune")
    if name not in _MODULES:
        raise AttributeError(f"module 'rfprune' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
