"""Objectives: the scalars per example that are differentiated to collect gradients.

An objective is the Fisher information of the model's own predictions (the default, without labels),
the task's loss on labels (as in Kwon et al. 2022, section 4.1), or a loss that the user defines.

A Fisher factor is a scalar per example whose gradient g contributes g·gᵀ to the Fisher information.
The factors below give the true Fisher information of the predictive distribution. This is the
Hessian of KL(unpruned || pruned) at the unpruned model.

- Classification of texts, images or choices: the Fisher information of the logits is
  diag(p) - p·pᵀ. Its square root has C - 1 columns, so C - 1 backward passes are exact. Beyond
  `EXACT_CLASSES` classes, a label is sampled from the model instead.
- Regression: a Gaussian of unit variance; the factor is the output.
- Multi-label classification: independent Bernoulli variables, one factor per label.
- Question answering: start and end positions are sampled from the model.
- One prediction per token (language models, token classification): a label is sampled for every
  token that is not padding. Labels of different tokens are independent given the inputs, so their
  sum is one factor.
- Models without a head: the embedding (see `rfprune.embeddings`; for CLIP and SigLIP the pooled or
  projected output, of length one) with Gaussian noise of unit variance; the factors are its inner
  products with random directions.
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
from rfprune.families.architectures import ARCHITECTURES
from rfprune.model.batch import TOKEN_MASK

EXACT_CLASSES = 8
"""The largest number of classes with an exact Fisher information."""

EMBEDDING_DIRECTIONS = 4
"""Number of random directions in which an embedding is differentiated."""

Batch = Mapping[str, Tensor]
Loss = Callable[[Any, Batch], Tensor]
"""From the outputs of a model and their batch, labels included, to a loss per example, (B,), or its
mean."""

PREDICTIONS: Final = "predictions"
LABELLED: Final = "labels"
Objective = Literal["predictions", "labels"] | Loss
"""`PREDICTIONS` (Fisher factors), `LABELLED` (the loss on labels), or the user's loss."""

_LOGITS_AT_A_TIME = 2**24
"""Labels of many tokens are sampled in parts of this many logits, to limit memory."""


def batch_generator(seed: int, batch_number: int) -> torch.Generator:
    """Random generator for the sampled labels of one batch.

    It does not depend on the order of the batches or on the process that runs them.
    """
    return torch.Generator().manual_seed((seed + batch_number * 0x9E3779B97F4A7C15) % 2**63)


def objective_values(
    outputs: Any,
    batch: Batch,
    config: PretrainedConfig,
    generator: torch.Generator,
    *,
    objective: Objective,
) -> list[Tensor]:
    """The values of an objective that are differentiated one after the other.

    Args:
        outputs: of the model on `batch`.
        batch: the model's inputs, with labels where the objective needs them.
        config: of the model.
        generator: of sampled labels; see `batch_generator`.
        objective: see `Objective`.

    Returns:
        A list of values per example, (B,) each: several for exact Fisher factors, else one.

    Raises:
        UserError: the objective is not defined for these outputs, labels are missing, or the user's
            loss has another shape.
    """
    if objective == PREDICTIONS:
        return fisher_factors(outputs, batch, config, generator)
    if objective == LABELLED:
        return label_losses(outputs, batch, config)
    assert callable(objective)
    return [_user_loss(objective, outputs, batch)]


def fisher_factors(
    outputs: Any, batch: Batch, config: PretrainedConfig, generator: torch.Generator
) -> list[Tensor]:
    """Scalars per example, (B,) each, whose squared gradients sum to the Fisher information.

    Args:
        outputs: of a model with one of the heads above, or without a head.
        batch: the model's inputs; padding has no influence.
        config: of the model.
        generator: of sampled labels.

    Raises:
        UserError: the outputs are of another kind.
    """
    if "start_logits" in outputs:
        start, end = outputs["start_logits"], outputs["end_logits"]
        return [_sampled_loss(start, generator) + _sampled_loss(end, generator)]
    logits = outputs.get("logits")
    if logits is None and outputs.get("last_hidden_state") is not None:
        return _projections(_embeddings(outputs, batch, config), generator)
    if logits is not None and logits.dim() == 3:
        return [_sampled_tokens(logits, _token_mask(batch, logits, config), generator)]
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


