"""A row of `rfprune.families.architectures` for a family that has none, from its tree of modules.

The sizes of linear maps tell most of it: what reads the hidden state makes units, and what gives
one back reads them. Where all are as large as the hidden state (an attention), names and the order
in which they are registered tell which one comes last. Norms are told by the order in which they
run.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from rfprune.errors import UserError
from rfprune.families.schema import LINEAR_MAPS, Stack, Sublayer

_OUTPUT = re.compile(
    r"(^|\.)(o|wo|dense|proj|projection|c_proj|o_proj|(\w+_)?out(put)?(_\w+)?)$", re.IGNORECASE
)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass(frozen=True)
class Suggestion:
    """What was found in the first layer of one list of layers.

    Attributes:
        stack: the row's part for this list.
        left_over: linear maps that fit nowhere, with their inputs and outputs.
        others: parameters of the layer that are of no linear map and no norm.
    """

    stack: Stack
    left_over: dict[str, tuple[int, int]]
    others: tuple[str, ...]


def suggest(config: PretrainedConfig) -> list[Suggestion]:
    """What a row for a configuration's model type could say, one entry a list of layers.

    The model is made without weights or memory.

    Raises:
        UserError: transformers cannot make such a model, or it has no list of layers.
    """
    if not isinstance(getattr(config, "hidden_size", None), int):
        raise UserError(
            f"a configuration of type '{config.model_type}' has no hidden_size, as where a model "
            "is several in one; name the type of the one that is to be pruned"
        )
    model = _shapes_of(config)
    found = []
    for path, layers in _outermost_lists(model):
        layer = layers[0]
        ran = _order(model, layer)
        maps = _linear_maps(layer, ran)
        sublayers, left_over = _sublayers(maps, int(config.hidden_size))
        if sublayers:
            pre_norm = _norm_comes_first(sublayers[0], ran)
            placed = [_with_norm(each, ran) for each in sublayers]
            kinds = [each.kind for each in placed]
            for number, kind in enumerate(kinds):
                if kind in kinds[:number]:
                    placed[number] = replace(placed[number], label=f"cross_{kind}s")
            stack = Stack(path, tuple(placed), pre_norm)
            found.append(Suggestion(stack, left_over, _others(layer)))
    if not found:
        raise UserError(
            f"no list of layers with linear maps that read and give back a hidden state of "
            f"{config.hidden_size} was found in a {type(model).__name__}, so it does not fit a row"
        )
    return found


def as_text(model_type: str, found: Sequence[Suggestion]) -> str:
    """The row as code, with what did not fit as comments."""
    lines = [f'"{model_type}": Architecture(', "    ("]
    for each in found:
        lines += [f'        Stack("{each.stack.layers}", (']
        for sublayer in each.stack.sublayers:
            lines += ["            Sublayer("]
            lines += [f"                {line}," for line in _arguments(sublayer)]
            lines += ["            ),"]
        lines += [f"        ), pre_norm={each.stack.pre_norm}),"]
        for path, (inputs, outputs) in each.left_over.items():
            lines += [f"        # fits nowhere: {path} ({inputs} -> {outputs})"]
        if each.others:
            lines += [f"        # a scale or a bias by heads? {', '.join(each.others)}"]
    return "\n".join([*lines, "    ),", "),"])


def _arguments(sublayer: Sublayer) -> list[str]:
    defaults = Sublayer("head", (), "", "", None)
    return [
        f"{name}={value!r}"
        for name, value in vars(sublayer).items()
        if name in ("kind", "next_norm") or value != getattr(defaults, name)
    ]


def _shapes_of(config: PretrainedConfig) -> Any:
    small = copy.deepcopy(config)
    if getattr(small, "num_hidden_layers", 0) > 2 and not getattr(small, "layer_types", None):
        small.num_hidden_layers = 2
    try:
        with torch.device("meta"):
            # other implementations look at the values of masks, and there are none
            return AutoModel.from_config(small, attn_implementation="eager").eval()
    except Exception as error:  # each family fails in its own way
        raise UserError(
            f"transformers cannot make a model of type '{config.model_type}' from this "
            f"configuration ({str(error).splitlines()[0]:.200}); give a folder with a config.json"
        ) from error


def _outermost_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Lists of layers that are in no other list of layers."""
    found: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            found.append((path, module))
    return found


