"""Save a pruned model, and load one without running code from its folder.

A saved folder holds config.json, model.safetensors, modeling_rfprune.py (the model's own code, for
`trust_remote_code=True`) and pruning/masks.safetensors (which units of the original were kept). A
plain model (see `rfprune.model.plain`) has no code of its own; its masks file marks it as plain.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from rfprune.errors import RfpruneWarning, UserError, as_path, error_summary
from rfprune.families.architectures import ARCHITECTURES
from rfprune.model.compact import family_entries
from rfprune.model.layout import Layout, layout_of
from rfprune.model.modeling_rfprune import check_description, is_of_transformers, pruned_class
from rfprune.model.rebuild import check_rebuildable, init_options
from rfprune.model.residency import is_offloaded, offloaded_ties
from rfprune.model.saved_tokenizer import save_tokenizer
from rfprune.model.weight_store import reading_as

MASKS_FILE = "pruning/masks.safetensors"
"""Not beside the weights: servers such as vLLM load every *.safetensors that is there."""

EARLIER_MASKS_FILE = "masks.safetensors"
MASKS_VERSION = 1

LEAST_SHARD_BYTES = 2**20
"""No file of an offloaded model is divided further."""


def save_pruned(
    model: PreTrainedModel,
    layout: Layout,
    masks: Sequence[Tensor],
    folder: str | Path,
    tokenizer: Any = None,
    *,
    removed_layers: Sequence[int] = (),
    dtype: torch.dtype | None = None,
) -> None:
    """Save a pruned model, its masks and its tokenizer.

    `AutoModel...from_pretrained(folder, trust_remote_code=True)` loads the folder, and so does
    `load_pruned` without remote code. `PruneResult.save` calls this function.

    A README.md in the folder says how to load it.

    Args:
        model: pruned, from `compact` or `PruneResult.model`.
        layout: of the original model (`PruneResult.layout`).
        masks: of `layout`, one float vector (U,) per block (`PruneResult.masks`).
        folder: created if it does not exist.
        tokenizer: or an image processor, saved beside the model; None to save the model alone.
        removed_layers: of `layout` (`PruneResult.removed_layers`).
        dtype: of the stored weights. config.json keeps the model's own dtype, in which the weights
            are loaded again.

    Raises:
        UserError: the model's class makes other weights from its configuration, so nothing could
            load the folder.

    Example:
        >>> result = prune(model, batches, Constraint("mac", 0.5))
        >>> save_pruned(result.model, result.layout, result.masks, "smaller", tokenizer)
    """
    folder = as_path(folder, "folder")
    check_rebuildable(model)
    check_saved_parts(tokenizer, dtype)
    if [block.num_units for block in layout.blocks] != [len(mask) for mask in masks]:
        raise UserError(
            f"the {len(masks)} masks do not fit the {len(layout.blocks)} blocks of the layout; "
            "give the layout and the masks of one PruneResult"
        )
    if is_offloaded(model):
        _save_offloaded(model, folder, dtype)
    else:
        state = None if dtype is None else stored_state(model, dtype)
        model.save_pretrained(folder, state_dict=state)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    readme = Path(folder) / "README.md"
    if not readme.exists():
        readme.write_text(_how_to_load(model), encoding="utf-8")
    named = {
        block.name: mask.detach().clone() for block, mask in zip(layout.blocks, masks, strict=True)
    }
    metadata = {"format_version": str(MASKS_VERSION)}
    if getattr(model.config, "rfprune", None) is None:
        metadata["plain"] = "true"
    if removed_layers:
        metadata["removed_layers"] = " ".join(map(str, removed_layers))
    path = folder / MASKS_FILE
    path.parent.mkdir(exist_ok=True)
    save_file(named, path, metadata=metadata)


def _save_offloaded(model: PreTrainedModel, folder: Path, dtype: torch.dtype | None) -> None:
    """Save a model that is never whole in memory, in shards of the size of its largest layer."""
    ties = offloaded_ties(model)
    dtype = dtype or model.dtype
    state = {name: value for name, value in stored_state(model, dtype).items() if name not in ties}
    layers = [model.get_submodule(path) for path in layout_of(model).layers]
    sizes = [sum(weight.numel() for weight in layer.parameters()) for layer in layers]
    with reading_as(model, dtype), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
        size = max(dtype.itemsize * max(sizes), LEAST_SHARD_BYTES)
        model.save_pretrained(folder, state_dict=state, max_shard_size=size)


def check_saved_parts(tokenizer: Any, dtype: Any) -> None:
    """Check what is saved with a model, before anything is written.

    Raises:
        UserError: the tokenizer cannot be saved, or weights cannot be stored in this dtype.
    """
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise UserError(
            f"tokenizer is a {type(tokenizer).__name__}, which has no save_pretrained(); give the "
            "loaded tokenizer or image processor"
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UserError(
            f"dtype {dtype!r:.60} cannot store weights; give a dtype of floating-point numbers, "
            "such as torch.float16"
        )


def _how_to_load(model: PreTrainedModel) -> str:
    """The README of a saved folder."""
    name, auto_class = type(model).__name__, getattr(model, "_auto_class", None)
    title = f"# {name}, pruned by rfprune\n\n"
    if getattr(model.config, "rfprune", None) is None:
        return title + f'A plain architecture: `{name}.from_pretrained("this folder")` loads it.\n'
    if not is_of_transformers(type(model)):
        return (
            title + f'`rfprune.load_pruned("this folder", model_class={name})` loads it; {name} is '
            "not a class of transformers.\n"
        )
    return title + (
        "```python\n"
        f"from transformers import {auto_class}\n\n"
        f'model = {auto_class}.from_pretrained("this folder", trust_remote_code=True)\n'
        "```\n\n"
        "runs the model's own code, modeling_rfprune.py: one short file; read it first. With "
        'rfprune installed, `rfprune.load_pruned("this folder")` loads the model without it.\n\n'
        "Without `trust_remote_code=True`, transformers makes a model of the original sizes, "
        "reports weights of other shapes (MISMATCH) and stops.\n"
    )


def stored_state(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """A model's state with floating-point weights in `dtype`; tied weights stay tied."""
    converted: dict[object, Tensor] = {}
    stored = {}
    for name, value in model.state_dict().items():
        is_here = value.numel() and not value.is_meta
        key = (value.data_ptr(), value.shape, value.stride()) if is_here else name
        if key not in converted:
            converted[key] = value.to(dtype) if value.is_floating_point() else value
        stored[name] = converted[key]
    return stored


