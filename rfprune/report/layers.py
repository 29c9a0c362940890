"""Which layers and units a report has, and what they are called.

An encoder-decoder has two stacks, whose layers count from 0 each, and in the second one a third
kind of units: the heads that read the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CROSS_HEADS = "cross_heads"
_KINDS = ("heads", CROSS_HEADS, "neurons")
_MOST_NUMBERS = 12
"""On an axis; more run into one another on a phone."""

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """A stack of layers: encoder, decoder, or all there is, without a name.

    `layers`: their places in the report, first to last.
    """

    name: str
    layers: range

    def called(self, place: int) -> str:
        """A layer by its number within the part."""
        return f"{self.name} {place - self.layers.start}".lstrip()

    def having(self, layers: Sequence[Mapping[str, int]], kind: str) -> list[int]:
        """What its layers have of a kind of units; nothing where they have none of that kind."""
        return [layers[place][kind] for place in self.layers if kind in layers[place]]


def parts_of(report: Report) -> tuple[Part, ...]:
    """The stacks, in the order in which they run; a decoder begins where an encoder is read."""
    layers = report["layers"]
    split = next((place for place, layer in enumerate(layers) if CROSS_HEADS in layer), None)
    if split is None:
        return (Part("", range(len(layers))),)
    return Part("encoder", range(split)), Part("decoder", range(split, len(layers)))


def part_of(report: Report, place: int) -> Part:
    """The stack that a layer is in."""
    parts = parts_of(report)
    return next((part for part in parts if place in part.layers), parts[-1])


def kinds_of(report: Report) -> tuple[str, ...]:
    """Kinds of units, in the order in which they run."""
    has_two = len(parts_of(report)) > 1
    return tuple(kind for kind in _KINDS if has_two or kind != CROSS_HEADS)


def kind_name(report: Report, kind: str) -> str:
    """Of a kind of units, as people read it."""
    if len(parts_of(report)) == 1:
        return kind
    return {"heads": "self-attention heads", CROSS_HEADS: "cross-attention heads"}.get(kind, kind)


def number_layers(axis: Axes, report: Report, colour: str) -> None:
    """Layers along the x axis, from 0 in each stack, with a line of that colour between stacks."""
    parts = parts_of(report)
    count = len(report["layers"])
    step = -(-count // _MOST_NUMBERS)
    places = [place for part in parts for place in part.layers[::step]]
    axis.set_xlim(-0.6, count - 0.4)
    axis.set_xticks(places, [part_of(report, p).called(p).split()[-1] for p in places])
    if len(parts) == 1:
        axis.set_xlabel("layer")
        return
    axis.axvline(parts[1].layers.start - 0.5, color=colour, linestyle=":", linewidth=1)
    middles = [(part.layers[0] + part.layers[-1]) / 2 for part in parts if part.layers]
    names = [f"\n{part.name} layer" for part in parts if part.layers]
    axis.xaxis.remove_overlapping_locs = False  # a name and a number may share a place
    axis.set_xticks(middles, names, minor=True)
    axis.tick_params(axis="x", which="minor", length=0)
