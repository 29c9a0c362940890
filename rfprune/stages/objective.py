"""What is differentiated: the Fisher information of a model's own predictions, or the loss on labels.

A Fisher factor is a scalar per example whose gradient g contributes g·gᵀ to the Fisher information. The label-free
factors below give the true Fisher of the predictive distribution, which is the Hessian of
KL(unpruned || pruned) at the unpruned model, and need no labels:

- classification: the Fisher in logits is diag(p) - p·pᵀ; its square root has C - 1 columns, so C - 1 backward
  passes are exact (one for two classes). Beyond `EXACT_CLASSES` a label sampled from the model stands in.
- regression: a Gaussian of unit variance; the factor is the output.
- multi-label: independent Bernoullis; one factor a label.
- question answering: start and end sampled from the model.

The paper (Kwon et al. 2022, section 4.1) uses the empirical Fisher of the labels, available as `label_losses`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig

from rfprune.errors import UserError

EXACT_CLASSES = 8
LABELS = ("labels", "start_positions", "end_positions")
"""Names of the labels in a batch; the model is never given them."""


def fisher_factors(outputs: Any, config: PretrainedConfig, generator: torch.Generator) -> list[Tensor]:
    """Scalars per example, (B,) each, whose squared gradients add up to the Fisher information.

    Args:
        outputs: of a model with a sequence-classification or question-answering head.
        generator: draws labels where the exact Fisher would need too many backward passes.

    Raises:
        UserError: the outputs are of neither kind.
    """
    if "start_logits" in outputs:
        return [
            _sampled_loss(outputs["start_logits"], generator) + _sampled_loss(outputs["end_logits"], generator)
        ]
    if "logits" not in outputs or outputs["logits"].dim() != 2:
        raise UserError(
            "the model returns neither (B, C) logits nor start and end logits; use a model with a "
            "sequence-classification or question-answering head"
        )
    logits = outputs["logits"]
    if config.problem_type == "multi_label_classification":
        deviations = torch.sigmoid(logits.detach()) * torch.sigmoid(-logits.detach())
        return list((deviations.sqrt() * logits).unbind(dim=1))
    if logits.shape[1] == 1:
        return [logits[:, 0]]
    if logits.shape[1] <= EXACT_CLASSES:
        return list(torch.einsum("bc,bck->kb", logits, _fisher_root(logits.detach())).unbind(0))
    return [_sampled_loss(logits, generator)]


def label_losses(outputs: Any, batch: Mapping[str, Tensor], config: PretrainedConfig) -> list[Tensor]:
    """The task's loss of each example, [(B,)], from the batch's labels (the authors' empirical Fisher).

    Raises:
        UserError: the batch has no labels.
    """
    if "start_logits" in outputs and "start_positions" in batch:
        start = functional.cross_entropy(outputs["start_logits"], batch["start_positions"], reduction="none")
        end = functional.cross_entropy(outputs["end_logits"], batch["end_positions"], reduction="none")
        return [(start + end) / 2]
    if "logits" not in outputs or "labels" not in batch:
        raise UserError("the batches hold no labels, which --use-labels needs; leave it out, or use labelled data")
    logits, labels = outputs["logits"], batch["labels"]
    if logits.shape[1] == 1:
        return [(logits[:, 0] - labels.to(logits.dtype)) ** 2]
    return [functional.cross_entropy(logits, labels, reduction="none")]


def _fisher_root(logits: Tensor) -> Tensor:
    """R (B, C, C-1) with R·Rᵀ = diag(p) - p·pᵀ for p = softmax(logits)."""
    probabilities = logits.double().softmax(-1)
    fisher = torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None, :]
    values, vectors = torch.linalg.eigh(fisher)  # ascending; the smallest is 0, with the constant vector
    root = vectors[..., 1:] * values[:, None, 1:].clamp_min(0).sqrt()
    return root.to(logits.dtype)


def _sampled_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Negative log-likelihood (B,) of a label drawn from the model's own distribution over (B, C) logits."""
    probabilities = logits.detach().float().softmax(-1).cpu()
    labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)
    return functional.cross_entropy(logits, labels, reduction="none")
