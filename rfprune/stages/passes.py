"""The passes over the calibration batches in which gradients are collected.

A small model runs forward and backward as a whole, once per batch: one pass, with the statistics of
all blocks in memory. A model for which that takes too much memory is swept layer by layer (see
`rfprune.stages.layer_sweep`): one pass per layer, from the last to the first. The gradients are the
same to the bit. The sweep has a second forward pass and takes about 1.4 times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rfprune import distributed
from rfprune.errors import UserError
from rfprune.model.batch import decoder_token_mask, model_inputs, pack, token_mask
from rfprune.stages.calibration import Calibration
from rfprune.stages.objective import batch_generator, objective_values
from rfprune.stages.output_gradients import Watch

Step = Sequence[int | None]
"""The batch number of each process; None for a process without a batch."""

ValuesOf = Callable[[Any, int], list[Tensor]]
"""From the model's outputs on a batch, and the batch's number, to the values of the objective,
(B,) each, that are differentiated one after the other."""


@dataclass(frozen=True)
class Pass:
    """One pass over some calibration batches, for some layers.

    Attributes:
        layers: indices of the layers that are differentiated.
        blocks: numbers of their blocks in the layout.
        steps: the batches. All of this process must be passed to `gradients`, in this order.
        is_last: whether there is no later pass for these layers.
        gradients: from the number of a batch and what is watched to an iterator with one item for
            each objective value: the gradients of the watched tensors, including padding. The
            forward pass runs when the first item is requested. The iterator must be exhausted.
    """

    layers: tuple[int, ...]
    blocks: tuple[int, ...]
    steps: Sequence[Step]
    is_last: bool
    gradients: Callable[[int, Watch], Iterator[tuple[Tensor, ...]]]

    @property
    def own_batches(self) -> list[int]:
        """The numbers of the batches of this process."""
        own = (step[distributed.rank()] for step in self.steps)
        return [number for number in own if number is not None]


def batch_values(
    calibration: Calibration,
    outputs: Any,
    number: int,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """The values of the objective on one of the calibration batches; see `ValuesOf`.

    Args:
        generator: of sampled labels; that of the batch by default.
    """
    return objective_values(
        outputs,
        calibration.batches[number],
        calibration.model.config,
        generator or batch_generator(calibration.seed, number),
        objective=calibration.objective,
    )


def whole_model_pass(calibration: Calibration, values_of: ValuesOf, bar: Any) -> Pass:
    """The only pass of a model that runs as a whole.

    Args:
        values_of: of the objective.
        bar: progress bar, in batches.
    """

    def gradients(number: int, watch: Watch) -> Iterator[tuple[Tensor, ...]]:
        inputs = model_inputs(calibration.batches[number])
        with torch.inference_mode(False), torch.enable_grad():
            with watch.attached():
                predictions = calibration.model(**inputs, return_dict=True)
            try:
                values = values_of(predictions, number)
            except RuntimeError:  # of linear algebra on what is not finite
                _check_layers(calibration, number)
                raise
            totals = [value.sum() for value in values]
        if not all(torch.isfinite(total) for total in totals):
            _check_layers(calibration, number)
        tensors = watch.tensors
        for i, total in enumerate(totals):
            keep = i + 1 < len(totals)
            yield complete(optional_gradients([total], tensors, retain_graph=keep))
        bar.update()

    steps = distributed.steps(len(calibration.batches))
    bar.reset(total=len(steps))
    layers, blocks = (
        tuple(range(len(each))) for each in (calibration.layout.layers, calibration.layout.blocks)
    )
    return Pass(layers, blocks, steps, True, gradients)


def _check_layers(calibration: Calibration, number: int) -> None:
    """Run the model on a batch; see `check_finite`."""
    layout, batch = calibration.layout, calibration.batches[number]

    def hook_of(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        tokens = decoder_token_mask if layer in layout.layer_indices(decoder=True) else token_mask

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            check_finite(pack(states, tokens(batch)), layer)

        return hook

    with ExitStack() as stack, torch.no_grad():
        for layer, path in enumerate(layout.layers):
            module = calibration.model.get_submodule(path)
            stack.callback(module.register_forward_hook(hook_of(layer)).remove)
        calibration.model(**model_inputs(batch))


def check_finite(states: Tensor, layer: int) -> None:
    """Check the output of a layer.

    Raises:
        UserError: an entry is infinite or NaN; the layer is named.
    """
    if not torch.isfinite(states).all():
        raise UserError(
            f"the hidden states after layer.{layer} are not finite; check the checkpoint's "
            "weights, or calibrate in float32 (--dtype float32)"
        )


def optional_gradients(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    arriving: Sequence[Tensor] | None = None,
    *,
    retain_graph: bool = False,
) -> Sequence[Tensor | None]:
    """Gradients of outputs with respect to inputs; None for an input that has no influence.

    Args:
        arriving: gradients at the outputs; None for scalar outputs.
    """
    return torch.autograd.grad(
        outputs, inputs, arriving, retain_graph=retain_graph, allow_unused=True
    )


def complete(gradients: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Gradients; a missing one is an error.

    Raises:
        UserError: the objective does not depend on a tensor.
    """
    found = tuple(gradient for gradient in gradients if gradient is not None)
    if len(found) < len(gradients):
        raise UserError(
            "the loss does not depend on every layer of the model; compute it from the outputs "
            "of the last layer or of the head"
        )
    return found
