"""A saved tokenizer names a class that transformers 4 knows, too.

Without this test optimum and servers on transformers 4 refuse the folder.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from rfprune.model.saved_tokenizer import save_tokenizer


def test_the_class_has_its_name_of_both_versions(
    tiny_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "plain")
    save_tokenizer(tokenizer, tmp_path / "saved")
    configs = [
        json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        for name in ("plain", "saved")
    ]
    assert configs[1] == configs[0] | {"tokenizer_class": "PreTrainedTokenizerFast"}
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "a warm film ."
    assert loaded(text, "bad")["input_ids"] == tokenizer(text, "bad")["input_ids"]
    assert type(loaded) is type(AutoTokenizer.from_pretrained(tmp_path / "plain"))
