"""What is differentiated: Fisher factors of a model's own predictions, the loss on labels, or a
loss that the user gives.

A Fisher factor is a scalar per example whose gradient g contributes g·gᵀ to the Fisher information.
The label-free factors below give the true Fisher of the predictive distribution, which is the
Hessian of KL(unpruned || pruned) at the unpruned model, and need no labels:

- classification, of texts, images or choices: the Fisher in logits is diag(p) - p·pᵀ; its square
  root has C - 1 columns, so that many backward passes are exact (one for two classes). Beyond
  `EXACT_CLASSES` a label sampled from the model stands in.
- regression: a Gaussian of unit variance; the factor is the output.
- multi-label: independent Bernoullis; one factor a label.
- question answering: start and end sampled from the model.
- a prediction a token (language models of all kinds, token classification): a label sampled from
  the model for every real token. Given the inputs, labels of different tokens are independent, so
  that the sum over the tokens is one factor.
- a model without a head: its embedding (see `rfprune.embeddings`) with Gaussian noise of unit
  variance; the factors are its inner products with random directions.

The paper (Kwon et al. 2022, section 4.1) uses the empirical Fisher of the labels, available as
`label_losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig

from rfprune.embeddings import embed, pooling_of
from rfprune.errors import UserError

EXACT_CLASSES = 8
EMBEDDING_DIRECTIONS = 4
"""Random directions in which an embedding is differentiated."""

Batch = Mapping[str, Tensor]
Loss = Callable[[Any, Batch], Tensor]
"""From a model's outputs and the batch they are of, labels included, to a loss for every example,
(B,), or their mean, a scalar."""

PREDICTIONS: Final = "predictions"
LABELLED: Final = "labels"
Objective = Literal["predictions", "labels"] | Loss
"""What is differentiated: `fisher_factors`, `label_losses`, or a loss that the user gives."""

_ENTRIES_AT_A_TIME = 2**24
"""Of logits, where labels are drawn for many tokens."""


def batch_generator(seed: int, batch_number: int) -> torch.Generator:
    """Of the labels that are drawn for one batch, whoever draws them, and in whatever order."""
    return torch.Generator().manual_seed((seed + batch_number * 0x9E3779B97F4A7C15) % 2**63)


def objective_values(
    outputs: Any,
    batch: Batch,
    config: PretrainedConfig,
    generator: torch.Generator,
    *,
    objective: Objective,
) -> list[Tensor]:
    """What is differentiated, (B,) each: `fisher_factors`, `label_losses`, or the loss given.

    Raises:
        UserError: there is no such thing for these outputs, or the loss is of another shape.
    """
    if objective == PREDICTIONS:
        return fisher_factors(outputs, batch, config, generator)
    if objective == LABELLED:
        return label_losses(outputs, batch, config)
    assert callable(objective)
    return [_given_loss(objective, outputs, batch)]


def fisher_factors(
    outputs: Any, batch: Batch, config: PretrainedConfig, generator: torch.Generator
) -> list[Tensor]:
    """Scalars per example, (B,) each, whose squared gradients add up to the Fisher information.

    Args:
        outputs: of a model with one of the heads above, or none.
        batch: the inputs; what is padding in them counts for nothing.
        generator: draws labels where the exact Fisher would need too many backward passes.

    Raises:
        UserError: the outputs are of another kind.
    """
    if "start_logits" in outputs:
        start, end = outputs["start_logits"], outputs["end_logits"]
        return [_sampled_loss(start, generator) + _sampled_loss(end, generator)]
    logits = outputs.get("logits")
    if logits is None and outputs.get("last_hidden_state") is not None:
        hidden = outputs["last_hidden_state"]
        embeddings = embed(hidden, _predicted(batch, hidden, config), pooling_of(config))
        return _projections(embeddings, generator)
    if logits is not None and logits.dim() == 3:
        return [_sampled_tokens(logits, _predicted(batch, logits, config), generator)]
    logits = _class_logits(outputs, batch, config)
    if not _is_choice(batch):
        if config.problem_type == "multi_label_classification":
            deviations = torch.sigmoid(logits.detach()) * torch.sigmoid(-logits.detach())
            return list((deviations.sqrt() * logits).unbind(dim=1))
        if config.problem_type == "regression" or logits.shape[1] == 1:
            return list(logits.unbind(dim=1))
    if logits.shape[1] <= EXACT_CLASSES:
        return list(torch.einsum("bc,bck->kb", logits, _fisher_root(logits.detach())).unbind(0))
    return [_sampled_loss(logits, generator)]


def label_losses(outputs: Any, batch: Batch, config: PretrainedConfig) -> list[Tensor]:
    """The task's loss of each example, [(B,)], from its labels (the authors' empirical Fisher).

    Raises:
        UserError: the batch has no labels, or the outputs are not those of a head that has any.
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
    logits, labels = outputs.get("logits"), batch["labels"]
    if logits is not None and logits.dim() == 3 and _is_aligned(outputs, logits, config):
        losses = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return [losses.sum(1) / (labels != -100).sum(1).clamp_min(1)]
    logits = _class_logits(outputs, batch, config)
    if not _is_choice(batch):
        if config.problem_type == "regression" or logits.shape[1] == 1:
            return [(logits - labels.to(logits).view_as(logits)).square().mean(1)]
        if labels.shape == logits.shape:  # several labels at once: independent Bernoullis
            loss = functional.binary_cross_entropy_with_logits
            return [loss(logits, labels.to(logits), reduction="none").mean(1)]
    return [functional.cross_entropy(logits, labels.view(-1), reduction="none")]


