"""What is differentiated: Fisher factors of a model's own predictions, or the loss on labels.

A Fisher factor is a scalar per example whose gradient g contributes g·gᵀ to the Fisher information.
The label-free factors below give the true Fisher of the predictive distribution, which is the
Hessian of KL(unpruned || pruned) at the unpruned model, and need no labels:

- classification: the Fisher in logits is diag(p) - p·pᵀ; its square root has C - 1 columns, so that
  many backward passes are exact (one for two classes). Beyond `EXACT_CLASSES` a label sampled from
  the model stands in.
- regression: a Gaussian of unit variance; the factor is the output.
- multi-label: independent Bernoullis; one factor a label.
- question answering: start and end sampled from the model.

The paper (Kwon et al. 2022, section 4.1) uses the empirical Fisher of the labels, available as
`label_losses`.
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


def generator_of(seed: int, batch_number: int) -> torch.Generator:
    """Of the labels that are drawn for one batch, whoever draws them, and in whatever order."""
    return torch.Generator().manual_seed((seed + batch_number * 0x9E3779B97F4A7C15) % 2**63)


def fisher_factors(
    outputs: Any, config: PretrainedConfig, generator: torch.Generator
) -> list[Tensor]:
    """Scalars per example, (B,) each, whose squared gradients add up to the Fisher information.

    Args:
        outputs: of a model with a sequence-classification or question-answering head.
        generator: draws labels where the exact Fisher would need too many backward passes.

    Raises:
        UserError: the outputs are of neither kind.
    """
    if "start_logits" in outputs:
        start, end = outputs["start_logits"], outputs["end_logits"]
        return [_sampled_loss(start, generator) + _sampled_loss(end, generator)]
    logits = _class_logits(outputs, config)
    if config.problem_type == "multi_label_classification":
        deviations = torch.sigmoid(logits.detach()) * torch.sigmoid(-logits.detach())
        return list((deviations.sqrt() * logits).unbind(dim=1))
    if config.problem_type == "regression" or logits.shape[1] == 1:
        return list(logits.unbind(dim=1))
    if logits.shape[1] <= EXACT_CLASSES:
        return list(torch.einsum("bc,bck->kb", logits, _fisher_root(logits.detach())).unbind(0))
    return [_sampled_loss(logits, generator)]


def factors_of(
    outputs: Any,
    batch: Mapping[str, Tensor],
    config: PretrainedConfig,
    generator: torch.Generator,
    *,
    use_labels: bool,
) -> list[Tensor]:
    """What is differentiated, (B,) each: `label_losses` or `fisher_factors`."""
    if use_labels:
        return label_losses(outputs, batch, config)
    return fisher_factors(outputs, config, generator)


def label_losses(
    outputs: Any, batch: Mapping[str, Tensor], config: PretrainedConfig
) -> list[Tensor]:
    """The task's loss of each example, [(B,)], from its labels (the authors' empirical Fisher).

    Raises:
        UserError: the batch has no labels, or the outputs are not those of a known head.
    """
    needed = ("start_positions", "end_positions") if "start_logits" in outputs else ("labels",)
    if any(name not in batch for name in needed):
        raise UserError(
            f"the batches hold no {' and '.join(needed)}, which --use-labels needs; "
            "leave it out, or use labelled data"
        )
    if "start_logits" in outputs:
        start = _position_loss(outputs["start_logits"], batch["start_positions"])
        return [(start + _position_loss(outputs["end_logits"], batch["end_positions"])) / 2]
    logits, labels = _class_logits(outputs, config), batch["labels"]
    if config.problem_type == "regression" or logits.shape[1] == 1:
        return [(logits - labels.to(logits).view_as(logits)).square().mean(1)]
    if labels.shape == logits.shape:  # several labels at once: independent Bernoullis
        loss = functional.binary_cross_entropy_with_logits
        return [loss(logits, labels.to(logits), reduction="none").mean(1)]
    return [functional.cross_entropy(logits, labels.view(-1), reduction="none")]


def _class_logits(outputs: Any, config: PretrainedConfig) -> Tensor:
    logits: Tensor | None = outputs.get("logits")
    if logits is None or logits.shape[1:] != (config.num_labels,):
        raise UserError(
            "the model returns neither one row of logits an example nor start and end logits; use "
            "a model with a sequence-classification or question-answering head"
        )
    return logits


def _position_loss(logits: Tensor, positions: Tensor) -> Tensor:
    """Cross-entropy (B,) over (B, S); answers that truncation cut off count for nothing."""
    length = logits.shape[1]
    positions = positions.view(-1).clamp(0, length)
    return functional.cross_entropy(logits, positions, ignore_index=length, reduction="none")


def _fisher_root(logits: Tensor) -> Tensor:
    """R (B, C, C-1) with R·Rᵀ = diag(p) - p·pᵀ for p = softmax(logits)."""
    p = logits.cpu().double().softmax(-1)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    values, vectors = torch.linalg.eigh(fisher)  # ascending: the first is 0, of equal entries
    root: Tensor = vectors[..., 1:] * values[:, None, 1:].clamp_min(0).sqrt()
    return root.to(logits)


def _sampled_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Negative log-likelihood (B,) of one label drawn from softmax of the logits (B, C)."""
    probabilities = logits.detach().float().softmax(-1).cpu()
    labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)
    return functional.cross_entropy(logits, labels, reduction="none")
