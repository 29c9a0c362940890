"""The pruning problem: a model, its calibration data and all choices, made once for a whole run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedModel

from rfprune.cache import Tensors, load_or_collect
from rfprune.errors import UserError
from rfprune.latency.table import LatencyTable
from rfprune.model.batch import LABEL_NAMES, Batch, split_batch, to_device, token_mask
from rfprune.model.encoder_decoder import add_decoder_inputs
from rfprune.model.frozen import frozen
from rfprune.model.layerwise import add_image_token_mask
from rfprune.model.layout import Layout, layout_of
from rfprune.model.rebuild import check_rebuildable, warn_of_own_class
from rfprune.model.validation import check_finite_weights, check_layer_outputs, check_pad_token
from rfprune.result import StageTimer
from rfprune.settings import Settings
from rfprune.stages.calibration import Calibration
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
        )

    def with_model(self, student: PreTrainedModel) -> Problem:
        """The same problem for a model that has been pruned already. Its statistics are not cached,
        since no other run can use them."""
        return replace(self, model=student, layout=layout_of(student), cache=None)

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
    layout = layout_of(model)
    check_finite_weights(model)
    check_rebuildable(model)
    warn_of_own_class(model)
    prepared = [
        add_token_mask(model, layout, part)
        for batch in batches
        for part in split_batch(model, to_device(batch, model.device))
    ]
    if not any(token_mask(batch).any() for batch in prepared) or not layout.blocks:
        raise UserError(
            f"there is nothing to calibrate on, or nothing to prune ({len(prepared)} batches, "
            f"{len(layout.blocks)} blocks); give at least one example, and a model with heads or "
            "neurons"
        )
    check_pad_token(model, prepared)
    with frozen(model):
        check_layer_outputs(model, layout, prepared[0])
    folder = None if cache is None else Path(cache)
    return Problem(model, layout, prepared, settings, loss, latency_table, folder, progress)


def add_token_mask(model: PreTrainedModel, layout: Layout, batch: Batch) -> Batch:
    """Add to a batch what only the model knows: the token masks of images and of decoders."""
    if layout.is_encoder_decoder:
        return add_decoder_inputs(model, batch)
    return add_image_token_mask(model, layout, batch)
