"""A Transformer pruned by rfprune: the original class of transformers with smaller projections.

This file is saved beside the weights, so `from_pretrained(..., trust_remote_code=True)` needs no
package but transformers. It reads the sizes of the pruned sublayers from the entry "rfprune" of
config.json, checks them, and replaces the projections by smaller ones. It opens no files, makes no
connections and runs no other code.

A block is one attention or FFN. Its units are heads or neurons, its producers are the linear maps
whose output rows make the units, and its consumer is the output projection.
"""

from functools import partial
from inspect import signature
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

FORMAT_VERSION = 3
BIAS_TABLE = "relative_attention_bias"  # in an attention: an embedding, one number per head

# Attributes in which attentions of transformers store their sizes. A family that uses other names
# needs them here.
_NUM_HEADS = ("num_attention_heads", "n_heads", "num_heads")
_NUM_FEATURES = ("all_head_size", "split_size", "inner_dim")

# Attentions of transformers that read the number of heads from the configuration.
_READING_CONFIG = ("Phi3Attention",)

_FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,),  # such as "layer.0.heads"
    "kind": (str,),  # "head" or "neuron"
    "num_units": (int,),  # remaining heads or neurons; without any, the sublayer is bypassed
    "unit_width": (int,),  # input features of the consumer per unit
    "units": (list, type(None)),  # indices of the remaining heads in the unpruned model
    "producers": (list,),  # see below
    "consumer": (str,),  # path of the output projection
    "inner": (str,),  # path of the module that computes the units, such as the attention
    "inner_returns_tuple": (bool,),
    "head_bias": (str, type(None)),  # argument of `inner` with one slice per head
    # "normed": `inner` also adds the residual and applies the norm; "biased": it also returns a
    # position bias for later layers; "plain": neither
    "bypass": (str,),
    "has_bias_table": (bool,),  # whether `inner` gets a position bias table of its own
}

# Entries that config.json leaves out where they have this value.
_DEFAULTS: dict[str, Any] = {
    "units": None,
    "inner_returns_tuple": False,
    "head_bias": None,
    "bypass": "plain",
    "has_bias_table": False,
}

_PRODUCER_FIELDS: dict[str, tuple[type, ...]] = {
    "path": (str,),
    "parts": (int,),  # copies of the units: 3 for fused queries, keys and values
    "width": (int,),  # output rows of one unit in one part
    # in the first part, if its number differs: several fused queries may share one key
    "first_width": (int, type(None)),
}


def pruned_class(base: type) -> Any:
    """The pruned counterpart of a model class of transformers.

    It has the same name, since pipelines decide by the name what a model can do.
    """
    base = getattr(base, "pruned_from", base)
    name = base.__name__
    known = globals().get(name)
    if known is None or known.pruned_from is not base:
        # no Auto class loads a class of the user's own: `auto_map` names what does
        auto_class = _auto_class(base) if is_of_transformers(base) else "rfprune.load_pruned"
        entries = {"pruned_from": base, "_auto_class": auto_class, "__module__": __name__}
        globals()[name] = type(name, (_Pruned, base), entries)
    return globals()[name]


def is_of_transformers(base: type) -> bool:
    """Whether a class, or the class that a pruned one was made from, is one of transformers."""
    base = getattr(base, "pruned_from", base)
    return getattr(transformers, base.__name__, None) is base


def _auto_class(base: Any) -> str:
    """The Auto class of transformers that makes models of a class."""
    named = _auto_class_by_name(base.__name__)
    mapped = _auto_map(base, base.config_class)
    makers = [auto for auto, made in mapped.items() if made == _named(base)]
    # of audio, a sequence classifier has another Auto class than one of texts
    return named if named in ("AutoModel", *makers) or not makers else makers[0]


def _auto_class_by_name(name: str) -> str:
    _, found, head = name.removesuffix("WithTeacher").partition("For")
    if name.endswith("LMHeadModel"):
        return "AutoModelForCausalLM"
    if head == "ConditionalGeneration" or name.endswith("MTModel"):
        return "AutoModelForSeq2SeqLM"
    return f"AutoModelFor{head}" if found else "AutoModel"


