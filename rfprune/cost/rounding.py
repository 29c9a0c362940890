"""Sizes that hardware likes: neurons in whole multiples of 8, 16, 32 or 64.

Matrix units work in tiles: 1,537 neurons take as long as 1,600. So a number of neurons off the grid
is not allowed, which in a table of costs is an infinite cost. Heads are left alone: their width is
a multiple already.
"""

from __future__ import annotations

import numpy as np

from rfprune.cost.constraint import CostModel
from rfprune.model.layout import Layout


def on_grid(costs: CostModel, layout: Layout, multiple: int | None) -> CostModel:
    """The same costs, infinite for numbers of neurons that are no multiple; None: all are allowed.

    No neuron and all neurons of a block are always allowed, so whatever can be had without a grid
    at these ends can be had with it.
    """
    if multiple is None:
        return costs
    tables = list(costs.tables)
    for b, (block, table) in enumerate(zip(layout.blocks, costs.tables, strict=True)):
        if block.kind == "neuron":
            kept = np.arange(len(table))
            allowed = (kept % multiple == 0) | (kept == block.num_units)
            tables[b] = np.where(allowed, table, np.inf)
    return CostModel(costs.metric, tuple(tables), costs.constant)