def load_pruned(folder: str | Path, *, model_class: Any = None, **kwargs: Any) -> PreTrainedModel:
    """Load a pruned model from a local folder without executing code from it.

    Args:
        folder: written by `save_pruned`, `PruneResult.save`, the command, or `save_pretrained` of a
            pruned model.
        model_class: the class of the unpruned model, or an Auto class. Needed for a class of your
            own. Another class of the same model type adds its head to the Transformer. None: the
            class that was saved.
        kwargs: passed to `from_pretrained` (dtype, device_map, attn_implementation, ...).

    Returns:
        The model in evaluation mode; its class is a subclass of the original one, of the same name.

    Raises:
        UserError: the folder, its config.json or its weights are missing or damaged, come from a
            newer version of rfprune, or do not match each other or `model_class`; the message says
            which.

    A `RfpruneWarning` names the weights of a new head, which are random until they are trained.

    Example:
        >>> model = load_pruned("smaller", dtype=torch.bfloat16)
        >>> model(**tokenizer("A fine film.", return_tensors="pt")).logits
        >>> from transformers import AutoModel
        >>> encoder = load_pruned("smaller", model_class=AutoModel)
    """
    folder = as_path(folder, "folder")
    config = _read_config(folder)
    plain = _is_plain(config, folder)
    blocks = [] if plain else _described_blocks(config, folder)
    base = _base_class(config, folder, model_class)
    _check_family(blocks, config["model_type"], folder)
    options = init_options(base, _names_of_weights(folder)) | kwargs
    new_head = options.pop("ignore_mismatched_sizes", False) is True
    try:
        with _no_report():
            loaded_class = base if plain else pruned_class(base)
            model, info = loaded_class.from_pretrained(
                folder,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below
                **options,
            )
    except Exception as error:  # models and their arguments raise errors of many types
        if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
            raise
        way_out = "save or download it again"
        if isinstance(error, ImportError):
            way_out = "install what is missing, or choose another attn_implementation"
        elif kwargs:
            way_out = f"correct the arguments ({', '.join(sorted(kwargs))}), or {way_out}"
        raise UserError(
            f"the pruned model in '{folder}' cannot be loaded ({error_summary(error)}); {way_out}"
        ) from error
    other_class = base.__name__ != _saved_name(config)
    _check_loaded(model, info, folder, kwargs, other_head=other_class, new_head=new_head)
    return model


