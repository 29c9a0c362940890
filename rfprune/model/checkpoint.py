"""Save a pruned model, and load one without running code from its folder.

A saved folder holds config.json, model.safetensors, modeling_rfprune.py (the model's own code, for
`trust_remote_code=True`) and masks.safetensors (which units of the original were kept). A plain
model (see `rfprune.model.plain`) has no code of its own; its masks file marks it as plain.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from rfprune.errors import UserError
from rfprune.families.architectures import ARCHITECTURES
from rfprune.families.schema import SizeEntries
from rfprune.model.compact import family_entries
from rfprune.model.layout import Layout
from rfprune.model.modeling_rfprune import check_description, pruned_class
from rfprune.model.original_class import original_class

MASKS_FILE = "masks.safetensors"
MASKS_VERSION = 1


def save_pruned(
    model: PreTrainedModel,
    layout: Layout,
    masks: Sequence[Tensor],
    folder: str | Path,
    tokenizer: Any = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Save a pruned model, its masks and its tokenizer.

    `AutoModel...from_pretrained(folder, trust_remote_code=True)` loads the folder, and so does
    `load_pruned` without remote code. `PruneResult.save` calls this function.

    Args:
        model: pruned, from `compact` or `PruneResult.model`.
        layout: of the original model (`PruneResult.layout`).
        masks: of `layout`, one float vector (U,) per block (`PruneResult.masks`).
        folder: created if it does not exist.
        tokenizer: or an image processor, saved beside the model; None to save the model alone.
        dtype: of the stored weights. config.json keeps the model's own dtype, in which the weights
            are loaded again.

    Raises:
        UserError: the model's class is not part of transformers, so nothing could load the folder.

    Example:
        >>> result = prune(model, batches, Constraint("mac", 0.5))
        >>> save_pruned(result.model, result.layout, result.masks, "smaller", tokenizer)
    """
    base = original_class(model)
    if getattr(transformers, base.__name__, None) is not base:
        raise UserError(
            f"class '{base.__name__}' is not part of transformers, so a saved checkpoint could not "
            "be loaded; load the model with transformers' own class before pruning it"
        )
    model.save_pretrained(folder, state_dict=None if dtype is None else stored_state(model, dtype))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    named = {
        block.name: mask.detach().clone() for block, mask in zip(layout.blocks, masks, strict=True)
    }
    metadata = {"format_version": str(MASKS_VERSION)}
    if getattr(model.config, "rfprune", None) is None:
        metadata["plain"] = "true"
    save_file(named, Path(folder) / MASKS_FILE, metadata=metadata)