def __getattr__(name: str) -> Any:
    """Make a pruned class when transformers or pickle look it up by name."""
    base = None if name.startswith("_") else getattr(transformers, name, None)
    if not (isinstance(base, type) and issubclass(base, transformers.PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pruned_class(base)


class _Pruned(nn.Module):
    """A mixin: shrinks the model that the original class has built."""

    base_model_prefix: str
    base_model: Any

    @classmethod
    def is_custom_code(cls) -> bool:
        """As for the original class: its weights are renamed when they are saved and loaded."""
        return not is_of_transformers(cls)

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        blocks = check_description(getattr(config, "rfprune", None), self.base_model_prefix)
        name = type(self).__name__
        if name not in (getattr(config, "architectures", None) or [name]):
            # another head than the saved one, such as that of an encoder without its decoder
            stacks = dict(self.base_model.named_children())
            blocks = [block for block in blocks if block["consumer"].split(".")[0] in stacks]
        describe(self, blocks)
        shrink(self, blocks)


def describe(model: Any, blocks: list[dict[str, Any]]) -> None:
    """Record the blocks of a pruned model in its configuration, and the classes that load it."""
    config, base = model.config, model.pruned_from
    config.rfprune = {"format_version": FORMAT_VERSION, "blocks": _grouped(blocks)}
    config.auto_map = _auto_map(base, type(config)) | {type(model)._auto_class: _named(base)}
    if not is_of_transformers(base):
        config.rfprune["class"] = f"{base.__module__}.{base.__qualname__}"


def _auto_map(base: Any, config_class: type) -> dict[str, str]:
    """The classes of this file by the Auto classes that load them: one for every kind of head.

    Heads whose weights have other names for the Transformer are left out: they would be random.
    """
    found = {}
    for name in (name for name in sorted(dir(modeling_auto)) if name.startswith("AutoModel")):
        heads = getattr(getattr(modeling_auto, name), "_model_mapping", {})
        made: Any = heads.get(config_class, None)
        made = made[0] if isinstance(made, tuple) else made
        if (
            getattr(made, "config_class", None) is config_class
            and made.base_model_prefix == base.base_model_prefix
        ):
            found[name] = _named(made)
    return found


def _named(base: type) -> str:
    return f"{__name__.rpartition('.')[2]}.{base.__name__}"


def _grouped(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks as config.json lists them: one entry for the same sublayer of all layers.

    In paths and names "*" stands for the number of the layer. What differs from layer to layer is
    one string: `layers` "0 1 2", `num_units` "12 9 0", `units` "0 1 2 3, 0 2, " (of heads). The
    layers of a second stack are counted on in names but not in paths: `first_layer` is the number
    in the name of the first one.
    """
    groups: dict[str, dict[str, Any]] = {}
    for block in blocks:
        layer, place = _number_in(block["name"]), _number_in(block["consumer"])
        entry = {
            "name": _with_star(block["name"], layer),
            "layers": [],
            "num_units": [],
            "units": [],
            "first_layer": int(layer or 0) - int(place or 0),
            "kind": block["kind"],
            "unit_width": block["unit_width"],
            "producers": {
                _with_star(each["path"], place): _as_shape(each) for each in block["producers"]
            },
            "consumer": _with_star(block["consumer"], place),
            "inner": _with_star(block["inner"], place),
        }
        for name, default in _DEFAULTS.items():
            if block[name] != default and name != "units":
                entry[name] = block[name]
        group = groups.setdefault(repr((entry, block["units"] is None)), entry)
        group["layers"].append(layer or "0")
        group["num_units"].append(str(block["num_units"]))
        if block["units"] is not None:
            group["units"].append(" ".join(map(str, block["units"])))
    for group in groups.values():
        group["layers"] = " ".join(group["layers"])
        group["num_units"] = " ".join(group["num_units"])
        group["units"] = ", ".join(group["units"]) if group["kind"] == "head" else None
    optional = {"units": None, "first_layer": 0}
    return [
        {name: value for name, value in group.items() if optional.get(name, ...) != value}
        for group in groups.values()
    ]


def _as_shape(producer: dict[str, Any]) -> str:
    """Parts and widths of a producer, such as "3 x 4", or "3 x 4, first 8"."""
    first = producer["first_width"]
    shape = f"{producer['parts']} x {producer['width']}"
    return shape if first is None else f"{shape}, first {first}"


def _from_shape(shape: str) -> dict[str, Any]:
    """The fields that `_as_shape` has written."""
    shape, *first = shape.split(", first ")
    parts, width = shape.split(" x ")
    widths = {"width": int(width), "first_width": int(first[0]) if first else None}
    return {"parts": int(parts), **widths}


def _number_in(path: str) -> str | None:
    """The first part of a dotted path that is a number: that of the layer."""
    return next((part for part in path.split(".") if part.isdigit()), None)


def _with_star(path: str, number: str | None) -> str:
    parts = path.split(".")
    if number is not None and _number_in(path) == number:
        parts[parts.index(number)] = "*"
    return ".".join(parts)


def _blocks_of(group: Any) -> list[tuple[int, dict[str, Any]]]:
    """The blocks of an entry that `_grouped` made, with the numbers of their layers."""
    try:
        rest = dict(group)
        layers, sizes = rest.pop("layers").split(" "), rest.pop("num_units").split(" ")
        units = rest.pop("units", None)
        of_layers = [None] * len(layers) if units is None else units.split(", ")
        name, first, producers = rest.pop("name"), rest.pop("first_layer", 0), rest.pop("producers")
        blocks = []
        for layer, size, kept in zip(layers, sizes, of_layers, strict=True):
            place = str(int(layer) - first)
            block = {
                "name": name.replace("*", layer),
                "num_units": int(size),
                "units": None if kept is None else [int(unit) for unit in kept.split()],
                "producers": [
                    {"path": path.replace("*", place), **_from_shape(shape)}
                    for path, shape in producers.items()
                ],
            }
            paths = {key: rest[key].replace("*", place) for key in ("consumer", "inner")}
            blocks.append((int(layer), rest | paths | block))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the blocks cannot be read: {group!r:.80}") from error
    return blocks


def check_description(description: Any, prefix: str = "") -> list[dict[str, Any]]:
    """The blocks in `description`, the entry "rfprune" of config.json.

    Paths start at the Transformer within the model, which all heads have in common.

    Args:
        prefix: name of the Transformer within the model; earlier formats have it in all paths.

    Raises:
        ValueError: the entry is missing, malformed or of another format version.
    """
    if not isinstance(description, dict):
        raise ValueError("it has no entry 'rfprune', so this is not a pruned model")
    version, blocks = description.get("format_version"), description.get("blocks")
    if version not in (1, 2, FORMAT_VERSION):
        raise ValueError(
            f"the format version is {version!r}, not {FORMAT_VERSION}: upgrade rfprune"
        )
    if not isinstance(blocks, list):
        raise ValueError("there is no list of blocks")
    if version == FORMAT_VERSION:
        numbered = [each for group in blocks for each in _blocks_of(group)]
        blocks = [block for _, block in sorted(numbered, key=lambda each: each[0])]
    elif version == 1:
        blocks = [_upgraded(block) for block in blocks]
    blocks = [_with_defaults(block) if type(block) is dict else block for block in blocks]
    for block in blocks:
        _check_block(block)
    return blocks if version == FORMAT_VERSION else [within(prefix, block) for block in blocks]


def _with_defaults(block: dict[str, Any]) -> dict[str, Any]:
    """A block with the entries that config.json leaves out."""
    block, producers = _DEFAULTS | block, block.get("producers")
    if isinstance(producers, list):
        block["producers"] = [
            {"first_width": None} | each if type(each) is dict else each for each in producers
        ]
    return block


def within(prefix: str, block: dict[str, Any]) -> dict[str, Any]:
    """A block with paths from the root of a model as one with paths from the Transformer in it."""
    start = f"{prefix}." if prefix else ""
    paths = {key: block[key].removeprefix(start) for key in ("consumer", "inner")}
    producers = [each | {"path": each["path"].removeprefix(start)} for each in block["producers"]]
    return block | paths | {"producers": producers}


def _upgraded(block: Any) -> Any:
    """A block of format version 1 in the current format."""
    try:
        paths, bias = block["producers"], block["shared_position_bias"]
        producers = [{"path": path, "parts": 1, "width": block["unit_width"]} for path in paths]
        kept = {name: value for name, value in block.items() if name in _FIELDS}
        return kept | {
            "name": f"layer.{block['layer']}.{block['kind']}s",
            "producers": producers,
            "head_bias": "position_bias" if bias else None,
        }
    except (TypeError, KeyError):
        return block


def _check_block(block: Any) -> None:
    _check_fields(block, _FIELDS)
    units, inner = block["units"], block["inner"]
    for producer in block["producers"]:
        _check_fields(producer, _PRODUCER_FIELDS)
    sound = {
        "kind": block["kind"] in ("head", "neuron"),
        "num_units": block["num_units"] >= 0,
        "unit_width": block["unit_width"] > 0,
        "units": units is None
        or (
            len(units) == block["num_units"]
            and all(type(unit) is int and unit >= 0 for unit in units)
            and len(set(units)) == len(units)
        ),
        "producers": all(
            (p["path"].startswith(f"{inner}.") or p["path"] == inner)
            and p["parts"] > 0
            and p["width"] > 0
            and (p["first_width"] is None or p["first_width"] > 0)
            for p in block["producers"]
        ),
        "head_bias": block["head_bias"] is None or units is not None,
        "bypass": block["bypass"] in ("plain", "normed", "biased"),
    }
    for field, is_sound in sound.items():
        if not is_sound:
            raise ValueError(f"a block has a bad '{field}': {block[field]!r:.80}")


def _check_fields(entry: Any, fields: dict[str, tuple[type, ...]]) -> None:
    if not isinstance(entry, dict) or entry.keys() != fields.keys():
        what = "block" if fields is _FIELDS else "producer of a block"
        raise ValueError(f"a {what} must have the fields {', '.join(fields)}; got {entry!r:.80}")
    for field, types in fields.items():
        if type(entry[field]) not in types:
            raise ValueError(f"a block has a bad '{field}': {entry[field]!r:.80}")


def shrink(model: Any, blocks: list[dict[str, Any]]) -> None:
    """Give the projections of a model the sizes in `blocks`, which come from `check_description`.

    Raises:
        ValueError: a path does not name a linear map, or names a smaller one.
    """
    model = model.base_model
    for block in blocks:
        width = block["num_units"] * block["unit_width"]
        consumer = _linear(model, block["consumer"])
        inputs, outputs = _sizes(consumer)
        if width > inputs:
            raise ValueError(f"'{block['consumer']}' is smaller than {width} features")
        rows = {}
        for producer in block["producers"]:
            path = producer["path"]
            first = producer["first_width"] or producer["width"]
            unit_rows = first + (producer["parts"] - 1) * producer["width"]
            rows[path] = block["num_units"] * unit_rows
            if rows[path] > _sizes(_linear(model, path))[1]:
                raise ValueError(f"'{path}' is smaller than {rows[path]} features")
        if width == 0:
            _empty(model, block, consumer)
            continue
        for path, size in rows.items():
            old = _linear(model, path)
            _replace(model, path, _linear_like(old, _sizes(old)[0], size))
        _replace(model, block["consumer"], _linear_like(consumer, width, outputs))
        if block["kind"] == "head":
            _set_heads(model.get_submodule(block["inner"]), block, width)


def _linear(model: nn.Module, path: str) -> nn.Linear | Conv1D:
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"there is no module '{path}'") from error
    if not isinstance(module, nn.Linear | Conv1D):
        raise ValueError(f"'{path}' is a {type(module).__name__}, not a linear map")
    return module


def _sizes(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """Input and output features of a linear map; a Conv1D stores its weight transposed."""
    first, second = module.weight.shape
    return (first, second) if isinstance(module, Conv1D) else (second, first)


def _linear_like(old: nn.Linear | Conv1D, inputs: int, outputs: int) -> Any:
    if isinstance(old, Conv1D):
        with old.weight.device:
            return Conv1D(outputs, inputs).to(old.weight.dtype)
    like = {"device": old.weight.device, "dtype": old.weight.dtype}
    return nn.Linear(inputs, outputs, bias=old.bias is not None, **like)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module.train(model.training))


def _set_heads(attention: Any, block: dict[str, Any], width: int) -> None:
    """Set the number of heads of an attention; a unit may hold several query heads."""
    head_width = min(producer["width"] for producer in block["producers"])
    sizes = {
        **dict.fromkeys(_NUM_HEADS, width // head_width),
        **dict.fromkeys(_NUM_FEATURES, width),
        "num_key_value_heads": block["num_units"],
    }
    for name, size in sizes.items():
        if hasattr(attention, name):
            setattr(attention, name, size)
    if type(attention).__name__ in _READING_CONFIG:
        shared = getattr(attention.config, "shared", attention.config)
        attention.config = AttentionConfig(shared, width // head_width)
    if block["has_bias_table"]:
        shape = attention.relative_attention_num_buckets, block["num_units"]
        table = nn.Embedding.from_pretrained(attention.o.weight.new_zeros(shape), freeze=False)
        setattr(attention, BIAS_TABLE, table)
        attention.has_relative_attention_bias = True
    if block["bypass"] == "biased" and not hasattr(attention, "makes_own_bias"):
        # earlier layers have other heads, so an attention computes the position bias of its own
        attention.register_forward_pre_hook(_without_bias, with_kwargs=True)
        attention.makes_own_bias = True
    if block["head_bias"] is not None:
        if not hasattr(attention, "kept_heads"):
            position = list(signature(attention.forward).parameters).index(block["head_bias"])
            hook = partial(_select_bias, name=block["head_bias"], position=position)
            attention.register_forward_pre_hook(hook, with_kwargs=True)
        attention.kept_heads = list(block["units"])


class AttentionConfig:
    """The configuration of a model, with the number of heads that one attention has."""

    def __init__(self, shared: Any, num_attention_heads: int) -> None:
        self.shared = shared
        self.num_attention_heads = num_attention_heads

    def __getattr__(self, name: str) -> Any:
        if name == "shared":  # while a copy is made
            raise AttributeError(name)
        return getattr(self.shared, name)


def _without_bias(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, kwargs | {"position_bias": None}


def _select_bias(
    attention: Any, args: Any, kwargs: dict[str, Any], *, name: str, position: int
) -> Any:
    """Select the kept heads of a bias (B, H, S, S); a bias (B, 1, S, S) serves all heads."""
    bias = args[position] if len(args) > position else kwargs.get(name)
    if bias is None or bias.shape[1] == 1:
        return args, kwargs
    bias = bias[:, attention.kept_heads]
    if len(args) > position:
        return (*args[:position], bias, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: bias}


def _empty(model: nn.Module, block: dict[str, Any], consumer: nn.Linear | Conv1D) -> None:
    path, output = block["inner"], ConstantOutput(consumer)
    num_others = block["inner_returns_tuple"] + (block["bypass"] == "biased")
    name = block["consumer"].removeprefix(path + ".")
    before = model.get_submodule(path)
    layer_index = getattr(before, "layer_idx", None)
    if "." in name and name != block["consumer"]:
        raise ValueError(f"'{block['consumer']}' is too deep inside '{path}'")
    if name != block["consumer"]:  # the consumer is inside: it keeps its place
        inner = EmptySublayer(num_others, layer_index, name, output)
        if block["bypass"] == "normed":
            inner.LayerNorm = before.get_submodule("LayerNorm")
        _replace(model, path, inner)
    else:
        _replace(model, path, EmptySublayer(num_others, layer_index))
        _replace(model, block["consumer"], output)


class ConstantOutput(nn.Module):
    """An output projection without inputs: it returns its bias, or zeros.

    Its weight without columns is saved too: the unpruned class refuses the shape, but would
    initialise a missing weight at random.
    """

    weight: torch.Tensor

    def __init__(self, like: nn.Linear | Conv1D) -> None:
        super().__init__()
        outputs, weight = _sizes(like)[1], like.weight
        self.transposed = isinstance(like, Conv1D)
        shape = (0, outputs) if self.transposed else (outputs, 0)
        self.register_buffer("weight", weight.new_empty(shape))
        self.bias = None if like.bias is None else nn.Parameter(weight.new_zeros(outputs))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        outputs = self.weight.shape[self.transposed]
        if self.bias is None:
            return hidden_states.new_zeros(*hidden_states.shape[:-1], outputs)
        # a copy: a view of a parameter breaks torch's FLOP counter and in-place operations
        return self.bias.expand(*hidden_states.shape[:-1], -1).clone()


class EmptySublayer(nn.Module):
    """Replaces an attention or FFN without units.

    If the original module also added the residual and applied the norm, so does this one.
    """

    def __init__(
        self,
        num_others: int,
        layer_index: int | None = None,
        output_name: str = "",
        output: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.num_others = num_others  # values returned after the hidden states
        self.layer_idx = layer_index
        self.output_name = output_name
        self.LayerNorm: nn.Module | None = None
        if output is not None:
            self.add_module(output_name, output)

    def forward(self, hidden_states: torch.Tensor, *_: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        cache = getattr(cache, "self_attention_cache", cache)
        names = "key_value_states", "encoder_hidden_states"
        is_cross = any(kwargs.get(name) is not None for name in names)
        if cache is not None and self.layer_idx is not None and not is_cross:
            # the cache counts tokens by its keys, so it gets one number per token
            placeholder = hidden_states.new_zeros(*hidden_states.shape[:-1], 1).unsqueeze(1)
            cache.update(placeholder, placeholder, self.layer_idx)
        residual = hidden_states
        if self.output_name:
            hidden_states = self.get_submodule(self.output_name)(hidden_states)
        if self.LayerNorm is not None:
            hidden_states = self.LayerNorm(residual + hidden_states)
        return (hidden_states, *[None] * self.num_others) if self.num_others else hidden_states