def _check_loaded(
    model: PreTrainedModel,
    info: Mapping[str, Any],
    folder: Path,
    options: Mapping[str, Any],
    *,
    other_head: bool,
    new_head: bool,
) -> None:
    """Refuse weights that do not fit; warn of weights of a new head.

    Args:
        info: what `from_pretrained` found.
        options: that `load_pruned` was given.
        other_head: the model has another class than the saved one.
        new_head: weights of the head may have other shapes in the folder.
    """
    layers = _layer_prefixes(model)
    mismatched = {str(name): shapes for name, *shapes in info["mismatched_keys"]}
    inside = sorted(name for name in mismatched if name.startswith(layers))
    if mismatched and (inside or not (new_head or other_head)):
        name = min(inside) if inside else max(mismatched)  # the weight rather than the bias
        saved, promised = mismatched[name]
        changed = sorted(each for each in options if hasattr(model.config, each))
        if changed and not inside:
            raise UserError(
                f"'{name}' in '{folder}' has the shape {tuple(saved)}, but {changed[0]}="
                f"{options[changed[0]]!r} makes {tuple(promised)}; leave {changed[0]} out, or pass "
                "ignore_mismatched_sizes=True for a new head"
            )
        raise UserError(
            f"'{name}' in '{folder}' has the shape {tuple(saved)}, but config.json says "
            f"{tuple(promised)}; the two files are not of the same model: save or download them "
            "again"
        )
    missing = sorted(str(name) for name in info["missing_keys"])
    lost = [name for name in missing if not other_head or name.startswith(layers)]
    if lost:
        raise UserError(
            f"the weights in '{folder}' lack '{lost[0]}', which config.json requires; save or "
            "download the model again"
        )
    if info["unexpected_keys"] and not other_head:
        raise UserError(
            f"the weights in '{folder}' hold '{min(info['unexpected_keys'])}', for which "
            "config.json has no place; the two files are not of the same model: save or download "
            "them again"
        )
    random = sorted([*missing, *mismatched])
    if random:
        number = f" and {len(random) - 1} more" if len(random) > 1 else ""
        warnings.warn(
            f"'{random[0]}'{number} of the {type(model).__name__} are not in '{folder}' and start "
            "untrained; train them before use",
            RfpruneWarning,
            stacklevel=3,
        )


def _layer_prefixes(model: PreTrainedModel) -> tuple[str, ...]:
    """What the names of the weights of Transformer layers start with."""
    start = "" if model.base_model is model else f"{model.base_model_prefix}."
    stacks = ARCHITECTURES[model.config.model_type].stacks
    return tuple(f"{start}{stack.layers}." for stack in stacks)


def _names_of_weights(folder: Path) -> list[str]:
    """The names of all weights, from the one file or the index of several.

    Raises:
        UserError: the file is damaged. A missing one is reported by `from_pretrained`.
    """
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    try:
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        if index.is_file():
            return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"'{path if path.is_file() else index}' is damaged or not safetensors ({error}); save "
            "or download it again"
        ) from error
    return []


def load_masks(folder: str | Path) -> dict[str, Tensor]:
    """Load the masks of a saved pruned model.

    Returns:
        A vector (U,) per block of the original, by names such as "layer.0.heads".

    Raises:
        UserError: the file is missing, damaged, of another format version, or does not fit the
            config.json beside it.
    """
    folder = as_path(folder, "folder")
    path = masks_path(folder)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            version = metadata.get("format_version")
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
    removed = {int(one) for one in metadata.get("removed_layers", "").split() if one.isdecimal()}
    _check_masks(masks, removed, folder, path)
    return masks


def masks_path(folder: Path) -> Path:
    """Where a folder has its masks; earlier versions of rfprune wrote them beside the weights."""
    earlier = folder / EARLIER_MASKS_FILE
    return earlier if earlier.is_file() else folder / MASKS_FILE


