"""Inputs of all linear maps within the layers of a model, bottom up.

The calibration hidden states advance one layer at a time. Within a layer the maps come in the order
they run. Maps of the same inputs (queries, keys and values; the two halves of a gated FFN) form a
group and share the moments of these inputs. A visitor may change the weights of a group; all groups
after it see the inputs that follow from that.

Layers with shared weights (ALBERT) run several times. The moments of their maps are over all runs,
and each pass runs the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from rfprune import distributed
from rfprune.errors import UserError
from rfprune.families.schema import LINEAR_MAPS
from rfprune.model.batch import Batch, decoder_token_mask, model_inputs, pack, token_mask, unpack
from rfprune.model.layerwise import module_inputs, run_layer
from rfprune.model.layout import Layout
from rfprune.model.linear import weight_of
from rfprune.model.residency import execution_device, resident
from rfprune.stages.hidden_states import HiddenStates, first_hidden_states
from rfprune.stages.least_squares import Moments
from rfprune.stages.reconstruct import SplitMoments

Visit = Callable[[int, Sequence[str], Moments, Moments], None]
"""Called with the index of a layer, the paths of maps of the same inputs, and the moments of these
inputs on most batches and on the held-out ones. Targets are the inputs of the reference."""


def linear_maps(model: PreTrainedModel, layer: str) -> list[str]:
    """Paths of all linear maps with weights in the layer at a path."""
    return [
        f"{layer}.{name}"
        for name, module in model.get_submodule(layer).named_modules()
        if isinstance(module, LINEAR_MAPS) and module.weight.numel()
    ]


def maps_of_layers(model: PreTrainedModel, layout: Layout) -> dict[str, int]:
    """The index of the layer of every linear map within the layers, by path.

    Raises:
        UserError: a map shares its weight with another module.
    """
    maps = {path: i for i, layer in enumerate(layout.layers) for path in linear_maps(model, layer)}
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = owners.setdefault(id(parameter), name)
        shared = {name.rpartition(".")[0], other.rpartition(".")[0]}
        if other != name and shared & maps.keys():
            raise UserError(
                f"'{other}' and '{name}' share their weights, so zeros in one would be zeros in "
                "the other; give every module weights of its own, or leave --sparsity out"
            )
    return maps


def visit_maps(
    model: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    visit: Visit,
    *,
    reference: PreTrainedModel | None = None,
    progress: bool = False,
) -> None:
    """Call `visit` for every group of linear maps, bottom up.

    Args:
        model: frozen; pruned or not.
        reference: a copy of it as it was; None: moments have no targets. Models whose layers share
            weights need none, since all runs of a layer change together.
        layout: of `model`.
        batches: calibration batches with token masks, on the model's device.
        visit: may change the weights of the maps that it is called with.
        progress: whether to show a progress bar.
    """
    own = distributed.shard(batches)
    bar = tqdm(
        total=len(layout.layers), desc="zeros", unit="layer", disable=not progress, leave=False
    )
    with torch.no_grad(), bar:
        if layout.execution_order:
            run = _Run(model, lambda i: model(**model_inputs(own[i])))
            for layer in range(len(layout.layers)):
                _visit_layer(layout, layer, own, run, None, visit)
                bar.update()
            return
        for in_decoder in (False, True):
            _visit_stack((model, reference), layout, own, visit, bar, in_decoder=in_decoder)


@dataclass(frozen=True)
class _Run:
    """A model, and how a layer of it, or the whole, runs on the batch of a number."""

    model: PreTrainedModel
    run: Callable[[int], Any]


def _visit_stack(
    models: tuple[PreTrainedModel, PreTrainedModel | None],
    layout: Layout,
    batches: Sequence[Batch],
    visit: Visit,
    bar: tqdm,
    *,
    in_decoder: bool,
) -> None:
    indices = layout.layer_indices(decoder=in_decoder)
    if not indices:
        return
    model, reference = models
    pair, layouts = (reference or model, model), (layout, layout)
    before, now = first_hidden_states(pair, layouts, batches, in_decoder=in_decoder)
    used = [now] if reference is None else [now, before]
    masks = [decoder_token_mask(one) if in_decoder else token_mask(one) for one in batches]

    def runs(states: HiddenStates, path: str) -> _Run:
        def run(i: int) -> Tensor:
            hidden = unpack(states.values[i], masks[i])
            return run_layer(states.model, path, hidden, states.layer_calls(i))

        return _Run(states.model, run)

    for layer in indices:
        path = layout.layers[layer]
        own, *others = (runs(states, path) for states in used)
        with resident(model.get_submodule(path)):
            _visit_layer(layout, layer, batches, own, others[0] if others else None, visit)
            for states, one in zip(used, (own, *others), strict=True):
                for i, mask in enumerate(masks):
                    states.values[i].copy_(pack(one.run(i), mask))
        bar.update()


def _visit_layer(
    layout: Layout,
    layer: int,
    batches: Sequence[Batch],
    own: _Run,
    reference: _Run | None,
    visit: Visit,
) -> None:
    """Collect the moments of each group of a layer, after the groups before it were visited.

    Args:
        own: runs the model.
        reference: runs the reference, if there is one.
    """
    from_encoder = {
        producer.path
        for block in layout.blocks_of_layer(layer)
        for producer in block.producers
        if producer.inputs == ("encoder",)
    }
    in_decoder = layer in layout.layer_indices(decoder=True)
    device = execution_device(own.model)
    for paths, num_calls in _groups(own.model, layout.layers[layer], lambda: own.run(0)):
        size = weight_of(own.model.get_submodule(paths[0])).shape[1]
        moments = SplitMoments.zeros(size, size if reference else 0, device)
        for i, batch in enumerate(batches):
            decoder_tokens = in_decoder and paths[0] not in from_encoder
            mask = decoder_token_mask(batch) if decoder_tokens else token_mask(batch)
            inputs = _inputs(own, paths[0], i, num_calls, mask)
            targets = [rows[:, :0] for rows in inputs]
            if reference is not None:
                targets = _inputs(reference, paths[0], i, num_calls, mask)
            for rows, target in zip(inputs, targets, strict=True):
                moments.add(i, rows, target)
        visit(layer, paths, *moments.all_reduce())


def _inputs(run: _Run, path: str, i: int, num_calls: int, tokens: Tensor) -> list[Tensor]:
    """The inputs (tokens, p) of a map on a batch, one tensor for each of its calls."""
    inputs = module_inputs(run.model.get_submodule(path), lambda: run.run(i), num_calls)
    return [_rows(each, tokens) for each in inputs]


def _groups(
    model: PreTrainedModel, layer: str, run: Callable[[], object]
) -> list[tuple[list[str], int]]:
    """The maps of a layer with the same inputs, in the order they run, and how often they do."""
    calls: list[tuple[str, Tensor]] = []  # tensors stay alive, so that their addresses are distinct
    maps = linear_maps(model, layer)
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: calls.append((path, args[0]))
        )
        for path in maps
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    inputs: dict[str, tuple[tuple[int, int], ...]] = {}
    for path, tensor in calls:
        inputs[path] = (*inputs.get(path, ()), (tensor.data_ptr(), tensor.numel()))
    groups: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for path, key in inputs.items():
        groups.setdefault(key, []).append(path)
    return [(paths, len(key)) for key, paths in groups.items()]


def _rows(inputs: Tensor, tokens: Tensor) -> Tensor:
    """Inputs at tokens, (tokens, p); all inputs where they are not one per token."""
    if inputs[..., 0].numel() == tokens.numel():
        return pack(inputs, tokens)
    return inputs.reshape(-1, inputs.shape[-1])