def _linear_maps(layer: nn.Module, ran: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linear maps of a layer, by path, in the order in which they run."""
    modules = {path: layer.get_submodule(path) for path in ran}
    return {
        path: (shape[0], shape[1]) if isinstance(module, Conv1D) else (shape[1], shape[0])
        for path, module in modules.items()
        if isinstance(module, LINEAR_MAPS)
        for shape in [module.weight.shape]
    }


def _others(layer: nn.Module) -> tuple[str, ...]:
    return tuple(
        name
        for name, _ in layer.named_parameters()
        if not _is_norm(name.rpartition(".")[0])
        and not isinstance(layer.get_submodule(name.rpartition(".")[0]), LINEAR_MAPS)
    )


def _order(model: Any, layer: nn.Module) -> list[str]:
    """Paths of the modules of a layer in the order in which they run, or are registered, if that
    is not known.

    Norms and linear maps are what matters. A run on the device meta computes nothing.
    """
    ran: list[str] = []
    handles = []
    leaves = {path: part for path, part in layer.named_modules() if not list(part.children())}
    for path, module in leaves.items():
        handles.append(module.register_forward_hook(lambda *_, path=path: ran.append(path)))
    try:
        with suppress(Exception), torch.no_grad(), torch.device("meta"):
            model(**_inputs(model))
    finally:
        for handle in handles:
            handle.remove()
    return [*ran, *(path for path in leaves if path not in ran)]


def _inputs(model: Any) -> dict[str, torch.Tensor]:
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.zeros(1, model.config.num_channels, height, width)}
    ids = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
    if getattr(model.config, "is_encoder_decoder", False):
        ids["decoder_input_ids"] = ids["input_ids"]
    return ids


def _sublayers(
    maps: dict[str, tuple[int, int]], hidden_size: int
) -> tuple[list[Sublayer], dict[str, tuple[int, int]]]:
    """Runs of maps that read the hidden state, each ended by one that gives it back."""
    found: list[Sublayer] = []
    left_over, pending = {}, list[str]()
    for path, (inputs, outputs) in maps.items():
        gives_back = outputs == hidden_size and bool(pending)
        if gives_back and (inputs != hidden_size or _OUTPUT.search(path)):
            found.append(_sublayer(pending, path, maps))
            pending = []
        elif inputs == hidden_size:
            pending.append(path)
        else:
            left_over[path] = (inputs, outputs)
    left_over |= {path: maps[path] for path in pending}
    for number, each in enumerate(found):
        others = (other.consumer for other in found if other is not each)
        if any(path.startswith(f"{each.module}.") for path in others):  # it holds another one too
            found[number] = replace(each, module=each.producers[0])
    return found, left_over


def _sublayer(
    producers: Sequence[str], consumer: str, maps: dict[str, tuple[int, int]]
) -> Sublayer:
    rows, features = [maps[path][1] for path in producers], maps[consumer][0]
    alone = len(producers) == 1 and rows[0] % features == 0
    fused = rows[0] // features if alone else 1
    is_attention = len(producers) > 2 or fused > 2 or bool(_ATTENTION.search(producers[0]))
    module = producers[0].rpartition(".")[0]
    while module and not all(path.startswith(f"{module}.") for path in producers):
        module = module.rpartition(".")[0]
    return Sublayer(
        kind="head" if is_attention else "neuron",
        producers=tuple(producers),
        consumer=consumer,
        module=module or producers[0],
        next_norm=None,
        fused=fused,
        returns_tuple=is_attention,
    )


def _is_norm(path: str) -> bool:
    return bool(re.search(r"norm|^ln_?", path.rpartition(".")[2], re.IGNORECASE))


def _norm_comes_first(first: Sublayer, ran: Sequence[str]) -> bool:
    return any(_is_norm(path) for path in ran[: ran.index(first.producers[0])])


def _with_norm(sublayer: Sublayer, ran: Sequence[str]) -> Sublayer:
    """With the norm that runs next after the consumer; after the last one of a layer none does."""
    after = ran[ran.index(sublayer.consumer) + 1 :]
    following = next((path for path in after if _is_norm(path)), None)
    return replace(sublayer, next_norm=following)