def _check_masks(
    masks: dict[str, Tensor], removed: Collection[int], folder: Path, path: Path
) -> None:
    """Compare the number of units that each mask keeps with config.json."""
    config = _read_config(folder)
    new_names = {name: _renumbered(name, removed) for name in masks}
    if _is_plain(config, folder):
        sizes = _plain_sizes(config)
        known = {
            new: sizes.get(name.rpartition(".")[2], len(masks[name]))
            for name, new in new_names.items()
            if new is not None
        }
    else:
        blocks = _described_blocks(config, folder)
        known = {block["name"]: block["num_units"] for block in blocks}
    kept: dict[str, int | None] = {
        name: 0 if new is None else known.pop(new, None) for name, new in new_names.items()
    }
    kept |= known
    for name in sorted(kept.keys() | masks.keys()):
        mask = masks.get(name)
        found = None if mask is None or mask.dim() != 1 else int((mask != 0).sum())
        if found is None or found != kept.get(name):
            expected = kept.get(name)
            raise UserError(
                f"'{name}' in '{path}' keeps {'nothing' if found is None else found} where "
                f"config.json has {'no such block' if expected is None else expected}; the two "
                "files are not of the same model: prune the original again, or download both files "
                "again"
            )


def _renumbered(name: str, removed: Collection[int]) -> str | None:
    """The name of a block once layers are removed; None in one of them."""
    _, number, kind = name.split(".")
    layer = int(number)
    return None if layer in removed else f"layer.{layer - sum(i < layer for i in removed)}.{kind}"


def _is_plain(config: Mapping[str, Any], folder: Path) -> bool:
    """Whether a folder holds a plain model, which its masks file is marked with."""
    if "rfprune" in config or config.get("model_type") not in ARCHITECTURES:
        return False
    try:
        with safe_open(masks_path(folder), framework="pt") as file:
            return (file.metadata() or {}).get("plain") == "true"
    except (OSError, SafetensorError):
        return False


def _plain_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """The sizes in the config.json of a plain model, by the last part of a block's name; empty in
    families without entries for them, whose plain models have lost layers and no units."""
    family = ARCHITECTURES[config["model_type"]]
    entries = family.size_entries
    if entries is None:
        return {}
    if any(row.one_unit for stack in family.stacks for row in stack.sublayers):
        return {"heads": 1, "neurons": config.get(entries.neurons)}
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


def _saved_name(config: Mapping[str, Any]) -> str:
    """Name of the class that was saved."""
    names = config.get("architectures")
    name = str(names[0] if isinstance(names, list) and names else None)
    return name.removeprefix("Pruned")  # the name in early outputs of 0.1.0


def _base_class(config: Mapping[str, Any], folder: Path, model_class: Any) -> Any:
    """The class of the original model, or the given one."""
    name, model_type = _saved_name(config), config.get("model_type")
    if model_class is not None and model_type in ARCHITECTURES:
        return _given_class(model_class, config, folder)
    description = config.get("rfprune")
    own = description.get("class") if isinstance(description, dict) else None
    if own:
        raise UserError(
            f"'{folder}' holds a model of the class '{own}', which is not one of transformers; "
            f"pass it, as in load_pruned(folder, model_class={name})"
        )
    base: Any = getattr(transformers, name, None)
    is_model = isinstance(base, type) and issubclass(base, PreTrainedModel)
    if base is None or not is_model or model_type not in ARCHITECTURES:
        raise UserError(
            f"'{folder}' names the architecture '{name}' of type '{model_type}', which is not a "
            f"supported class of transformers {transformers.__version__}; install the version that "
            "it was saved with, or pass your own class as model_class"
        )
    return base


def _given_class(model_class: Any, config: Mapping[str, Any], folder: Path) -> Any:
    """The unpruned class that the argument `model_class` names."""
    given, model_type = model_class, config["model_type"]
    mapping = getattr(model_class, "_model_mapping", None)
    if mapping is not None:
        model_class = mapping.get(transformers.CONFIG_MAPPING[model_type], None)
        model_class = model_class[0] if isinstance(model_class, tuple) else model_class
        if model_class is None:  # no Auto class has SiglipTextModel: the folder's entry names it
            entries = config.get("auto_map")
            entry = entries.get(given.__name__) if isinstance(entries, dict) else None
            model_class = getattr(transformers, str(entry).rpartition(".")[2], None)
    base = getattr(model_class, "pruned_from", model_class)
    fits = isinstance(base, type) and issubclass(base, PreTrainedModel)
    if not fits or getattr(base.config_class, "model_type", None) != model_type:
        raise UserError(
            f"model_class={getattr(given, '__name__', repr(given))} has no model of type "
            f"'{model_type}', which '{folder}' is; pass a class of transformers for this type, an "
            "Auto class that has it, or your own subclass of one"
        )
    return base
