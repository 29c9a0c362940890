"""The layers and units of a report, and the names that people read.

An encoder-decoder has two stacks, each with layers numbered from 0. The decoder has a third kind of
units: cross-attention heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rfprune.report.report_json import Report

CROSS_HEADS = "cross_heads"
_KINDS = ("heads", CROSS_HEADS, "neurons")


@dataclass(frozen=True)
class Stack:
    """An encoder, a decoder, or the only stack of a model, which has no name.

    Attributes:
        name: "encoder", "decoder", or "".
        layers: positions of its layers in the report, first to last.
    """

    name: str
    layers: range

    def layer_name(self, position: int) -> str:
        """The layer at a position of the report, numbered within the stack: "decoder 0"."""
        return f"{self.name} {position - self.layers.start}".lstrip()

    def counts(self, layers: Sequence[Mapping[str, int]], kind: str) -> list[int]:
        """The units of a kind in its layers; empty if they have none of that kind."""
        return [layers[position][kind] for position in self.layers if kind in layers[position]]


def stacks_of(report: Report) -> tuple[Stack, ...]:
    """The stacks of layers in the order they run; the decoder is the one with cross-attention."""
    layers = report["layers"]
    split = next((index for index, layer in enumerate(layers) if CROSS_HEADS in layer), None)
    if split is None:
        return (Stack("", range(len(layers))),)
    return Stack("encoder", range(split)), Stack("decoder", range(split, len(layers)))


def stack_at(report: Report, position: int) -> Stack:
    """The stack of the layer at a position of the report."""
    stacks = stacks_of(report)
    return next((stack for stack in stacks if position in stack.layers), stacks[-1])


def kinds_of(report: Report) -> tuple[str, ...]:
    """The kinds of units in the order they run."""
    has_two = len(stacks_of(report)) > 1
    return tuple(kind for kind in _KINDS if has_two or kind != CROSS_HEADS)


def kind_name(report: Report, kind: str) -> str:
    """The name of a kind of units that people read."""
    if len(stacks_of(report)) == 1:
        return kind
    return {"heads": "self-attention heads", CROSS_HEADS: "cross-attention heads"}.get(kind, kind)


def removed_layers(report: Report) -> str:
    """The layers that were removed whole: "layers removed: 12 to 17 (of 30)"; else empty."""
    removed = report.get("removed_layers", ())
    parts = []
    for stack in stacks_of(report):
        own = [position - stack.layers.start for position in removed if position in stack.layers]
        if own:
            name = f"{stack.name} layers".lstrip()
            parts.append(f"{name} removed: {_as_ranges(own)} (of {len(stack.layers)})")
    return "; ".join(parts)


def _as_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: "1, 4 to 6"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
