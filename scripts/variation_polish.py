"""A variation: norms and biases of a pruned model are trained on the original's predictions.

A label-free distillation of the few parameters that least squares does not reach, for a fixed
number of steps. Some calibration batches are held out: the polish is taken back unless it lowers
the divergence on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel

from rfprune.model.masks import frozen
from rfprune.model.replay import Batch, token_mask

STEPS = 128
LEARNING_RATE = 1e-4
HELD_OUT = 8
"""Every so many batches one is held out."""


def polish(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    seed: int = 0,
    steps: int = STEPS,
    keep_anyway: bool = False,
    progress: bool = False,
) -> tuple[float, float]:
    """Train norms and biases of `student` on the predictions of `teacher`, in place.

    Args:
        teacher: frozen. batches: without labels; the order of the steps is drawn with `seed`.
        keep_anyway: take nothing back.

    Returns:
        The mean divergence on the held-out batches before, and of what was kept afterwards. With
        fewer than two batches nothing is done, and both are 0.
    """
    if len(batches) < 2:
        return 0.0, 0.0
    held_out = batches[::HELD_OUT]
    chosen = [batch for i, batch in enumerate(batches) if i % HELD_OUT]
    with frozen(student):
        parameters = norms_and_biases(student)
        earlier = [parameter.detach().clone() for parameter in parameters]
        before = _mean_divergence(teacher, student, held_out)
        _train(teacher, student, parameters, _drawn(chosen, steps, seed), steps, progress)
        after = _mean_divergence(teacher, student, held_out)
        if not (after < before or keep_anyway):
            with torch.no_grad():
                for parameter, value in zip(parameters, earlier, strict=True):
                    parameter.copy_(value)
            after = before
    return before, after


def norms_and_biases(model: nn.Module) -> list[nn.Parameter]:
    """All parameters that are vectors: scales and shifts of norms, biases of projections."""
    return [parameter for parameter in model.parameters() if parameter.dim() == 1]


def _drawn(batches: Sequence[Batch], steps: int, seed: int) -> list[Batch]:
    """A batch a step: all of them in a random order, and again."""
    generator = torch.Generator().manual_seed(seed)
    passes = -(-steps // len(batches))
    order = torch.cat([torch.randperm(len(batches), generator=generator) for _ in range(passes)])
    return [batches[i] for i in order[:steps].tolist()]


def _train(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    parameters: Sequence[nn.Parameter],
    batches: Sequence[Batch],
    steps: int,
    progress: bool,
) -> None:
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, total_iters=steps)
    for batch in tqdm(batches, desc="polish", unit="step", disable=not progress, leave=False):
        gradients = torch.autograd.grad(
            prediction_divergence(teacher, student, batch).mean(), parameters, allow_unused=True
        )
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        falling.step()
    optimizer.zero_grad()


def _mean_divergence(
    teacher: PreTrainedModel, student: PreTrainedModel, batches: Sequence[Batch]
) -> float:
    with torch.no_grad():
        rows = torch.cat([prediction_divergence(teacher, student, batch) for batch in batches])
    return float(rows.double().mean())


def prediction_divergence(
    teacher: PreTrainedModel, student: PreTrainedModel, batch: Batch
) -> Tensor:
    """Divergence (B,) of the student's predictions from the teacher's.

    KL in nats; several labels at once: the sum of their KLs; a regression: half the squared
    difference; question answering: start plus end.
    """
    with torch.no_grad():
        wanted = teacher(**batch, return_dict=True)
    found = student(**batch, return_dict=True)
    if "start_logits" in wanted:
        padding = ~token_mask(batch)
        return _kl(wanted["start_logits"], found["start_logits"], padding) + _kl(
            wanted["end_logits"], found["end_logits"], padding
        )
    wanted, found = wanted["logits"].float(), found["logits"].float()
    problem = teacher.config.problem_type
    if problem == "multi_label_classification":
        loss = functional.binary_cross_entropy_with_logits
        probabilities = wanted.sigmoid()
        excess = loss(found, probabilities, reduction="none") - loss(
            wanted, probabilities, reduction="none"
        )
        total: Tensor = excess.sum(1)
        return total
    if problem == "regression" or wanted.shape[1] == 1:
        distance: Tensor = (found - wanted).square().sum(1) / 2
        return distance
    return _kl(wanted, found)


def _kl(wanted: Tensor, found: Tensor, left_out: Tensor | None = None) -> Tensor:
    wanted, found = wanted.float(), found.float()
    if left_out is not None:
        lowest = torch.finfo(torch.float32).min
        wanted, found = wanted.masked_fill(left_out, lowest), found.masked_fill(left_out, lowest)
    wanted, found = wanted.log_softmax(-1), found.log_softmax(-1)
    return (wanted.exp() * (wanted - found)).sum(-1)
