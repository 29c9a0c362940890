"""Saves a tokenizer so that transformers 4 and tools built on it read it, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_CONFIG_FILE = "tokenizer_config.json"
_NAMES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Classes of transformers 5 by the names under which both versions know them."""


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Write a tokenizer, or an image processor, to a folder.

    transformers 5 renamed its general class of fast tokenizers. It reads the earlier name as well,
    and version 4 reads no other: optimum, whose releases need version 4, would not load the folder.
    """
    tokenizer.save_pretrained(folder)
    path = Path(folder) / _CONFIG_FILE
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    name = config.get("tokenizer_class")
    if name in _NAMES:
        config["tokenizer_class"] = _NAMES[name]
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
