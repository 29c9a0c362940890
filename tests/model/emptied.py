"""Masks that empty whole sublayers, for the tests of several modules."""

from __future__ import annotations

from rfprune.model.layout import Layout
from rfprune.model.masks import Masks, full_masks


def emptied(layout: Layout, *empty: str) -> Masks:
    """Masks that remove all units of the named blocks and one unit of every other block that has
    several."""
    masks = full_masks(layout)
    for block, mask in zip(layout.blocks, masks, strict=True):
        mask[: block.num_units if block.name in empty else min(1, block.num_units - 1)] = 0
    return masks
