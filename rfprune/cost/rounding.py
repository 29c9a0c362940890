"""Numbers of neurons that suit the hardware: multiples of 8, 16, 32 or 64.

Matrix units work in tiles: 1,537 neurons take as long as 1,600. A number of neurons that is not a
multiple gets an infinite cost, and no search chooses it. Heads are not restricted: their width is a
multiple already.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rfprune.cost.constraint import CostModel
from rfprune.model.layout import Layout


def restrict_to_multiples(costs: CostModel, layout: Layout, multiple: int | None) -> CostModel:
    """Set the cost of keeping n neurons to infinity unless n is a multiple.

    Args:
        costs: of the blocks of `layout`; not changed.
        multiple: of neurons to keep; None allows every number.

    Returns:
        A cost model with the same original cost. Keeping no neurons and keeping all neurons of a
        block are always allowed.
    """
    if multiple is None:
        return costs
    tables = list(costs.tables)
    for b, (block, table) in enumerate(zip(layout.blocks, costs.tables, strict=True)):
        if block.kind == "neuron":
            kept = np.arange(len(table))
            allowed = (kept % multiple == 0) | (kept == block.num_units)
            tables[b] = np.where(allowed, table, np.inf)
    return replace(costs, tables=tuple(tables))
