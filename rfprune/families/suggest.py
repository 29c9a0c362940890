"""Suggest a row of `rfprune.families.architectures` for a new family, from its modules.

Sizes of linear maps tell most of it: one with the hidden size as input features is a producer, one
with the hidden size as output features is a consumer. Where both are the hidden size (in an
attention), names and the execution order tell them apart. The execution order also tells which norm
follows which sublayer, and its input whether it normalises the consumer's output, the residual sum,
or the layer's own input.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModel, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from rfprune.errors import UserError, error_summary
from rfprune.families.schema import LINEAR_MAPS, Stack, Sublayer

_OUTPUT = re.compile(
    r"(^|\.)(o|wo|dense|proj|projection|c_proj|o_proj|(\w+_)?out(put)?(_\w+)?)$", re.IGNORECASE
)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)

_FAILURES = (
    *(AssertionError, AttributeError, ImportError, RuntimeError, TypeError, ValueError),
    *(StrictDataclassError, ZeroDivisionError),
)
"""What model classes raise for configurations, inputs or the meta device that they do not handle:
missing entries, entries that are None, missing libraries, values on the meta device."""


@dataclass(frozen=True)
class Suggestion:
    """What was found in the first layer of one list of layers.

    Attributes:
        stack: the row's part for this list.
        left_over: linear maps that belong to no sublayer: (input features, output features).
        other_parameters: those of neither linear maps nor norms; they may be scales or biases.
        failure: why the model did not run, in which case the order of modules is that of their
            registration; empty if it ran.
    """

    stack: Stack
    left_over: dict[str, tuple[int, int]]
    other_parameters: tuple[str, ...]
    failure: str = ""


def suggest(config: PretrainedConfig) -> list[Suggestion]:
    """Suggest a row for a configuration's model type.

    The model is made on the meta device, without weights or memory.

    Returns:
        One suggestion per list of layers.

    Raises:
        UserError: transformers cannot make such a model, or it has no list of layers.
    """
    if not isinstance(getattr(config, "hidden_size", None), int):
        raise UserError(
            f"a configuration of type '{config.model_type}' has no hidden_size, perhaps because "
            "it combines several models; name the type of the model that is to be pruned"
        )
    model = _on_meta(config)
    found = []
    for path, layers in _outermost_lists(model):
        layer = layers[0]
        order = _execution_order(model, layer)
        maps = _linear_maps(layer, order.paths)
        sublayers, left_over = _sublayers(maps, int(config.hidden_size))
        if sublayers:
            placed = _with_norms(sublayers, order)
            pre_norm = _norm_comes_first(sublayers[0], order.paths) or bool(placed[0].output_norm)
            kinds = [each.kind for each in placed]
            for number, kind in enumerate(kinds):
                if kind in kinds[:number]:
                    placed[number] = replace(placed[number], label=f"cross_{kind}s")
            stack = Stack(path, tuple(placed), pre_norm)
            found.append(Suggestion(stack, left_over, _other_parameters(layer), order.failure))
    if not found:
        raise UserError(
            f"a {type(model).__name__} has no list of layers with linear maps from and to a hidden "
            f"state of {config.hidden_size} features, so it does not fit a row; see 'Adding a "
            "family' in rfprune/families/README.md"
        )
    return found


def as_text(model_type: str, found: Sequence[Suggestion]) -> str:
    """The row as Python code, with what did not fit as comments."""
    lines = [f'"{model_type}": Architecture(', "    ("]
    for each in found:
        lines += [f'        Stack("{each.stack.layers}", (']
        for sublayer in each.stack.sublayers:
            lines += ["            Sublayer("]
            lines += [f"                {line}," for line in _arguments(sublayer)]
            lines += ["            ),"]
        lines += [f"        ), pre_norm={each.stack.pre_norm}),"]
        for path, (inputs, outputs) in each.left_over.items():
            lines += [f"        # in no sublayer: {path} ({inputs} -> {outputs})"]
        if each.other_parameters:
            names = ", ".join(each.other_parameters)
            lines += [f"        # layer_scale, head_bias or position_bias_table? {names}"]
        if each.failure:
            lines += [f"        # check the order: the model did not run ({each.failure})"]
    return "\n".join([*lines, "    ),", "),"])


def _arguments(sublayer: Sublayer) -> list[str]:
    defaults = Sublayer("head", (), "", "", None)
    return [
        f"{name}={value!r}"
        for name, value in vars(sublayer).items()
        if name in ("kind", "next_norm") or value != getattr(defaults, name)
    ]


def _on_meta(config: PretrainedConfig) -> Any:
    small = copy.deepcopy(config)
    if getattr(small, "num_hidden_layers", 0) > 2 and not getattr(small, "layer_types", None):
        small.num_hidden_layers = 2
    try:
        with torch.device("meta"):
            # other implementations read the values of masks, which the meta device has not
            return AutoModel.from_config(small, attn_implementation="eager").eval()
    except _FAILURES as error:
        raise UserError(
            f"transformers cannot make a model of type '{config.model_type}' from this "
            f"configuration ({error_summary(error)}); give a folder with a config.json"
        ) from error


def _outermost_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Lists of layers that are not inside another list of layers."""
    found: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            found.append((path, module))
    return found


