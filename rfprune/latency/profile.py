"""Measure a latency table on a model's own modules.

For every shape of sublayer one real layer is copied, that sublayer cut to n units and all else in
the layer emptied; what this takes more than the layer with everything emptied is the sublayer's
time. All sizes are timed in one rotation with the whole model, and with the whole model emptied:
machine and caches are the same for all, and weights come from memory as they do in the model.
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
from rfprune.latency.conditions import Conditions, conditions_of
from rfprune.latency.table import LatencyCurve, LatencyTable, check_table, scaled, shape_of
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

MAX_POINTS = 24


@dataclass(frozen=True)
class _Variant:
    """A sublayer of some size, alone in its layer."""

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
    timings = [*timings[:2], *(_each(timing, _repeats(model, layout)) for timing in timings[2:])]
    return _table(layout, conditions, timings[:2], variants, timings[2:], round_to)


def _variants(
    model: PreTrainedModel, layout: Layout, inputs: Batch, round_to: int | None
) -> list[_Variant]:
    """Every size that is measured; size 0 is the layer with everything emptied.

    On a GPU a layer runs as often in a row as the model has layers: there the work of one is asked
    for while that of the one before is done, which alone it would wait for.
    """
    made = []
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
                made.append(_Variant(block, size, partial(_repeat, run, repeats)))
    return made


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def _repeats(model: PreTrainedModel, layout: Layout) -> int:
    return 1 if model.device.type == "cpu" else max(len(layout.layers), len(layout.execution_order))


def _largest(layout: Layout) -> list[Block]:
    """Of every shape of sublayer the largest: smaller ones are points on its curve."""
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
    """The multiples in which units of a block are kept."""
    if block.kind == "head":
        return 1
    finest = max(1, block.num_units // ROUND_TO)
    return round_to or min(ROUND_TO, 1 << (finest.bit_length() - 1))


def measured_sizes(block: Block, round_to: int) -> list[int]:
    """Sizes to measure, up from 0: all heads; of neurons so many multiples, and all."""
    step = round_to
    if block.kind == "neuron":
        step *= -(-block.num_units // (round_to * MAX_POINTS))
    return [*range(0, block.num_units, step), block.num_units]


def _each(timing: Timing, repeats: int) -> Timing:
    return replace(timing, median_ms=timing.median_ms / repeats)


def _with_one_layer(model: PreTrainedModel, layout: Layout, layer: int) -> PreTrainedModel:
    """A copy that shares the weights of one layer, and in which all others have no memory."""
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
    """Only `size` units of `block` stay of a layer's blocks."""
    masks = []
    for other in within.blocks:
        mask = torch.zeros(other.num_units)
        mask[: size if other == block else 0] = 1
        masks.append(mask)
    return compact(model, within, masks)


def _table(
    layout: Layout,
    conditions: Conditions,
    whole: Sequence[Timing],
    variants: Sequence[_Variant],
    timings: Sequence[Timing],
    round_to: int | None,
) -> LatencyTable:
    """From what was timed to what sublayers take."""
    total, emptied = whole
    curves = []
    for block in _largest(layout):
        own = [
            (variant.size, timing)
            for variant, timing in zip(variants, timings, strict=True)
            if variant.block == block
        ]
        base = fmean(
            timing.median_ms
            for variant, timing in zip(variants, timings, strict=True)
            if variant.block.layer == block.layer and variant.size == 0
        )
        curves.append(
            LatencyCurve(
                kind=block.kind,
                hidden_size=layout.hidden_size,
                unit_width=block.unit_width,
                round_to=rounding(block, round_to),
                sizes=tuple(size for size, _ in own),
                ms=(0.0, *(max(0.0, timing.median_ms - base) for _, timing in own[1:])),
                spreads=tuple(timing.spread for _, timing in own),
            )
        )
    unscaled = LatencyTable(
        model=shape_of(layout),
        conditions=conditions,
        total_ms=total.median_ms,
        total_spread=total.spread,
        rest_ms=emptied.median_ms,
        curves=tuple(curves),
        scale=1.0,
        rounds=total.rounds,
    )
    return _adding_up(unscaled, layout)


def _adding_up(table: LatencyTable, layout: Layout) -> LatencyTable:
    """Scale what sublayers take so that they and the rest make the total."""
    full = sum(
        layout.num_runs(block)
        * float(table.curve_of(block, layout.hidden_size).costs(block.num_units)[-1])
        for block in layout.blocks
    )
    share = table.total_ms - table.rest_ms
    if full <= 0 or share <= 0:  # too small a model to see what its sublayers take
        scale, rest = 0.0, table.total_ms
    else:
        scale, rest = share / full, table.rest_ms
    curves = tuple(scaled(curve, scale) for curve in table.curves)
    return replace(table, curves=curves, rest_ms=rest, scale=scale)
