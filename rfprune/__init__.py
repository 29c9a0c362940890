"""Structured pruning of Hugging Face Transformers without retraining.

    from rfprune import Constraint, prune

    result = prune(model, batches, Constraint("mac", 0.5))
    result.save("smaller", tokenizer)

Names are imported on first use, so `import rfprune` and `rfprune --help` take no time.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rfprune.cost.constraint import Constraint
    from rfprune.cost.sizes import Sizes
    from rfprune.cost.sparsity import MapSparsity
    from rfprune.errors import RfpruneWarning, UserError
    from rfprune.latency.promise import LatencyPromise
    from rfprune.latency.table import LatencyTable
    from rfprune.methods.removal import remove_units
    from rfprune.model.batch import Batch
    from rfprune.model.checkpoint import load_pruned, save_pruned
    from rfprune.model.layout import Block, Layout
    from rfprune.model.masks import Masks
    from rfprune.pruning import prune, prune_family
    from rfprune.result import PruneResult
    from rfprune.settings import Settings
    from rfprune.stages.objective import Loss
    from rfprune.stages.optimal_brain_surgeon import ErrorCurve
    from rfprune.tasks.seq2seq import generate_targets
    from rfprune.vocabulary.counting import PieceChanges
    from rfprune.vocabulary.trim import TrimmedVocabulary, trim_vocabulary

__all__ = [
    "Batch",
    "Block",
    "Constraint",
    "ErrorCurve",
    "LatencyPromise",
    "LatencyTable",
    "Layout",
    "Loss",
    "MapSparsity",
    "Masks",
    "PieceChanges",
    "PruneResult",
    "RfpruneWarning",
    "Settings",
    "Sizes",
    "TrimmedVocabulary",
    "UserError",
    "__version__",
    "generate_targets",
    "load_pruned",
    "prune",
    "prune_family",
    "remove_units",
    "save_pruned",
    "trim_vocabulary",
]

_MODULES = {
    "Batch": "rfprune.model.batch",
    "Block": "rfprune.model.layout",
    "Constraint": "rfprune.cost.constraint",
    "ErrorCurve": "rfprune.stages.optimal_brain_surgeon",
    "LatencyPromise": "rfprune.latency.promise",
    "LatencyTable": "rfprune.latency.table",
    "Layout": "rfprune.model.layout",
    "Loss": "rfprune.stages.objective",
    "MapSparsity": "rfprune.cost.sparsity",
    "Masks": "rfprune.model.masks",
    "PieceChanges": "rfprune.vocabulary.counting",
    "PruneResult": "rfprune.result",
    "RfpruneWarning": "rfprune.errors",
    "Settings": "rfprune.settings",
    "Sizes": "rfprune.cost.sizes",
    "TrimmedVocabulary": "rfprune.vocabulary.trim",
    "UserError": "rfprune.errors",
    "generate_targets": "rfprune.tasks.seq2seq",
    "load_pruned": "rfprune.model.checkpoint",
    "prune": "rfprune.pruning",
    "prune_family": "rfprune.pruning",
    "remove_units": "rfprune.methods.removal",
    "save_pruned": "rfprune.model.checkpoint",
    "trim_vocabulary": "rfprune.vocabulary.trim",
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
