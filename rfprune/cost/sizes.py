"""Explicit sizes: how many heads and neurons every layer keeps, instead of a constraint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rfprune.errors import UserError
from rfprune.model.layout import Layout


@dataclass(frozen=True)
class Sizes:
    """The units that every layer keeps; the method chooses which ones.

    Attributes:
        layers: for every layer the number of units by kind: "heads", "neurons" and, in decoders of
            encoder-decoders, "cross_heads". A kind that is left out keeps all its units. This is
            the entry "layers" of report.json, and `PruneResult.layers`.

    Raises:
        UserError: an entry is not a number of units by kind.

    Example:
        >>> from rfprune import Sizes
        >>> Sizes(({"heads": 3, "neurons": 8}, {"heads": 2})).layers[1]
        {'heads': 2}
    """

    layers: Sequence[Mapping[str, int]]

    def __post_init__(self) -> None:
        given: Any = self.layers
        if not isinstance(given, list | tuple) or not all(
            isinstance(one, Mapping) for one in given
        ):
            raise UserError(
                'sizes are a list with an entry per layer, such as [{"heads": 3, "neurons": 8}]'
            )
        for layer, sizes in enumerate(given):
            for kind, number in sizes.items():
                if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                    raise UserError(
                        f"layer {layer} of the sizes has {number!r:.40} for {kind!r:.40}, which is "
                        "not a number of units"
                    )
        object.__setattr__(self, "layers", tuple(dict(sizes) for sizes in given))

    @classmethod
    def load(cls, path: Path) -> Sizes:
        """Read a JSON file: such a list, or a report.json.

        Raises:
            UserError: the file is missing, is not such a list or report, or is the report of a
                model without some of its layers.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"--sizes {path} is missing or not JSON ({type(error).__name__}): give a list of "
                "sizes, or the report.json of a run"
            ) from error
        if isinstance(found, dict) and found.get("removed_layers"):
            raise UserError(
                f"--sizes {path} is the report of a run that removed layers whole "
                f"({found['removed_layers']}), and sizes keep all layers: give --depth and "
                "--constraint as that run did"
            )
        if isinstance(found, dict) and "layers" in found:
            found = found["layers"]
        return cls(found)

    def kept(self, layout: Layout) -> tuple[int, ...]:
        """The number of units that each block of a layout keeps.

        Raises:
            UserError: the sizes do not fit the model, or nothing or everything is kept.
        """
        if len(self.layers) != len(layout.layers):
            raise UserError(
                f"the sizes are of {len(self.layers)} layers and the model has "
                f"{len(layout.layers)}: give the sizes of this model"
            )
        blocks = {(block.layer, block.sublayer.name): block for block in layout.blocks}
        for layer, sizes in enumerate(self.layers):
            for kind, number in sizes.items():
                units = blocks[layer, kind].num_units if (layer, kind) in blocks else 0
                if number > units:
                    raise UserError(
                        f"the sizes keep {number} {kind} in layer {layer}, which has {units}: give "
                        "the sizes of this model"
                    )
        kept = tuple(
            self.layers[block.layer].get(block.sublayer.name, block.num_units)
            for block in layout.blocks
        )
        if not any(kept):
            raise UserError("the sizes keep no head and no neuron at all: keep at least one")
        if kept == tuple(block.num_units for block in layout.blocks):
            raise UserError("the sizes keep every head and neuron: there is nothing to prune")
        return kept
