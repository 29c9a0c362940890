"""Save a pruned model so that others can load it, and load one without running its code.

A saved folder holds config.json, model.safetensors, modeling_rfprune.py (the model's own code, for
`trust_remote_code=True`) and masks.safetensors (which units of the model that was pruned were kept).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from rfprune.errors import UserError
from rfprune.model.architectures import ARCHITECTURES
from rfprune.model.layout import Layout
from rfprune.model.modeling_rfprune import FORMAT_VERSION, pruned_class

MASKS_FILE = "masks.safetensors"


def save_pruned(
    model: PreTrainedModel, layout: Layout, masks: Sequence[Tensor], folder: Path, tokenizer: Any = None
) -> None:
    """Write a pruned model, its masks and its tokenizer to `folder`.

    Args:
        layout: of the model that was pruned, to which `masks` (one (U,) per block) belong.

    Raises:
        UserError: the model's class is not one of transformers', so nobody could load the checkpoint.
    """
    base = type(model).__name__.removeprefix("Pruned")
    if not hasattr(transformers, base):
        raise UserError(
            f"class '{base}' is not part of transformers, so a saved checkpoint could not be loaded; "
            "load the model with transformers' own class before pruning it"
        )
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    named = {block.name: mask.contiguous() for block, mask in zip(layout.blocks, masks, strict=True)}
    save_file(named, folder / MASKS_FILE, metadata={"format_version": str(FORMAT_VERSION)})


def load_pruned(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a pruned model from a local folder without executing any code that it carries.

    Args:
        kwargs: passed on to `from_pretrained` (dtype, device_map, attn_implementation, ...).

    Raises:
        UserError: the folder, its config.json or its weights are missing, damaged, newer than this version of
            rfprune, or do not fit together; the sentence says which.
    """
    folder = Path(folder)
    config = _read_config(folder)
    description = config.get("rfprune")
    check_description(description, folder)
    name = str((config.get("architectures") or [""])[0]).removeprefix("Pruned")
    base = getattr(transformers, name, None)
    if config.get("model_type") not in ARCHITECTURES or not _is_model_class(base):
        raise UserError(
            f"'{folder}' names the architecture '{name}' of type '{config.get('model_type')}', which is not a "
            f"supported class of transformers {transformers.__version__}; install the version that it was saved with"
        )
    _check_shapes(folder, description)
    try:
        return pruned_class(base).from_pretrained(folder, use_safetensors=True, **kwargs)  # type: ignore[no-any-return,attr-defined]
    except (OSError, ValueError, RuntimeError, SafetensorError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the pruned model in '{folder}' cannot be loaded ({reason}); save or download it again")


def load_masks(folder: str | Path) -> dict[str, Tensor]:
    """The masks of a saved pruned model, (U,) per block, named like "layer.0.heads".

    Raises:
        UserError: the file is missing, damaged or of another format version.
    """
    path = Path(folder) / MASKS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            version = (file.metadata() or {}).get("format_version")
            if version != str(FORMAT_VERSION):
                raise UserError(f"'{path}' has format version {version}, this rfprune reads {FORMAT_VERSION}; upgrade")
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{path}' cannot be read ({error}); prune the model again to write it") from error


def _is_model_class(candidate: Any) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, PreTrainedModel)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"'{folder}' is not a folder; give the folder of a pruned model")
    if not path.is_file():
        raise UserError(f"'{folder}' has no config.json; give the folder of a pruned model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"'{path}' is not readable JSON ({error}); save or download the model again") from error
    if not isinstance(config, dict):
        raise UserError(f"'{path}' does not hold a JSON object; save or download the model again")
    return config


_BLOCK_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "kind": str,
    "layer": int,
    "num_units": int,
    "unit_width": int,
    "units": (list, type(None)),
    "producers": list,
    "consumer": str,
    "inner": str,
    "inner_returns_tuple": bool,
    "shared_position_bias": bool,
}


def check_description(description: Any, folder: Path) -> None:
    """Check the entry "rfprune" of a config.json.

    Raises:
        UserError: it is missing, malformed, or of a format version that this rfprune does not read.
    """
    where = f"the entry 'rfprune' of '{folder / 'config.json'}'"
    if not isinstance(description, dict):
        raise UserError(f"{where} is missing, so this is not a pruned model; load it with from_pretrained instead")
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{where} has format version {version!r} but this rfprune reads version {FORMAT_VERSION}; upgrade rfprune"
        )
    blocks = description.get("blocks")
    if not isinstance(blocks, list):
        raise UserError(f"{where} has no list of blocks; save or download the model again")
    for block in blocks:
        for field, kind in _BLOCK_FIELDS.items():
            if not isinstance(block, dict) or not isinstance(block.get(field), kind):
                raise UserError(f"{where} has a block with a bad '{field}': {block!r:.80}; download the model again")
        if block["num_units"] < 0 or block["unit_width"] < 1:
            raise UserError(f"{where} gives '{block['consumer']}' a negative size; save or download the model again")


def _check_shapes(folder: Path, description: dict[str, Any]) -> None:
    path = folder / "model.safetensors"
    if not path.is_file():  # sharded, or missing: from_pretrained says which
        return
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            for block in description["blocks"]:
                key = f"{block['consumer']}.weight"
                shape = list(file.get_slice(key).get_shape()) if key in keys else [0, 0]
                expected = block["num_units"] * block["unit_width"]
                if shape[1] != expected:
                    raise UserError(
                        f"'{key}' in '{path}' has {shape[1]} columns but config.json promises {expected}; "
                        "the two files are not of the same model: save or download it again"
                    )
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{path}' is damaged or not safetensors ({error}); save or download it again") from error