def divergences(reference: Any, outputs: Any, batch: Batch, config: PretrainedConfig) -> Tensor:
    """KL divergence of the predictions of a model from those of a reference, per example (B,).

    The predictive distributions are those of `fisher_factors`; that of several tokens is the
    product over them.

    Args:
        reference: outputs of the reference on `batch`.
        outputs: of the model.
        batch: the model's inputs; padding has no influence.
        config: of the model.

    Raises:
        UserError: the outputs are of a kind without a predictive distribution.
    """
    if "start_logits" in outputs:
        names = ("start_logits", "end_logits")
        return sum((_kl(reference[name], outputs[name]) for name in names), start=torch.zeros(()))
    logits = outputs.get("logits")
    if logits is None and outputs.get("last_hidden_state") is not None:
        after, before = (_embeddings(each, batch, config) for each in (outputs, reference))
        return (after - before).float().square().sum(1) / 2
    if logits is not None and logits.dim() == 3:
        mask = _token_mask(batch, logits, config)
        by_token = [
            _kl(before, after)
            for before, after in zip(reference["logits"].split(1), logits.split(1), strict=True)
        ]
        return (torch.cat(by_token) * mask).sum(1)
    logits, before = (_class_logits(each, batch, config) for each in (outputs, reference))
    if not _is_choice(batch):
        if config.problem_type == "multi_label_classification":
            pairs = (torch.stack([each, torch.zeros_like(each)], -1) for each in (before, logits))
            return _kl(*pairs).sum(1)
        if config.problem_type == "regression" or logits.shape[1] == 1:
            return (logits - before).float().square().sum(1) / 2
    return _kl(before, logits)


def prediction_errors(
    reference: Any, outputs: Any, batch: Batch, config: PretrainedConfig, loss: Loss | None
) -> Tensor:
    """Divergence of predictions from those of a reference, per example (B,); see `divergences`.

    Args:
        reference: outputs of the reference; not used with a loss.
        loss: of the user, which takes the place of the divergence.
    """
    if loss is None:
        return divergences(reference, outputs, batch, config)
    each: Tensor = loss(outputs, batch).expand(len(next(iter(batch.values()))))
    return each


def _embeddings(outputs: Any, batch: Batch, config: PretrainedConfig) -> Tensor:
    """The embeddings (B, n) of a model without a head, each of length one."""
    family = ARCHITECTURES.get(str(config.model_type))
    if family is not None and family.has_pooled_embeddings:
        for name in ("text_embeds", "image_embeds", "pooler_output"):
            if outputs.get(name) is not None:
                return functional.normalize(outputs[name], dim=-1)
    hidden = outputs["last_hidden_state"]
    return embed(hidden, _token_mask(batch, hidden, config), pooling_of(config))


def _kl(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || logits) over the last axis; equal infinite logits mean no class."""
    log_p, log_q = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    return torch.where(log_p.isfinite(), log_p.exp() * (log_p - log_q), 0.0).sum(-1)


def label_losses(outputs: Any, batch: Batch, config: PretrainedConfig) -> list[Tensor]:
    """The task's loss of each example, [(B,)], as in the authors' empirical Fisher information.

    Raises:
        UserError: the batch has no labels, or the head has no loss on labels.
    """
    needed = ("start_positions", "end_positions") if "start_logits" in outputs else ("labels",)
    if any(name not in batch for name in needed):
        raise UserError(
            f"the batches hold no {' and '.join(needed)}, which --use-labels (use_labels) needs; "
            "leave it out, or use labelled data"
        )
    if "start_logits" in outputs:
        start = _position_loss(outputs["start_logits"], batch["start_positions"])
        return [(start + _position_loss(outputs["end_logits"], batch["end_positions"])) / 2]
    logits, labels = outputs.get("logits"), batch["labels"]
    if logits is not None and logits.dim() == 3 and _has_aligned_labels(outputs, logits, config):
        losses = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return [losses.sum(1) / (labels != -100).sum(1).clamp_min(1)]
    if logits is not None and logits.dim() == 3:
        raise UserError(
            "use_labels (--use-labels) is not supported for language models; leave it out, and the "
            "model's own predictions are used, or pass a loss to prune()"
        )
    logits = _class_logits(outputs, batch, config)
    if not _is_choice(batch):
        if config.problem_type == "regression" or logits.shape[1] == 1:
            return [(logits - labels.to(logits).view_as(logits)).square().mean(1)]
        if labels.shape == logits.shape:  # multi-label classification
            loss = functional.binary_cross_entropy_with_logits
            return [loss(logits, labels.to(logits), reduction="none").mean(1)]
    return [functional.cross_entropy(logits, labels.view(-1), reduction="none")]


def _user_loss(loss: Loss, outputs: Any, batch: Batch) -> Tensor:
    """The user's loss per example, (B,); a mean over the batch is repeated."""
    values: Any = loss(outputs, batch)
    size = len(next(iter(batch.values())))
    if values is None:
        raise UserError(
            "the loss is None: the model is called without labels, so outputs.loss is None; "
            "compute the loss from the outputs and the labels of the batch"
        )
    if not isinstance(values, Tensor) or values.shape not in ((), (size,)):
        is_tensor = isinstance(values, Tensor)
        found = f"shape {tuple(values.shape)}" if is_tensor else f"type {type(values).__name__}"
        raise UserError(
            f"the loss has {found}, but must be a tensor with one value per example, ({size},), or "
            "one for the batch, (); reduce it over tokens and classes"
        )
    if not values.requires_grad:
        raise UserError(
            "the loss has no gradient with respect to the model; compute it from the outputs, "
            "without detach() or no_grad()"
        )
    each: Tensor = values.expand(size)
    return each


