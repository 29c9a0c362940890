"""Tuning: least squares of a pruned student against its teacher.

`tune_scales` is the mask tuning of Kwon et al. 2022, section 4.3: one scale per kept unit.
`refit` fits all weights of each output projection and its bias. It contains the scales as a special
case and costs the same.

Departures from the authors' code:

- The damped solve is in closed form and in float64; see `rfprune.stages.least_squares`.
- A block whose solve fails keeps its weights and is reported. There, tuning ends for all later
  layers without a message.
- No intercept is fitted for the scales. There, one is fitted and not used.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from rfprune.model.batch import Batch
from rfprune.model.layout import Block, Layout
from rfprune.stages.least_squares import (
    DampedSolver,
    Moments,
    fit_with_validation,
    solve_scales,
)
from rfprune.stages.reconstruct import BlockFit, reconstruct

DAMPING = 1.0
"""The damping term of LSMR in the authors' code."""

SCALE_LIMIT = 10.0
"""The largest absolute scale that is accepted, as in the authors' code."""

RIDGES = (1e-2, 1e-3, 1e-1, 1.0)
"""Candidate ridge strengths of `refit`, as fractions of the mean diagonal. The prior is the present
weight. The held-out tokens choose; without any, the first one is used."""

PRE_NORM_RIDGES = (1.0, 1e-2, 1e-1, 1e1)
"""The same for pre-norm models. They are deep, and the residual connection passes the error of an
overfitted block on to all blocks above. On a language model, strengths up to 1 were not enough: the
largest was chosen."""


def tune_scales(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    *,
    removed: Collection[int] = (),
    progress: bool = False,
    solver: DampedSolver | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """Scale the kept units of `student` to follow `teacher`, by changing its weights in place.

    As in the authors' code, the heads of the first layer are not tuned, and the last FFN of a
    classifier is tuned on the first token alone.

    Args:
        teacher: the reference model, frozen. Masks on it have an effect.
        student: a compact copy of the model that `layout` describes, frozen.
        layout: the blocks of the teacher.
        batches: calibration batches with token masks.
        removed: indices of the layers that the student lacks.
        progress: whether to show a progress bar.
        solver: of the scales of one block, in place of the closed form.

    Returns:
        Scales (kept units,) by the path of the consumer, and a warning for every block that failed.
    """
    scales: dict[str, Tensor] = {}

    def solve(
        block: Block, train: Moments, held_out: Moments, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if not weight.numel():
            return weight, bias
        moments = train + held_out
        width = block.unit_width
        found = solve_scales(moments, weight, bias, width, DAMPING, SCALE_LIMIT, solver)
        scales[block.consumer] = found.cpu()
        return weight * found.repeat_interleave(block.unit_width).to(weight), bias

    first_heads = [
        block.consumer
        for block in layout.blocks
        if block.layer == 0 and block.kind == "head" and layout.num_runs(block) == 1
    ]
    first_token_only = last_ffn(layout) if classifies_first_token(student, layout) else []
    fit = BlockFit(solve, skip=first_heads, first_token_only=first_token_only, removed=removed)
    return scales, reconstruct(teacher, student, layout, batches, fit, progress=progress)


def refit(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    *,
    removed: Collection[int] = (),
    progress: bool = False,
) -> list[str]:
    """Fit weight and bias of every output projection of `student` to `teacher`, in place.

    Input projections are aligned as well (see `rfprune.stages.align`). A sublayer without kept
    units gets the bias that replaces its mean output. A fit that does not lower the error on
    held-out tokens is not applied.

    Args:
        teacher: the reference model, frozen.
        student: a compact copy of the model that `layout` describes, frozen.
        layout: the blocks of the teacher.
        batches: calibration batches with token masks.
        removed: indices of the layers that the student lacks.
        progress: whether to show a progress bar.

    Returns:
        A warning for every block that failed and keeps its weights.
    """

    def solve(
        block: Block, train: Moments, held_out: Moments, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        ridges = PRE_NORM_RIDGES if block.pre_norm else RIDGES
        return fit_with_validation(train, held_out, ridges, weight, bias, overwrite=True)

    fit = BlockFit(solve, align=True, removed=removed)
    return reconstruct(teacher, student, layout, batches, fit, progress=progress)


def last_ffn(layout: Layout) -> list[str]:
    """Path of the consumer of the last layer's FFN; empty if that layer has no neurons."""
    last = len(layout.layers) - 1
    return [
        block.consumer for block in layout.blocks if block.layer == last and block.kind == "neuron"
    ]


def classifies_first_token(model: PreTrainedModel, layout: Layout) -> bool:
    """Whether the model's head uses the first token alone, as most sequence classifiers do.

    Classifiers of decoders use the last token, those of encoder-decoders the end of sequence, and
    ModernBERT may use the mean.
    """
    if layout.is_encoder_decoder or getattr(model.config, "classifier_pooling", "cls") != "cls":
        return False
    return type(model).__name__.endswith("ForSequenceClassification") and not layout.causal