def _linear_maps(layer: nn.Module, ran: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Input and output features of a layer's linear maps, by path, in execution order."""
    modules = {path: layer.get_submodule(path) for path in ran}
    return {
        path: (shape[0], shape[1]) if isinstance(module, Conv1D) else (shape[1], shape[0])
        for path, module in modules.items()
        if isinstance(module, LINEAR_MAPS)
        for shape in [module.weight.shape]
    }


def _other_parameters(layer: nn.Module) -> tuple[str, ...]:
    return tuple(
        name
        for name, _ in layer.named_parameters()
        if not _is_norm(name.rpartition(".")[0])
        and not isinstance(layer.get_submodule(name.rpartition(".")[0]), LINEAR_MAPS)
    )


@dataclass(frozen=True)
class _Order:
    """What a forward pass tells of a layer's modules.

    Attributes:
        paths: in execution order; modules that did not run follow in the order of registration.
        inputs: the tensor that entered each module that ran.
        outputs: the tensor that left it.
        failure: why the model did not run; empty if it ran.
    """

    paths: Sequence[str]
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    failure: str


def _execution_order(model: Any, layer: nn.Module) -> _Order:
    """Run a model on the meta device, which computes nothing, and watch one of its layers."""
    ran: list[str] = []
    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    handles = []
    leaves = {path: part for path, part in layer.named_modules() if not list(part.children())}

    def record(_: nn.Module, args: tuple[Any, ...], output: Any, *, path: str) -> None:
        ran.append(path)
        inputs[path], outputs[path] = args[0] if args else None, output

    for path, module in leaves.items():
        handles.append(module.register_forward_hook(partial(record, path=path)))
    failure = ""
    try:
        with torch.no_grad():
            with torch.device("meta"):
                example = _inputs(model)
            # not within the context: BEiT caches an index that it makes, for later models as well
            model(**example)
    except _FAILURES as error:
        failure = error_summary(error)
    finally:
        for handle in handles:
            handle.remove()
    rest = (path for path in leaves if path not in ran)
    return _Order([*ran, *rest], inputs, outputs, failure)


def _inputs(model: Any) -> dict[str, torch.Tensor]:
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.zeros(1, model.config.num_channels, height, width)}
    if model.main_input_name == "input_values":
        return {"input_values": torch.zeros(1, 16000)}
    ids = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
    if model.main_input_name == "input_features" and hasattr(model.config, "num_mel_bins"):
        size = model.config.num_mel_bins, 2 * model.config.max_source_positions
        return {"input_features": torch.zeros(1, *size), "decoder_input_ids": ids["input_ids"]}
    if getattr(model.config, "is_encoder_decoder", False):
        ids["decoder_input_ids"] = ids["input_ids"]
    return ids


def _sublayers(
    maps: dict[str, tuple[int, int]], hidden_size: int
) -> tuple[list[Sublayer], dict[str, tuple[int, int]]]:
    """Group the maps from the hidden state with the next map back to it."""
    found: list[Sublayer] = []
    left_over, pending = {}, list[str]()
    for path, (inputs, outputs) in maps.items():
        returns_to_hidden = outputs == hidden_size and bool(pending)
        if returns_to_hidden and (inputs != hidden_size or _OUTPUT.search(path)):
            found.append(_sublayer(pending, path, maps))
            pending = []
        elif inputs == hidden_size:
            pending.append(path)
        else:
            left_over[path] = (inputs, outputs)
    left_over |= {path: maps[path] for path in pending}
    for number, each in enumerate(found):
        others = (other.consumer for other in found if other is not each)
        if any(path.startswith(f"{each.module}.") for path in others):  # holds other sublayers
            found[number] = replace(each, module=each.producers[0])
    return found, left_over


def _sublayer(
    producers: Sequence[str], consumer: str, maps: dict[str, tuple[int, int]]
) -> Sublayer:
    rows, features = [maps[path][1] for path in producers], maps[consumer][0]
    alone = len(producers) == 1 and rows[0] % features == 0
    fused = rows[0] // features if alone else 1
    is_attention = len(producers) > 2 or fused > 2 or bool(_ATTENTION.search(producers[0]))
    if is_attention and len(producers) == 1 and rows[0] > features:
        fused = 3  # with fewer keys and values than queries they have fewer rows
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


def _with_norms(sublayers: Sequence[Sublayer], order: _Order) -> list[Sublayer]:
    """With the norms that run between the consumer and the next sublayer's producers."""
    placed = []
    for number, sublayer in enumerate(sublayers):
        start, end = order.paths.index(sublayer.consumer) + 1, len(order.paths)
        if number + 1 < len(sublayers):
            end = order.paths.index(sublayers[number + 1].producers[0])
        norms = [path for path in order.paths[start:end] if _is_norm(path)]
        output = order.outputs.get(sublayer.consumer)
        before = order.paths[: order.paths.index(sublayer.producers[0])]
        first_inputs = [order.inputs.get(path) for path in before if _is_norm(path)]
        output_norm, next_norm, parallel = None, None, False
        made = [order.outputs.get(path) for path in sublayer.producers]
        one_unit = sublayer.kind == "head" and any(  # a norm over the queries of all heads
            _is_norm(path) and entering is not None and any(entering is other for other in made)
            for path, entering in order.inputs.items()
        )
        for path in norms:
            entering = order.inputs.get(path)
            if entering is not None and entering is output:
                output_norm = path
            elif entering is not None and any(entering is other for other in first_inputs):
                parallel = True
            else:
                next_norm = path
                break
        if output_norm and next_norm is None and number + 1 < len(sublayers):
            next_norm = sublayers[number + 1].module  # no norm precedes it
        placed.append(
            replace(
                sublayer,
                one_unit=one_unit,
                output_norm=output_norm,
                next_norm=next_norm,
                parallel=parallel,
            )
        )
    return placed