def stored_state(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """A model's state with floating-point weights in `dtype`; tied weights stay tied."""
    converted: dict[object, Tensor] = {}
    stored = {}
    for name, value in model.state_dict().items():
        key = (value.data_ptr(), value.shape, value.stride()) if value.numel() else name
        if key not in converted:
            converted[key] = value.to(dtype) if value.is_floating_point() else value
        stored[name] = converted[key]
    return stored


def load_pruned(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a pruned model from a local folder without executing code from it.

    Args:
        folder: written by `save_pruned`, `PruneResult.save` or the command.
        kwargs: passed to `from_pretrained` (dtype, device_map, attn_implementation, ...).

    Returns:
        The model in evaluation mode, of a subclass of its original class with the same name.

    Raises:
        UserError: the folder, its config.json or its weights are missing, damaged, newer than this
            version of rfprune, or do not fit together; the message says which.

    Example:
        >>> model = load_pruned("smaller", dtype=torch.bfloat16)
        >>> model(**tokenizer("A fine film.", return_tensors="pt")).logits
    """
    folder = Path(folder)
    config = _read_config(folder)
    plain = _is_plain(config, folder)
    blocks = [] if plain else _described_blocks(config, folder)
    base = _base_class(config, folder)
    _check_family(blocks, config["model_type"], folder)
    _check_readable(folder)
    try:
        with _no_report():
            model_class = base if plain else pruned_class(base)
            model, info = model_class.from_pretrained(
                folder,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below
                **kwargs,
            )
    except (OSError, ValueError, RuntimeError, AttributeError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the pruned model in '{folder}' cannot be loaded ({reason}); save or download it again"
        ) from error
    if info["mismatched_keys"]:
        name, saved, promised = min(info["mismatched_keys"], key=lambda entry: str(entry[0]))
        raise UserError(
            f"'{name}' in '{folder}' has the shape {tuple(saved)}, but config.json says "
            f"{tuple(promised)}; the two files are not of the same model: save or download them "
            "again"
        )
    if info["missing_keys"]:
        raise UserError(
            f"the weights in '{folder}' lack '{min(info['missing_keys'])}', which config.json "
            "requires; save or download the model again"
        )
    if info["unexpected_keys"]:
        raise UserError(
            f"the weights in '{folder}' hold '{min(info['unexpected_keys'])}', for which "
            "config.json has no place; the two files are not of the same model: save or download "
            "them again"
        )
    return model


def load_masks(folder: str | Path) -> dict[str, Tensor]:
    """Load the masks of a saved pruned model.

    Returns:
        A vector (U,) per block of the original, by names such as "layer.0.heads".

    Raises:
        UserError: the file is missing, damaged, of another format version, or does not fit the
            config.json beside it.
    """
    path = Path(folder) / MASKS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            version = (file.metadata() or {}).get("format_version")
            masks = {key: file.get_tensor(key) for key in list(file.keys())}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"'{path}' cannot be read ({error}); prune the model again to write it"
        ) from error
    if version != str(MASKS_VERSION):
        raise UserError(
            f"'{path}' has format version {version}, but this rfprune reads {MASKS_VERSION}; "
            "upgrade rfprune, or prune the model again"
        )
    _check_masks(masks, path)
    return masks


def _check_masks(masks: dict[str, Tensor], path: Path) -> None:
    """Compare the number of units that each mask keeps with config.json."""
    config = _read_config(path.parent)
    if _is_plain(config, path.parent):
        sizes = _plain_sizes(config)
        kept = {name: sizes.get(name.rpartition(".")[2]) for name in masks}
    else:
        blocks = _described_blocks(config, path.parent)
        kept = {block["name"]: block["num_units"] for block in blocks}
    for name in sorted(kept.keys() | masks.keys()):
        mask = masks.get(name)
        found = None if mask is None or mask.dim() != 1 else int((mask != 0).sum())
        if found is None or found != kept.get(name):
            raise UserError(
                f"'{name}' in '{path}' keeps {'nothing' if found is None else found} where "
                f"config.json has {kept.get(name, 'no such block')}; the two files are not of the "
                "same model: prune the original again, or download both files again"
            )


def _is_plain(config: dict[str, Any], folder: Path) -> bool:
    """Whether a folder holds a plain model, which its masks file is marked with."""
    row = ARCHITECTURES.get(str(config.get("model_type")))
    if "rfprune" in config or row is None or row.size_entries is None:
        return False
    try:
        with safe_open(folder / MASKS_FILE, framework="pt") as file:
            return (file.metadata() or {}).get("plain") == "true"
    except (OSError, SafetensorError):
        return False


def _plain_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """The sizes in the config.json of a plain model, by the last part of a block's name."""
    entries = ARCHITECTURES[config["model_type"]].size_entries or SizeEntries()
    common = "num_attention_heads"  # some families have another name for it in the file
    own = transformers.CONFIG_MAPPING[config["model_type"]].attribute_map.get(common, common)
    names = (*entries.heads, own)
    heads = next((config[name] for name in names if config.get(name) is not None), None)
    return {"heads": heads, "cross_heads": heads, "neurons": config.get(entries.neurons)}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"'{folder}' is not a folder; give the folder of a pruned model")
    if not path.is_file():
        raise UserError(f"'{folder}' has no config.json; give the folder of a pruned model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(
            f"'{path}' is not readable JSON ({error}); save or download the model again"
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"'{path}' does not hold a JSON object; save or download the model again")
    return config


def _described_blocks(config: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    try:
        return check_description(config.get("rfprune"))
    except ValueError as error:
        raise UserError(
            f"'{folder / 'config.json'}' is not of a pruned model that this rfprune can load: "
            f"{error}"
        ) from error


def _check_family(blocks: list[dict[str, Any]], model_type: str, folder: Path) -> None:
    """Compare the entries of blocks with the row of the family."""
    stacks = ARCHITECTURES[model_type].stacks
    for stack, sublayer in ((one, each) for one in stacks for each in one.sublayers):
        pattern = re.compile(
            rf"(.*\.)?{re.escape(stack.layers)}\.\d+\.{re.escape(sublayer.consumer)}"
        )
        known = {"kind": sublayer.kind, **family_entries(sublayer)}
        for block in (block for block in blocks if pattern.fullmatch(block["consumer"])):
            for field in (field for field in known if block[field] != known[field]):
                raise UserError(
                    f"'{folder / 'config.json'}' has {field}={block[field]!r} for "
                    f"'{block['name']}', where that of a {model_type} model is {known[field]!r}; "
                    "save or download the model again"
                )


@contextmanager
def _no_report() -> Iterator[None]:
    """Silence transformers' report of missing and unexpected weights; our errors name them."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _base_class(config: dict[str, Any], folder: Path) -> Any:
    """The class of the original model."""
    names = config.get("architectures")
    name = str(names[0] if isinstance(names, list) and names else None)
    name = name.removeprefix("Pruned")  # the name in early outputs of 0.1.0
    base: Any = getattr(transformers, name, None)
    is_model = isinstance(base, type) and issubclass(base, PreTrainedModel)
    if base is None or not is_model or config.get("model_type") not in ARCHITECTURES:
        raise UserError(
            f"'{folder}' names the architecture '{name}' of type '{config.get('model_type')}', "
            f"which is not a supported class of transformers {transformers.__version__}; install "
            "the version that it was saved with"
        )
    return base


def _check_readable(folder: Path) -> None:
    """Check the weights file before a model is made."""
    path = folder / "model.safetensors"
    if not path.is_file():  # sharded or missing: from_pretrained reports it
        return
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"'{path}' is damaged or not safetensors ({error}); save or download it again"
        ) from error
