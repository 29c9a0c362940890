"""What is differentiated with respect to: the outputs of linear maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import islice
from typing import Protocol

from torch import Tensor, nn

RecordRun = Callable[[Tensor, Tensor], None]
"""A function that stores or sums the input and output of a map that it is called with."""


class Watch(Protocol):
    """Tensors of a forward pass with respect to which an objective is differentiated."""

    def attached(self) -> AbstractContextManager[None]:
        """A context in which a forward pass meets, or makes, the tensors."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The tensors, after the forward pass."""


class LinearOutputs:
    """The outputs of linear maps, such as the consumers of blocks, and a record of their inputs.

    Args:
        model: that has the maps.
        paths: of the maps.
        record: one function per map, if any. It is called once for each run of the map with its
            input, (B, S, p) or (B * S, p), and its output, detached.
    """

    def __init__(
        self, model: nn.Module, paths: Sequence[str], record: Sequence[RecordRun] = ()
    ) -> None:
        self._maps = [model.get_submodule(path) for path in paths]
        self._record = record or [_ignore] * len(paths)
        self._outputs: list[list[Tensor]] = [[] for _ in paths]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """A context in which the maps have hooks."""
        watched = zip(self._maps, self._record, self._outputs, strict=True)
        with ExitStack() as stack:
            for module, record, outputs in watched:
                hook = _recording_hook(record, outputs)
                stack.callback(module.register_forward_hook(hook).remove)
            yield

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The outputs of all runs of the first map, then of the second, ..."""
        return [output for outputs in self._outputs for output in outputs]

    def by_map(self, gradients: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Gradients in the order of `tensors`: for every map those of its runs."""
        left = iter(gradients)
        return [tuple(islice(left, len(outputs))) for outputs in self._outputs]


def _ignore(_: Tensor, __: Tensor) -> None:
    """A `RecordRun` that does nothing."""


def _recording_hook(
    record: RecordRun, outputs: list[Tensor]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        record(inputs[0].detach(), output.detach())
        if not output.requires_grad:  # the first block of a frozen model: its output is a leaf
            output = output.detach().requires_grad_()
        outputs.append(output)
        return output

    return hook