def _is_choice(batch: Batch) -> bool:
    """Whether the batch is of multiple-choice examples, (B, C, S)."""
    return "input_ids" in batch and batch["input_ids"].dim() == 3


def _has_aligned_labels(outputs: Any, logits: Tensor, config: PretrainedConfig) -> bool:
    """Whether labels (B, S) are those of the logits (B, S, C) at the same positions.

    Labels of a causal language model are shifted by one. Its outputs look like those of a masked
    language model, so the labels of both are refused.
    """
    return "encoder_last_hidden_state" in outputs or logits.shape[-1] == config.num_labels


def _class_logits(outputs: Any, batch: Batch, config: PretrainedConfig) -> Tensor:
    logits: Tensor | None = outputs.get("logits")
    wanted = batch["input_ids"].shape[1] if _is_choice(batch) else config.num_labels
    if logits is None or logits.shape[1:] != (wanted,):
        raise UserError(
            "the model has no output that an objective is defined for (logits per example or per "
            "token, start and end logits, or hidden states); use a model with such a head, or pass "
            "a loss to prune()"
        )
    return logits


def _token_mask(batch: Batch, values: Tensor, config: PretrainedConfig) -> Tensor:
    """Booleans (B, S) for values (B, S, ...) of the model: false at padding.

    Raises:
        UserError: the batch has another number of tokens.
    """
    decoder = batch.get("decoder_input_ids")
    mask = batch.get("attention_mask" if decoder is None else "decoder_attention_mask")
    if decoder is None and TOKEN_MASK in batch:  # the attention mask of audio is one of samples
        mask = batch[TOKEN_MASK]
    if mask is None and decoder is not None:
        mask = decoder != config.pad_token_id
        mask[:, 0] = True  # the first token of a decoder may be the padding token
    if mask is None:
        return torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
    if mask.shape != values.shape[:2]:
        raise UserError(
            f"the model has outputs for {tuple(values.shape[:2])} tokens, but the attention mask "
            f"has shape {tuple(mask.shape)}; use one number per token"
        )
    return mask.to(values.device) != 0


def _position_loss(logits: Tensor, positions: Tensor) -> Tensor:
    """Cross-entropy (B,) of positions in logits (B, S); zero for answers beyond the S tokens."""
    length = logits.shape[1]
    positions = positions.view(-1).clamp(0, length)
    return functional.cross_entropy(logits, positions, ignore_index=length, reduction="none")


def _fisher_root(logits: Tensor) -> Tensor:
    """R (B, C, C-1) with R·Rᵀ = diag(p) - p·pᵀ for p = softmax(logits)."""
    p = logits.cpu().double().softmax(-1)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    values, vectors = torch.linalg.eigh(
        fisher
    )  # ascending: the first one is 0, for the vector of ones
    root: Tensor = vectors[..., 1:] * values[:, None, 1:].clamp_min(0).sqrt()
    return root.to(logits)


def _sampled_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Negative log-likelihood (B,) of a label sampled from logits (B, C)."""
    probabilities = logits.detach().float().softmax(-1).cpu()
    labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)
    return functional.cross_entropy(logits, labels, reduction="none")


def _sampled_tokens(logits: Tensor, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Negative log-likelihood of a label sampled at every token, up to a constant, (B,).

    Its gradient in the logits is p - onehot(y), so the inner product of the logits with that matrix
    is a scalar of the same gradient. It needs one array of the size of the logits, where
    cross-entropy keeps two and makes a third. Vocabularies may be large, so this is done in float32
    for some of the tokens at a time.

    Args:
        logits: (B, S, V).
        tokens: (B, S) booleans, false at padding.
    """
    slopes = torch.empty_like(logits, requires_grad=False)
    draws = torch.rand(tokens.shape, generator=generator).to(logits.device)
    rows = max(1, _LOGITS_AT_A_TIME // logits.shape[-1])
    parts = (values.flatten(0, 1).split(rows) for values in (logits.detach(), slopes))
    masks = (values.flatten()[:, None].split(rows) for values in (draws, tokens))
    for values, target, draw, mask in zip(*parts, *masks, strict=True):
        p = values.float().softmax(-1)
        total = p.cumsum(-1)
        # The last sum is not exactly 1. Labels without probability are never sampled.
        labels = torch.searchsorted(total, draw * total[:, -1:], right=True)
        labels = labels.clamp_max(p.shape[-1] - 1)
        p.scatter_add_(1, labels, torch.full_like(draw, -1.0))
        target.copy_(p * mask)
    return torch.einsum("bsv,bsv->b", logits, slopes)


def _projections(embeddings: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Inner products (B,) of embeddings (B, d) with random directions.

    The expectation of their squared gradients is the sum over all d entries: the Fisher information
    under Gaussian noise of unit variance.
    """
    shape = (EMBEDDING_DIRECTIONS, *embeddings.shape)
    directions = torch.randn(shape, generator=generator, dtype=torch.float64)
    directions /= EMBEDDING_DIRECTIONS**0.5
    return list(torch.einsum("bd,kbd->kb", embeddings, directions.to(embeddings)).unbind(0))
