"""What lies beside a checkpoint goes along with the pruned model, or stays behind, by one rule.

Without these tests a pruned reranker would score on another scale, a chat model would lose its
template, and training state or a README of the original would be published with the pruned model.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rfprune.checkpoints.companion_files import read_companion_files, write_companion_files
from rfprune.checkpoints.sentence_transformers import is_reranker, pools
from rfprune.errors import RfpruneWarning, UserError

GO_ALONG = (
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "source.spm", "added_tokens.json"),
    *("special_tokens_map.json", "preprocessor_config.json", "processor_config.json"),
    *("generation_config.json", "chat_template.jinja", "chat_template.json"),
    *("additional_chat_templates/tool_use.jinja", "config_sentence_transformers.json"),
)
STAY = (
    *("README.md", "model.safetensors", "pytorch_model.bin", "model.onnx", "onnx/model.onnx"),
    *("openvino/openvino_model.xml", "model.gguf", "trainer_state.json", "training_args.bin"),
    *("optimizer.pt", "rng_state.pth", "modeling_own.py", "adapter_config.json", "notes.txt"),
    *(".env", "model.safetensors.index.json", "runs/events.out", "report.json", "config.json"),
)


def folder_with(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def reranker(folder: Path, settings: str = '{"model_type": "CrossEncoder"}') -> Path:
    entry = {"idx": 0, "path": "", "type": "sentence_transformers.base.modules.X.Transformer"}
    folder_with(folder, "sentence_bert_config.json")
    (folder / "modules.json").write_text(json.dumps([entry]))
    (folder / "config_sentence_transformers.json").write_text(settings)
    return folder


def test_what_loaders_read_goes_along_and_nothing_else(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, *GO_ALONG, *STAY)
    assert read_companion_files(str(folder)).keys() == set(GO_ALONG)


def test_files_that_were_saved_with_the_model_win(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "vocab.txt")
    write_companion_files({"vocab.txt": b"old", "templates/a.jinja": b"new"}, folder)
    assert (folder / "vocab.txt").read_text() == "{}"
    assert (folder / "templates" / "a.jinja").read_text() == "new"


def test_a_reranker_keeps_its_activation_and_prompts(tmp_path: Path) -> None:
    files = read_companion_files(str(reranker(tmp_path)))
    assert files.keys() == {
        *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
    }
    assert is_reranker(files)
    assert not pools(files)


def test_damaged_settings_of_a_reranker_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config_sentence_transformers\.json' .* not JSON"):
        read_companion_files(str(reranker(tmp_path, "{")))


def test_a_link_out_of_the_folder_is_not_copied(tmp_path: Path) -> None:
    """What is copied may be published."""
    folder = folder_with(tmp_path / "model", "vocab.json")
    (tmp_path / "secret").write_text("secret")
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.warns(RfpruneWarning, match=r"'vocab\.txt' .* leads out of its folder"):
        assert read_companion_files(str(folder)).keys() == {"vocab.json"}