def _given_loss(loss: Loss, outputs: Any, batch: Batch) -> Tensor:
    """(B,), also of a loss that is a mean over the batch."""
    values: Any = loss(outputs, batch)
    size = len(next(iter(batch.values())))
    if not isinstance(values, Tensor) or values.shape not in ((), (size,)):
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise UserError(
            f"the loss gives {found}, but a number an example, ({size},), or one for the batch is "
            "wanted; reduce it over tokens and classes"
        )
    if not values.requires_grad:
        raise UserError(
            "the loss does not depend on the model in a way that can be differentiated; make it "
            "of the outputs, without detach() or no_grad()"
        )
    each: Tensor = values.expand(size)
    return each


def _is_choice(batch: Batch) -> bool:
    """Whether an example is several texts of which one is to be chosen: (B, C, S)."""
    return "input_ids" in batch and batch["input_ids"].dim() == 3


def _is_aligned(outputs: Any, logits: Tensor, config: PretrainedConfig) -> bool:
    """Whether logits (B, S, C) and labels (B, S) belong together place by place; those of a causal
    language model are one apart, and this cannot be told from those of a masked one."""
    return "encoder_last_hidden_state" in outputs or logits.shape[-1] == config.num_labels


def _class_logits(outputs: Any, batch: Batch, config: PretrainedConfig) -> Tensor:
    logits: Tensor | None = outputs.get("logits")
    wanted = batch["input_ids"].shape[1] if _is_choice(batch) else config.num_labels
    if logits is None or logits.shape[1:] != (wanted,):
        raise UserError(
            "the model returns nothing that can be differentiated without labels (a row of logits "
            "an example or a token, start and end logits, or hidden states); use a model with such "
            "a head, or give prune() a loss"
        )
    return logits


def _predicted(batch: Batch, values: Tensor, config: PretrainedConfig) -> Tensor:
    """(B, S) booleans, true where values (B, S, ...) are about a token, not padding.

    Raises:
        UserError: the batch has another number of tokens.
    """
    decoder = batch.get("decoder_input_ids")
    mask = batch.get("attention_mask" if decoder is None else "decoder_attention_mask")
    if mask is None and decoder is not None:
        mask = decoder != config.pad_token_id
        mask[:, 0] = True  # where decoding starts, which may be written as padding is
    if mask is None:
        return torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
    if mask.shape != values.shape[:2]:
        raise UserError(
            f"the model predicts {tuple(values.shape[:2])} tokens, but the attention mask has "
            f"{tuple(mask.shape)}; give one number per token"
        )
    return mask.to(values.device) != 0


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


def _sampled_tokens(logits: Tensor, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """A factor (B,) with the gradient of -Σ_s log p_s(y_s), y_s drawn from softmax of logits (B, S,
    V) at each of the `tokens` (B, S).

    That gradient is p - onehot(y) in the logits, whose inner product with them therefore has it:
    one array of the size of the logits, where cross-entropy would keep two and make a third.
    In float32, some tokens at a time: the vocabulary may be large.
    """
    slopes = torch.empty_like(logits, requires_grad=False)
    draws = torch.rand(tokens.shape, generator=generator).to(logits.device)
    rows = max(1, _ENTRIES_AT_A_TIME // logits.shape[-1])
    parts = (values.flatten(0, 1).split(rows) for values in (logits.detach(), slopes))
    masks = (values.flatten()[:, None].split(rows) for values in (draws, tokens))
    for values, target, draw, mask in zip(*parts, *masks, strict=True):
        p = values.float().softmax(-1)
        total = p.cumsum(-1)
        # The last sum is not quite 1; what has no probability is never drawn.
        labels = torch.searchsorted(total, draw * total[:, -1:], right=True)
        labels = labels.clamp_max(p.shape[-1] - 1)
        p.scatter_add_(1, labels, torch.full_like(draw, -1.0))
        target.copy_(p * mask)
    return torch.einsum("bsv,bsv->b", logits, slopes)


def _projections(embeddings: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Inner products (B,) of embeddings (B, d) with random directions: their squared gradients are
    on average those of all d entries, the Fisher information under Gaussian noise of variance 1."""
    shape = (EMBEDDING_DIRECTIONS, *embeddings.shape)
    directions = torch.randn(shape, generator=generator, dtype=torch.float64)
    directions /= EMBEDDING_DIRECTIONS**0.5
    return list(torch.einsum("bd,kbd->kb", embeddings, directions.to(embeddings)).unbind(0))
