"""The pruning problem: a model, its calibration data and all choices, made once for a whole run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from rfprune.cache import Tensors, load_or_collect
from rfprune.errors import UserError, as_path
from rfprune.latency.table import LatencyTable
from rfprune.methods.sample import sample_warnings
from rfprune.model.batch import LABEL_NAMES, Batch, split_batch, token_mask
from rfprune.model.encoder_decoder import add_decoder_inputs
from rfprune.model.frozen import default_torch_state, frozen
from rfprune.model.layerwise import add_signal_token_mask
from rfprune.model.layout import Layout, layout_of
from rfprune.model.rebuild import check_rebuildable, warn_of_own_class
from rfprune.model.residency import execution_device
from rfprune.model.unwrapped import unwrapped
from rfprune.model.validation import (
    check_layer_outputs,
    check_pad_token,
    check_weights,
    checked_batches,
    running_on,
)
from rfprune.result import StageTimer
from rfprune.settings import WEIGHT_CRITERIA, Settings
from rfprune.stages.calibration import Calibration
from rfprune.stages.collection import check_objective
from rfprune.stages.objective import LABELLED, PREDICTIONS, Loss, Objective


@dataclass(frozen=True)
class Problem:
    """What all stages of a run share.

    Attributes:
        model: the model to prune; it is never changed.
        layout: its blocks.
        batches: calibration batches on the model's device, with token masks and labels.
        settings: method and options.
        loss: of the user; None to differentiate the model's own predictions, or the loss on labels.
        latency_table: needed for constraints on latency.
        cache: folder of the cache; None for no cache.
        progress: show progress bars.
        timer: takes the seconds of each stage.
        warnings: about the batches; see `rfprune.methods.sample`.
        untrimmed: the model before its vocabulary was trimmed, to whose parameters and bytes
            constraints refer; None if it was not.
        max_bytes: see `rfprune.stages.calibration.Calibration`.
    """

    model: PreTrainedModel
    layout: Layout
    batches: Sequence[Batch]
    settings: Settings
    loss: Loss | None = None
    latency_table: LatencyTable | None = None
    cache: Path | None = None
    progress: bool = False
    timer: StageTimer = field(default_factory=StageTimer)
    warnings: tuple[str, ...] = ()
    untrimmed: PreTrainedModel | None = None
    max_bytes: int | None = None

    @property
    def original(self) -> PreTrainedModel:
        """The model to whose parameters and bytes constraints refer."""
        return self.model if self.untrimmed is None else self.untrimmed

    @property
    def inputs(self) -> list[Batch]:
        """The batches without labels."""
        return [
            {name: value for name, value in batch.items() if name not in LABEL_NAMES}
            for batch in self.batches
        ]

    @property
    def objective(self) -> Objective:
        """What is differentiated to collect statistics."""
        if self.loss is not None:
            return self.loss
        return LABELLED if self.settings.use_labels else PREDICTIONS

    @property
    def calibration(self) -> Calibration:
        """What statistics are collected from; with labels only if the objective needs them, since
        cached statistics depend on every entry of the batches."""
        return Calibration(
            self.model,
            self.layout,
            self.inputs if self.objective == PREDICTIONS else self.batches,
            self.objective,
            self.settings.seed,
            self.progress,
            self.max_bytes,
        )

    def with_model(self, student: PreTrainedModel) -> Problem:
        """The same problem for a model that has been pruned already. Its statistics are not cached,
        since no other run can use them."""
        return replace(self, model=student, layout=layout_of(student), cache=None, untrimmed=None)

    def with_own_timer(self) -> Problem:
        """The same problem with a copy of its timer, for one constraint of several."""
        return replace(self, timer=self.timer.fork())

    def load_or_collect(self, collect: Callable[[Problem], Tensors]) -> Tensors:
        """Statistics from the cache, or collected and cached.

        With a loss of the user nothing is cached: two losses cannot be told apart.
        """
        folder = self.cache if self.loss is None else None
        return load_or_collect(
            lambda: collect(self),
            folder,
            self.model,
            self.calibration.batches,
            self.settings,
            self.timer,
        )


def prepare_problem(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    settings: Settings,
    *,
    loss: Loss | None = None,
    latency_table: LatencyTable | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Problem:
    """Check a model and its calibration batches, and make the problem of a run.

    The parameters are the seven of `rfprune.prune` besides the constraint; `prune` explains them.

    Raises:
        UserError: the model type is not supported, the weights are not finite, the pruned model
            could not be loaded again, or there is no example or no block.
    """
    _check_arguments(settings, loss, latency_table)
    folder = None if cache is None else as_path(cache, "cache").expanduser()
    model = unwrapped(model)
    layout = layout_of(model)
    check_weights(model)
    check_rebuildable(model)
    warn_of_own_class(model)
    if not layout.blocks:
        raise UserError(
            "there is nothing to prune: this model has no heads or neurons left; give a model with "
            "heads or neurons"
        )
    labelled = loss is None and settings.use_labels
    given = list(checked_batches(model, batches, labelled=labelled))
    with default_torch_state(execution_device(model)):
        _check_runs(model, layout, given)
        prepared = [
            add_token_mask(model, layout, part)
            for batch in given
            for part in split_batch(model, batch)
        ]
        if not any(token_mask(batch).any() for batch in prepared):
            raise UserError(
                f"there is nothing to calibrate on: {len(prepared)} batches hold no token; give at "
                "least one example"
            )
        check_pad_token(model, prepared)
        problem = Problem(model, layout, prepared, settings, loss, latency_table, folder, progress)
        _check_objective(problem)
    return replace(problem, warnings=tuple(sample_warnings(model, layout, prepared)))


def _check_arguments(settings: Any, loss: Any, latency_table: Any) -> None:
    if not isinstance(settings, Settings):
        raise UserError(
            f"settings is a {type(settings).__name__}; give Settings(...), such as "
            "Settings(method='kwon')"
        )
    if loss is not None and not callable(loss):
        raise UserError(
            f"loss is a {type(loss).__name__}; give a function of the model's outputs and a batch"
        )
    if latency_table is not None and not isinstance(latency_table, LatencyTable):
        raise UserError(
            f"latency_table is a {type(latency_table).__name__}; give LatencyTable.load(file)"
        )


def _check_runs(model: PreTrainedModel, layout: Layout, batches: Sequence[Batch]) -> None:
    """Run the model on an example of the longest batch, and of the first one with each set of
    entries.

    Raises:
        UserError: the model cannot run, or its layers do not return what its family's row says.
    """
    first = {frozenset(batch): number for number, batch in reversed(list(enumerate(batches)))}
    sizes = [sum(value[0].numel() for value in batch.values()) for batch in batches]
    longest = [sizes.index(max(sizes))] if sizes else []
    for number in sorted({*first.values(), *longest}):
        example = {name: value[:1] for name, value in batches[number].items()}
        with frozen(model), running_on(model, number):
            check_layer_outputs(model, layout, add_token_mask(model, layout, example))


def _check_objective(problem: Problem) -> None:
    """Differentiate the objective of one example; a loss of the user that of the first batch.

    Raises:
        UserError: the objective is not defined for this model and these batches.
    """
    settings, calibration = problem.settings, problem.calibration
    if settings.method == "importance" and settings.importance in WEIGHT_CRITERIA:
        return
    batch = calibration.batches[0]
    attempt: AbstractContextManager[None] = nullcontext()  # an error in a user's loss is theirs
    if problem.loss is None:
        batch = {name: value[:1] for name, value in batch.items()}
        attempt = running_on(problem.model, 0)
    with frozen(problem.model), attempt:
        check_objective(calibration, batch)


def add_token_mask(model: PreTrainedModel, layout: Layout, batch: Batch) -> Batch:
    """Add to a batch what only the model knows: the token masks of images, audio and decoders."""
    batch = add_signal_token_mask(model, layout, batch)
    return add_decoder_inputs(model, batch) if layout.is_encoder_decoder else batch
