"""Measure a latency table on the layers of a model itself.

For every shape of sublayer, one layer is copied with that sublayer cut to n units and the layer's
other sublayers emptied. The difference to the layer with all sublayers emptied is the sublayer's
time at n units. All sizes are timed in turn with the whole model and with the whole model emptied:
machine and caches are the same for all, and weights are read from memory as in the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rfprune.errors import UserError
from rfprune.latency.conditions import conditions_of
from rfprune.latency.table import LatencyCurve, LatencyTable, check_table, shape_of
from rfprune.latency.timed_batch import timed_batch, typical_batch
from rfprune.latency.timing import Timing, TimingBudget, time_interleaved
from rfprune.model.batch import Batch, model_inputs
from rfprune.model.compact import compact
from rfprune.model.frozen import frozen
from rfprune.model.layerwise import layer_calls
from rfprune.model.layout import Block, Layout

BUDGET = TimingBudget(seconds=120.0, min_rounds=3, warm_up_rounds=1)

ROUND_TO = 32
"""Numbers of neurons that are multiples of this suit the vector units of most machines."""

MAX_SIZES = 24
"""Number of sizes of an FFN to measure, about."""


@dataclass(frozen=True)
class _Variant:
    """A layer in which only `size` units of `block` are left."""

    block: Block
    size: int
    call: Callable[[], object]


def load_or_profile(
    path: Path | None,
    model: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    *,
    round_to: int | None = None,
    progress: bool = False,
) -> LatencyTable:
    """Load the latency table of a model from a file, or measure one on the typical batch.

    Raises:
        UserError: the file is not a latency table, or it was measured on another model or under
            other conditions.
    """
    if path is None:
        batch = typical_batch(batches)
        return profile_latency(model, layout, batch, round_to=round_to, progress=progress)
    table = LatencyTable.load(path)
    check_table(table, model, layout, conditions_of(model, layout, timed_batch(batches, table)))
    return table


def profile_latency(
    model: PreTrainedModel,
    layout: Layout,
    batch: Batch,
    *,
    round_to: int | None = None,
    budget: TimingBudget | None = None,
    progress: bool = False,
) -> LatencyTable:
    """Measure the milliseconds of a model by the sizes of its sublayers, on its own device.

    Args:
        model: not changed, also after an error or an interruption.
        layout: of `model`.
        batch: inputs (B, S); only their shape matters, and whether there is padding.
        round_to: numbers of neurons to allow: multiples of it (default: 32, or the power of two
            that gives a narrow FFN about as many sizes). Every number of heads is allowed.
        budget: when to stop (default: `BUDGET`).
        progress: whether to show a bar.

    Raises:
        UserError: the model has nothing to prune or is an encoder-decoder, or `round_to` is not
            positive.
    """
    if not layout.blocks:
        raise UserError(
            "this model has no heads or neurons left, so there is nothing to measure; profile the "
            "model that it was pruned from"
        )
    if round_to is not None and round_to < 1:
        raise UserError(f"neurons cannot be kept in multiples of {round_to}; give 1 or more")
    if layout.is_encoder_decoder:
        raise UserError(
            "the latency of an encoder-decoder depends on the length of its output, so it has no "
            "latency table; choose another metric (mac, params or memory)"
        )
    inputs = {name: value.to(model.device) for name, value in model_inputs(batch).items()}
    # Not in inference mode: tensors that a model caches could not be used in training later.
    with torch.inference_mode(False), torch.no_grad(), frozen(model):
        conditions = conditions_of(model, layout, inputs)
        emptied = compact(model, layout, [torch.zeros(b.num_units) for b in layout.blocks])
        variants = _variants(model, layout, inputs, round_to)
        timings = time_interleaved(
            [
                partial(model, **inputs),
                partial(emptied, **inputs),
                *(variant.call for variant in variants),
            ],
            model.device,
            budget or BUDGET,
            normalise_rounds=True,
            progress=progress,
        )
    total, rest, *layers = timings
    repeats = _repeats(model, layout)
    layers = [replace(timing, median_ms=timing.median_ms / repeats) for timing in layers]
    timed = list(zip(variants, layers, strict=True))
    unscaled = LatencyTable(
        model=shape_of(layout),
        conditions=conditions,
        total_ms=total.median_ms,
        total_spread=total.spread,
        rest_ms=rest.median_ms,
        curves=tuple(_curve(layout, block, timed, round_to) for block in _largest(layout)),
        scale=1.0,
        rounds=total.rounds,
        layer_ms=_layer_ms(timed, rest.median_ms / _num_runs(layout)),
    )
    return _scaled(unscaled, layout)


def _variants(
    model: PreTrainedModel, layout: Layout, inputs: Batch, round_to: int | None
) -> list[_Variant]:
    """Every size to measure; at size 0 all sublayers of the layer are emptied.

    On a GPU each layer is repeated as many times as the model has layers: in a model, the kernels
    of a layer are launched while those of the layer before still run.
    """
    variants = []
    repeats = _repeats(model, layout)
    hidden, calls = layer_calls(model, layout, inputs)
    for layer, blocks in _by_layer(_largest(layout)).items():
        within = replace(layout, blocks=layout.blocks_of_layer(layer))
        alone = _with_one_layer(model, layout, layer)
        call = calls[layout.layers[layer]]
        for block in blocks:
            for size in measured_sizes(block, rounding(block, round_to)):
                part = _cut(alone, within, block, size).get_submodule(layout.layers[layer])
                run = partial(part, hidden, *call.args, **call.kwargs)
                variants.append(_Variant(block, size, partial(_repeat, run, repeats)))
    return variants


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def _repeats(model: PreTrainedModel, layout: Layout) -> int:
    return 1 if model.device.type == "cpu" else _num_runs(layout)


def _largest(layout: Layout) -> list[Block]:
    """The largest block of every shape of sublayer; smaller ones are points on its curve."""
    found: dict[tuple[str, int], Block] = {}
    for block in layout.blocks:
        key = (block.kind, block.unit_width)
        if key not in found or block.num_units > found[key].num_units:
            found[key] = block
    return list(found.values())


def _by_layer(blocks: Sequence[Block]) -> dict[int, list[Block]]:
    layers: dict[int, list[Block]] = {}
    for block in blocks:
        layers.setdefault(block.layer, []).append(block)
    return layers


def rounding(block: Block, round_to: int | None) -> int:
    """The multiples of units that a block may keep; see `round_to` of `profile_latency`."""
    if block.kind == "head":
        return 1
    finest = max(1, block.num_units // ROUND_TO)
    return round_to or min(ROUND_TO, 1 << (finest.bit_length() - 1))


def measured_sizes(block: Block, round_to: int) -> list[int]:
    """Sizes to measure, increasing from 0: every number of heads; some multiples of neurons."""
    step = round_to
    if block.kind == "neuron":
        step *= -(-block.num_units // (round_to * MAX_SIZES))
    return [*range(0, block.num_units, step), block.num_units]


def _with_one_layer(model: PreTrainedModel, layout: Layout, layer: int) -> PreTrainedModel:
    """A copy that shares the weights of one layer; all other weights take no memory."""
    own = {id(tensor) for tensor in _tensors(model.get_submodule(layout.layers[layer]))}
    memo = {
        id(tensor): tensor if id(tensor) in own else _without_memory(tensor)
        for tensor in _tensors(model)
    }
    return copy.deepcopy(model, memo)


def _tensors(module: nn.Module) -> list[Tensor]:
    return list(chain(module.parameters(), module.buffers()))


def _without_memory(tensor: Tensor) -> Tensor:
    meta = tensor.detach().to("meta")
    return nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta


def _cut(model: PreTrainedModel, within: Layout, block: Block, size: int) -> PreTrainedModel:
    """A copy in which the blocks of a layer keep only `size` units of `block`."""
    masks = []
    for other in within.blocks:
        mask = torch.zeros(other.num_units)
        mask[: size if other == block else 0] = 1
        masks.append(mask)
    return compact(model, within, masks)


def _curve(
    layout: Layout,
    block: Block,
    timed: Sequence[tuple[_Variant, Timing]],
    round_to: int | None,
) -> LatencyCurve:
    """Milliseconds of one shape of sublayer: each size minus the layer with nothing left."""
    own = [(variant.size, timing) for variant, timing in timed if variant.block == block]
    emptied_ms = fmean(
        timing.median_ms
        for variant, timing in timed
        if variant.block.layer == block.layer and variant.size == 0
    )
    return LatencyCurve(
        kind=block.kind,
        hidden_size=layout.hidden_size,
        unit_width=block.unit_width,
        round_to=rounding(block, round_to),
        sizes=tuple(size for size, _ in own),
        ms=(0.0, *(max(0.0, timing.median_ms - emptied_ms) for _, timing in own[1:])),
        spreads=tuple(timing.spread for _, timing in own),
    )


def _layer_ms(timed: Sequence[tuple[_Variant, Timing]], largest: float) -> float:
    """Milliseconds of a layer with all sublayers emptied, at most its share of the rest."""
    return min(largest, fmean(timing.median_ms for variant, timing in timed if variant.size == 0))


def _num_runs(layout: Layout) -> int:
    return len(layout.execution_order) or len(layout.layers)


def _scaled(table: LatencyTable, layout: Layout) -> LatencyTable:
    """Scale the times of the sublayers: with the rest they must add up to the total."""
    full = sum(
        layout.num_runs(block)
        * float(table.curve_of(block, layout.hidden_size).costs(block.num_units)[-1])
        for block in layout.blocks
    )
    share = table.total_ms - table.rest_ms
    if full <= 0 or share <= 0:  # the sublayers take too little time to be measured
        scale, rest = 0.0, table.total_ms
    else:
        scale, rest = share / full, table.rest_ms
    curves = tuple(
        replace(curve, ms=tuple(scale * ms for ms in curve.ms)) for curve in table.curves
    )
    return replace(table, curves=curves, rest_ms=rest, scale=scale)
