"""The files beside a checkpoint that go along with the pruned model, for every task.

The rule, in one place:

- Written anew from what was loaded: config.json, generation_config.json, weights, tokenizer and
  image processor. These always win.
- Copied as they are: `COPIED`, further files of tokenizers and processors, chat templates and
  generation settings; and the files of sentence-transformers (modules.json and what it lists,
  config_sentence_transformers.json with prompts and activation, sentence_bert_config.json).
- Left behind, since they describe the original or are not read by a loader: README, weights in
  other formats (pickles, ONNX, OpenVINO, GGUF), training state, adapters, and everything else.
- Left behind after --vocabulary: the vocabularies among the copied files, which hold all tokens.
- Left behind with a warning: the checkpoint's own code. It is never run, so the pruned model is one
  of transformers' classes; see `rfprune.checkpoints.loading`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from rfprune.checkpoints.sentence_transformers import (
    is_inside,
    read_sentence_transformer_files,
)
from rfprune.errors import RfpruneWarning

_VOCABULARIES = (
    *("vocab.txt", "vocab.json", "merges.txt", "bpe.codes", "dict.txt", "entity_vocab.json"),
    *("*.model", "*.spm", "*.tiktoken", "added_tokens.json"),
)
COPIED = (
    # vocabularies, for tokenizers that do not read tokenizer.json
    *_VOCABULARIES,
    "special_tokens_map.json",
    # processors of images, texts and both
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    # chat and generation
    *("generation_config.json", "chat_template.json", "chat_template.jinja"),
    *("chat_templates/*.jinja", "additional_chat_templates/*.jinja"),
)
"""Patterns of the copied files, within the folder of the checkpoint."""


def read_companion_files(source: str) -> dict[str, bytes]:
    """Read the files that go along with the pruned model, by path within its folder.

    Args:
        source: the folder of a checkpoint, or its hub id.

    Raises:
        UserError: a file of sentence-transformers is damaged, leads out of the folder, or lists a
            module that is not one of the library's.
    """
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source, allow_patterns=["config.json", *COPIED]))
    paths = {path for pattern in COPIED for path in folder.glob(pattern) if path.is_file()}
    linked = sorted(path.name for path in paths if not is_inside(path, folder))
    if linked:
        warnings.warn(
            f"'{linked[0]}' in '{source}' is a link that leads out of its folder, and is not "
            "copied: put the file there instead",
            RfpruneWarning,
            stacklevel=2,
        )
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(paths)
        if path.name not in linked
    }
    return files | read_sentence_transformer_files(source)


def without_vocabularies(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files without those that hold all tokens, or ids, of a model that has fewer now."""
    holds_ids = (*_VOCABULARIES, "generation_config.json")
    return {
        name: content
        for name, content in files.items()
        if not any(fnmatch(name, pattern) for pattern in holds_ids)
    }


def write_companion_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write the files into the folder of a pruned model; files that are there already stay."""
    for name, content in files.items():
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
