"""Language modelling: blocks of text, log-likelihoods per token, and divergence per token.

The logits of a language model have one entry per vocabulary entry for every token: gigabytes for a
validation text. They are never kept. A pass over the batches computes the log-likelihood of every
token and, with a second model beside the first, their divergence.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rfprune.errors import UserError
from rfprune.tasks.inference import check_embeddings_exist, eval_mode
from rfprune.tasks.registry import LANGUAGE_MODELING

PARAGRAPH = "\n\n"
"""The separator of the rows of a table of texts."""

# Characters tokenised at a time, up to the end of a line: for a text in one piece, tokenizers need
# more than linear time or memory.
_PIECE = 2**17
_ENTRIES_AT_A_TIME = 2**24  # of logits
_LINE_END = re.compile(r"\n+")


def encode_blocks(tokenizer: Any, texts: Sequence[str], max_length: int) -> dict[str, Any]:
    """The joined texts, cut into blocks of `max_length` tokens, as columns of model inputs.

    Blocks begin with the tokenizer's BOS token if it puts one before a text. The rest at the end is
    dropped.

    Raises:
        UserError: the text does not fill one block.
    """
    before = tokenizer("a")["input_ids"][:1]
    before = before if before == [tokenizer.bos_token_id] else []
    tokens = [
        token for piece in text_pieces(PARAGRAPH.join(texts)) for token in _ids(tokenizer, piece)
    ]
    size = max_length - len(before)
    blocks = [
        before + tokens[first : first + size] for first in range(0, len(tokens) - size + 1, size)
    ]
    if not blocks:
        raise UserError(
            f"The text has {len(tokens)} tokens, too few for one block of {max_length}: give a "
            f"longer text, or smaller blocks with --max-length."
        )
    return {"input_ids": blocks, "attention_mask": [[1] * len(block) for block in blocks]}


def _ids(tokenizer: Any, piece: str) -> list[int]:
    found: list[int] = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def text_pieces(text: str) -> Iterator[str]:
    """A long text in pieces that end with a line, for a tokenizer."""
    start = 0
    while start < len(text):
        end = _LINE_END.search(text, start + _PIECE)
        stop = len(text) if end is None else end.end()
        yield text[start:stop]
        start = stop


def token_likelihoods(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    rows: Sequence[NDArray[np.int64]],
    reference: nn.Module | None = None,
    *,
    progress: bool = False,
) -> tuple[NDArray[np.float32], float | None]:
    """Log-likelihoods of all tokens but the first of each block, and the divergence per token.

    Args:
        model: a causal language model.
        batches: blocks of tokens, (B, S).
        rows: the row numbers of each batch.
        reference: the model to compute the divergence from.
        progress: whether to show a progress bar.

    Returns:
        Natural log-likelihoods (N, S - 1) in dataset order, and mean KL(reference || model) in
        nats per token, None without a reference.

    Raises:
        UserError: the model has no logits per token, or they are not finite.
    """
    from tqdm import tqdm

    check_embeddings_exist(model, batches)
    width = max(batch["input_ids"].shape[1] for batch in batches) - 1
    likelihoods = np.zeros((sum(len(numbers) for numbers in rows), width), dtype=np.float32)
    divergence, count = 0.0, 0
    bar = tqdm(batches, desc="scoring", unit="batch", disable=not progress, leave=False)
    models = (model,) if reference is None else (model, reference)
    with torch.no_grad(), eval_mode(model), eval_mode(models[-1]):
        for batch, numbers in zip(bar, rows, strict=True):
            size = rows_at_a_time(model, batch["input_ids"])
            for first in range(0, len(numbers), size):
                part = {name: values[first : first + size] for name, values in batch.items()}
                logits = [_next_token_logits(one, part) for one in models]
                targets = part["input_ids"][:, 1:].to(logits[0].device)
                found, apart = compare_logits(logits, targets)
                likelihoods[numbers[first : first + size]] = found.cpu().numpy()
                divergence, count = divergence + apart, count + targets.numel()
    if not np.isfinite(likelihoods).all():
        raise UserError(
            "The model's logits are not finite: its weights are damaged, or too large for its "
            "dtype; try --dtype float32, or download the checkpoint again."
        )
    return likelihoods, None if reference is None else divergence / count


def rows_at_a_time(model: nn.Module, ids: Tensor) -> int:
    """How many rows of tokens (B, S) to compute at a time, for logits of bounded size."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or 1
    return max(1, 2 * _ENTRIES_AT_A_TIME // (vocabulary * ids.shape[1]))


def _next_token_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits (B, S - 1, V) for all tokens but the first."""
    inputs: dict[str, Any] = {
        name: values.to(next(model.parameters()).device) for name, values in batch.items()
    }
    if "use_cache" in signature(model.forward).parameters:
        inputs["use_cache"] = False
    logits = model(**inputs, return_dict=True).get("logits")
    if logits is None or logits.shape[:2] != batch["input_ids"].shape:
        raise UserError(
            f"{type(model).__name__} returns no logits per token: choose the checkpoint of a "
            f"causal language model for task {LANGUAGE_MODELING}."
        )
    return logits[:, :-1]  # type: ignore[no-any-return]


def compare_logits(logits: Sequence[Tensor], targets: Tensor) -> tuple[Tensor, float]:
    """Log-likelihoods (B, S) of the targets by the first logits (B, S, V), and the sum of
    KL(second || first); in float32, some tokens at a time."""
    size = max(1, _ENTRIES_AT_A_TIME // logits[0].shape[-1])
    parts = (values.flatten(0, 1).split(size) for values in (*logits, targets))
    found, total = [], 0.0
    for part in zip(*parts, strict=True):
        *both, labels = part
        log_q, *others = (values.float().log_softmax(-1) for values in both)
        found.append(log_q.gather(1, labels[:, None].to(log_q.device))[:, 0])
        for log_p in others:
            log_p = log_p.to(log_q.device)
            total += float((log_p.exp() * (log_p - log_q)).sum(-1).cpu().double().sum())
    return torch.cat(found).view(targets.shape), total
