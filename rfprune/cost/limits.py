"""What a user allows each block to keep: protected layers and sublayers, and floors.

Numbers of units that are not allowed get an infinite cost, so no search chooses them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from rfprune.cost.constraint import CostModel
from rfprune.errors import UserError
from rfprune.model.layout import Layout
from rfprune.settings import PROTECTED, Settings


def protected_blocks(layout: Layout, names: Collection[str]) -> set[str]:
    """The names of the blocks that stay whole.

    Args:
        names: "layer.0" for all sublayers of a layer (layer.-1 is the last, layer.0-3 four layers),
            "layer.0.heads" for one of them, or "heads" for those of all layers.

    Raises:
        UserError: the model has no such layer or sublayer.
    """
    blocks: set[str] = set()
    for name in names:
        found = re.fullmatch(PROTECTED, name)
        assert found is not None, "Settings has checked it"
        sublayer = found["sublayer"] or found["alone"]
        layers = _layers(layout, name, found["first"], found["last"])
        chosen = [
            block
            for block in layout.blocks
            if block.layer in layers and sublayer in (None, block.sublayer.name)
        ]
        known = {block.sublayer.name for block in layout.blocks}
        if sublayer is not None and sublayer not in known:
            there = " and ".join(sorted(known))
            raise UserError(f"--protect {name} names {sublayer}, but this model has {there}")
        blocks |= {block.name for block in chosen}
    return blocks


def _layers(layout: Layout, name: str, first: str | None, last: str | None) -> range:
    number = len(layout.layers)
    if first is None:
        return range(number)
    start = int(first) + (number if int(first) < 0 else 0)
    end = start if last is None else int(last)
    if not 0 <= start <= end < number:
        raise UserError(
            f"--protect {name} is not in this model, which has the layers 0 to {number - 1}"
        )
    return range(start, end + 1)


def restrict_to_limits(costs: CostModel, layout: Layout, settings: Settings) -> CostModel:
    """Set the cost of keeping n units to infinity where protection or floors forbid n.

    A block with fewer units than a floor stays whole, and so does one whose heads are one unit
    (`Sublayer.one_unit`): a norm follows, so its output keeps its length whatever it is scaled by,
    and gradients do not tell what its removal would cost.

    Args:
        costs: of the blocks of `layout`; not changed.

    Returns:
        A cost model with the same original cost.

    Raises:
        UserError: a protected layer or sublayer does not exist, or no block is as large as a floor.
    """
    floors = {"head": settings.min_heads, "neuron": settings.min_neurons}
    whole = protected_blocks(layout, settings.protect)
    whole |= {block.name for block in layout.blocks if block.sublayer.one_unit}
    if not whole and not any(floors.values()):
        return costs
    for kind, floor in floors.items():
        largest = max((b.num_units for b in layout.blocks if b.kind == kind), default=0)
        if floor > largest:
            raise UserError(
                f"--min-{kind}s {floor} (min_{kind}s) is more than the {largest} {kind}s of a "
                f"layer: choose {largest} or less"
            )
    tables = []
    for block, table in zip(layout.blocks, costs.tables, strict=True):
        units = block.num_units
        least = units if block.name in whole else min(units, floors[block.kind])
        tables.append(np.where(np.arange(len(table)) >= least, table, np.inf))
    return replace(costs, tables=tuple(tables))


def exact_costs(layout: Layout, kept: Sequence[int]) -> CostModel:
    """Costs of 0 for keeping `kept[b]` units of each block b, and infinite for all other sizes."""
    tables = [np.full(block.num_units + 1, np.inf) for block in layout.blocks]
    for table, number in zip(tables, kept, strict=True):
        table[number] = 0.0
    return CostModel("sizes", tuple(tables))
