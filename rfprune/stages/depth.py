"""Which layers to remove whole: candidates from the change of the hidden state, and their true
divergence.

The layers of a deep model are redundant together: a run of consecutive layers may hardly turn the
hidden state, although each of its blocks has an error of its own. `state_distances` runs the model
once over a few batches and compares the hidden states before and after every run, as Gromov et al.
2024 ("The Unreasonable Ineffectiveness of the Deeper Layers", arXiv 2403.17887, section 3.2) do;
there by the angle at the last token, here by the cosine at all tokens. `propose` makes a handful of
candidates:

- the runs of the smallest distances,
- the layers of the smallest distances one by one, their block influence (Men et al. 2024, ShortGPT,
  arXiv 2403.03853, section 3.2),
- the layers of the smallest summed errors of their blocks,

or all sets of layers where these are few. `mean_divergences` then decides: the predictions of the
model without these layers, on held-out batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from rfprune.model.batch import Batch, model_inputs, pack
from rfprune.model.encoder_decoder import (
    block_token_mask,
    encoder_output,
    inputs_with_encoder_output,
)
from rfprune.model.layerwise import layer_calls, run_layer
from rfprune.model.layout import Layout
from rfprune.stages.objective import prediction_errors

Distances = NDArray[np.float64]
"""(n + 1, n + 1) for a stack of n layers: entry (a, b) is one minus the mean cosine of the
hidden states before layer a and before layer b; n stands for the end of the stack. Entry (a, a + 1)
is the block influence of layer a."""

MAX_SETS = 64
"""All sets of layers are compared if there are no more than these."""

NUM_RUNS = 3
"""How many runs of consecutive layers are candidates."""

MAX_PAIRS = 16
"""How many sets of layers of an encoder and a decoder are candidates."""


@dataclass(frozen=True)
class StackOfLayers:
    """What is known about the layers of one stack.

    Attributes:
        removable: layers that may be removed, by their number in the stack.
        distances: see `Distances`.
        errors: (n,) summed errors of the blocks of each layer, or None.
    """

    removable: tuple[int, ...]
    distances: Distances
    errors: NDArray[np.float64] | None = None

    @property
    def num_layers(self) -> int:
        """Layers of the stack."""
        return len(self.distances) - 1

    def distance(self, layers: Sequence[int]) -> float:
        """Summed distances of the runs of consecutive layers among these."""
        return float(sum(self.distances[start, end] for start, end in runs_of(layers)))

    @property
    def max_removed(self) -> int:
        """How many layers may be removed: one must stay."""
        return min(len(self.removable), self.num_layers - 1)


def state_distances(
    model: PreTrainedModel, layout: Layout, batches: Sequence[Batch]
) -> list[Distances]:
    """Distances between the hidden states of a model, for each of its stacks.

    Args:
        model: frozen.
        layout: its layers.
        batches: with token masks, on the model's device.
    """
    sums = [np.zeros((len(indices) + 1,) * 2) for indices in layout.stacks()]
    tokens = [0 for _ in sums]
    with torch.no_grad():
        for batch in batches:
            for number, states in enumerate(_states_of_stacks(model, layout, batch)):
                sums[number] += _distances(states)
                tokens[number] += states.shape[1]
    return [total / count for total, count in zip(sums, tokens, strict=True)]


def _states_of_stacks(model: PreTrainedModel, layout: Layout, batch: Batch) -> Iterator[Tensor]:
    """Hidden states (n + 1, tokens, d) before each layer of a stack and at its end."""
    for number, indices in enumerate(layout.stacks()):
        inputs = None
        if number:
            inputs = inputs_with_encoder_output(batch, encoder_output(model, batch))
        block = next(block for block in layout.blocks if block.layer in indices)
        mask = block_token_mask(layout, block, batch)
        hidden, calls = layer_calls(model, layout, batch, decoder_inputs=inputs)
        states = [pack(hidden, mask)]
        for layer in indices:
            hidden = run_layer(model, layout.layers[layer], hidden, calls)
            states.append(pack(hidden, mask))
        yield torch.stack(states)


def _distances(states: Tensor) -> Distances:
    """Sums over tokens of one minus the cosine of two of the states (n, tokens, d)."""
    directions = functional.normalize(states.float(), dim=-1)
    cosines = torch.einsum("atd,btd->ab", directions, directions)
    distances: Distances = states.shape[1] - cosines.cpu().double().numpy()
    return distances


def by_block_influence(stack: StackOfLayers, number: int) -> tuple[int, ...]:
    """The layers of the least block influence, as in ShortGPT."""
    return _least(stack, np.diagonal(stack.distances, 1), number)


def _least(stack: StackOfLayers, scores: NDArray[np.float64], number: int) -> tuple[int, ...]:
    ordered = sorted(stack.removable, key=scores.tolist().__getitem__)
    return tuple(sorted(ordered[:number]))


def propose(
    stacks: Sequence[StackOfLayers], number: int, max_surplus: int | None = None
) -> list[tuple[int, ...]]:
    """Sets of `number` layers that may be removed, the most promising first.

    Args:
        stacks: one, or the encoder and the decoder, whose layers are counted on.
        max_surplus: how many more layers the encoder may lose than the decoder; None: any number.

    Returns:
        Ascending numbers of layers; nothing if so many layers cannot be removed.

    Example:
        Of four layers the two in the middle hardly change the hidden state:

        >>> import numpy as np
        >>> positions = np.array([0.0, 0.3, 0.31, 0.32, 0.6])
        >>> distances = abs(positions[:, None] - positions)
        >>> propose([StackOfLayers((0, 1, 2, 3), distances)], number=2)[0]
        (1, 2)
    """
    if len(stacks) == 1:
        return _propose(stacks[0], number)
    encoder, decoder = stacks
    pairs = [
        (first, second)
        for share in range(number + 1)
        if max_surplus is None or share - (number - share) <= max_surplus
        for first in _propose(encoder, share)[:NUM_RUNS]
        for second in _propose(decoder, number - share)[:NUM_RUNS]
    ]
    pairs.sort(key=lambda pair: encoder.distance(pair[0]) + decoder.distance(pair[1]))
    start = encoder.num_layers
    return [(*first, *(start + layer for layer in second)) for first, second in pairs[:MAX_PAIRS]]


def _propose(stack: StackOfLayers, number: int) -> list[tuple[int, ...]]:
    """The same for one stack."""
    if number > stack.max_removed:
        return []
    if number == 0:
        return [()]
    if math.comb(len(stack.removable), number) <= MAX_SETS:
        return sorted(combinations(stack.removable, number), key=stack.distance)
    allowed = set(stack.removable)
    runs = [
        tuple(range(start, start + number))
        for start in range(stack.num_layers - number + 1)
        if allowed.issuperset(range(start, start + number))
    ]
    found = sorted(runs, key=stack.distance)[:NUM_RUNS]
    found.append(by_block_influence(stack, number))
    if stack.errors is not None:
        found.append(_least(stack, stack.errors, number))
    return list(dict.fromkeys(found))


def runs_of(layers: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers: first, and last plus one.

    Example:
        >>> runs_of([1, 2, 5])
        [(1, 3), (5, 6)]
    """
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer + 1 for layer in layers if layer + 1 not in layers]
    return list(zip(starts, ends, strict=True))


def mean_divergences(
    teacher: PreTrainedModel,
    students: Sequence[PreTrainedModel],
    batches: Sequence[Batch],
    loss: Callable[[object, Batch], Tensor] | None = None,
) -> list[float]:
    """How far the predictions of each student are from the teacher's, per example.

    Args:
        teacher: frozen.
        students: frozen.
        batches: with token masks.
        loss: of the user; its mean then takes the place of the divergence.
    """
    totals = [0.0 for _ in students]
    examples = 0
    with torch.no_grad():
        for batch in batches:
            inputs = model_inputs(batch)
            reference = None if loss else teacher(**inputs, return_dict=True)
            examples += len(next(iter(inputs.values())))
            for number, student in enumerate(students):
                outputs = student(**inputs, return_dict=True)
                found = prediction_errors(reference, outputs, batch, teacher.config, loss)
                totals[number] += float(found.cpu().double().sum())
    return [total / examples for total in totals]
