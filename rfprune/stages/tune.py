"""Tuning by least squares against the teacher: one scale per kept unit, or whole out-projections.

`tune_scales` is the mask tuning of Kwon et al. 2022, section 4.3. `refit` goes past it: all weights
of an out-projection and its bias are fitted, a superset of the scales at the same cost.

Departures from the authors' code: the closed form of their damped solve in float64 instead of an
iterative solver; a failed block is reported and left alone, while theirs stops tuning every later
layer; no intercept is fitted and thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from rfprune.model.batch import Batch
from rfprune.model.layout import Block, Layout
from rfprune.stages.least_squares import Moments, fit_with_validation, solve_scales
from rfprune.stages.reconstruct import reconstruct

DAMPING = 1.0
"""LSMR's damp in the authors' code."""

SCALE_LIMIT = 10.0
"""Scales beyond this are rejected, as in the authors' code."""

RIDGES = (1e-2, 1e-3, 1e-1, 1.0)
"""Of `refit`, as fractions of the mean diagonal, drawing to the weights as they were; held-out
tokens choose, and where there are none it is the first."""

PRE_NORM_RIDGES = (1.0, 1e-2, 1e-1, 1e1)
"""The same where norms come first: such models are deep, and what a fit makes up from too few
tokens is handed on by the residual to all that is fitted above. Measured on a language model, where
ridges up to 1 were chosen as high as they went."""


def tune_scales(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    *,
    progress: bool = False,
) -> tuple[dict[str, Tensor], list[str]]:
    """Scale the kept units of `student` so that it follows `teacher`; scales go into its weights.

    The heads of the first layer are not tuned, and the last FFN of a classifier is tuned on the
    first token alone, as in the authors' code.

    Returns:
        Scales (kept units,) by consumer, and a sentence for every block that failed.
    """
    scales: dict[str, Tensor] = {}

    def fit(
        block: Block, seen: Moments, held_out: Moments, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if not weight.numel():
            return weight, bias
        moments = seen.plus(held_out)
        found = solve_scales(moments, weight, bias, block.unit_width, DAMPING, SCALE_LIMIT)
        scales[block.consumer] = found.cpu()
        return weight * found.repeat_interleave(block.unit_width).to(weight), bias

    first_heads = [
        block.consumer
        for block in layout.blocks
        if block.layer == 0 and block.kind == "head" and layout.num_runs(block) == 1
    ]
    failures = reconstruct(
        teacher,
        student,
        layout,
        batches,
        fit,
        skip=first_heads,
        first_token_only=last_ffn(layout) if classifies_first_token(student, layout) else (),
        progress=progress,
    )
    return scales, failures


def refit(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    layout: Layout,
    batches: Sequence[Batch],
    *,
    progress: bool = False,
) -> list[str]:
    """Fit weight and bias of every out-projection of `student` to `teacher`, bottom up, in place.

    What reads the hidden states is fitted on the way (see `rfprune.stages.align`).
    A sublayer that lost all its units gets the bias that makes up for them on average. One whose
    fit does not lower the error on held-out tokens stays as it was.

    Returns:
        A sentence for every block that failed; it stays as it was.
    """

    def fit(
        block: Block, seen: Moments, held_out: Moments, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        ridges = PRE_NORM_RIDGES if block.pre_norm else RIDGES
        return fit_with_validation(seen, held_out, ridges, weight, bias)

    return reconstruct(teacher, student, layout, batches, fit, align=True, progress=progress)


def last_ffn(layout: Layout) -> list[str]:
    """The consumer of the last layer's FFN, if it has one."""
    last = len(layout.layers) - 1
    return [
        block.consumer for block in layout.blocks if block.layer == last and block.kind == "neuron"
    ]


def classifies_first_token(model: PreTrainedModel, layout: Layout) -> bool:
    """Whether the head reads the first token alone, as most sequence classifiers do.

    Those of decoders read the last one.
    """
    if layout.is_encoder_decoder:  # those of encoder-decoders read an end of sequence
        return False
    if getattr(model.config, "classifier_pooling", "cls") != "cls":  # ModernBERT's may be the mean
        return False
    return type(model).__name__.endswith("ForSequenceClassification") and not layout.causal
