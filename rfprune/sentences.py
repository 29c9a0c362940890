"""Embedders as sentence-transformers saves them: where the model is, and how it pools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rfprune.embeddings import POOLINGS
from rfprune.errors import UserError

_MODULES = "modules.json"
_MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


def transformer_folder(folder: Path) -> Path:
    """Where the config.json is: in the folder, or in that of its first module."""
    modules = _read(folder / _MODULES)
    if (folder / "config.json").is_file() or not isinstance(modules, list) or not modules:
        return folder
    return folder / str(modules[0].get("path", ""))


def pooling_in(source: str) -> str | None:
    """The pooling that stands beside the model, one of `POOLINGS`; None where none does.

    Raises:
        UserError: it is another one.
    """
    folders = [Path(source), Path(source).parent]
    beside = [path for folder in folders for path in sorted(folder.glob("*_Pooling/config.json"))]
    settings = _read(beside[0]) if beside else None
    if not isinstance(settings, dict):
        return None
    modes = [
        name for name, on in settings.items() if name.startswith("pooling_mode") and on is True
    ]
    modes = modes or [f"pooling_mode_{settings.get('pooling_mode')}_token"]
    if len(modes) != 1 or modes[0] not in _MODES:
        raise UserError(
            f"'{beside[0]}' asks for {' and '.join(modes)}, but embeddings are made here by one "
            f"of {', '.join(POOLINGS)}: choose another checkpoint."
        )
    return _MODES[modes[0]]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
