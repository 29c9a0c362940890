"""Language modelling: blocks of running text, perplexity, and the divergence token by token.

Logits of a language model have an entry a word of the vocabulary for every token, gigabytes for a
validation text. They are never kept: a pass over the batches takes the log-likelihood of every
token from them and, beside another model, the divergence of the two.
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
"""What is put between the rows of a table of texts."""

# A text is tokenised in pieces of so many characters, each up to the end of a line: tokenizers
# need more than linear time, or memory, for a text in one piece.
_PIECE = 2**17
_ENTRIES_AT_A_TIME = 2**24  # of logits
_LINE_END = re.compile(r"\n+")


def encode_blocks(tokenizer: Any, texts: Sequence[str], max_length: int) -> dict[str, Any]:
    """The texts one after the other, cut into blocks of `max_length` tokens: {input_ids: rows}.

    Blocks begin as the tokenizer begins a text (with its BOS token, if it has one). What is left
    over at the end is left out. UserError where there is not one block.
    """
    before = tokenizer("a")["input_ids"][:1]
    before = before if before == [tokenizer.bos_token_id] else []
    tokens = [token for piece in _pieces(PARAGRAPH.join(texts)) for token in _ids(tokenizer, piece)]
    size = max_length - len(before)
    blocks = [
        before + tokens[first : first + size] for first in range(0, len(tokens) - size + 1, size)
    ]
    if not blocks:
        raise UserError(
            f"The text has {len(tokens)} tokens, which do not fill one block of {max_length}: give "
            f"a longer text, or smaller blocks with --max-length."
        )
    return {"input_ids": blocks, "attention_mask": [[1] * len(block) for block in blocks]}


def _ids(tokenizer: Any, piece: str) -> list[int]:
    found: list[int] = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _pieces(text: str) -> Iterator[str]:
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
    """Log-likelihood of every token but the first of its block, (N, S - 1) in the order of `rows`,
    and the mean KL(reference || model) of what is predicted for them, in nats a token.

    UserError for a model that gives no logits over a vocabulary, or none that are finite.
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
            size = _rows_at_a_time(model, batch)
            for first in range(0, len(numbers), size):
                part = {name: values[first : first + size] for name, values in batch.items()}
                logits = [_next_token_logits(one, part) for one in models]
                targets = part["input_ids"][:, 1:].to(logits[0].device)
                found, apart = _compared(logits, targets)
                likelihoods[numbers[first : first + size]] = found.cpu().numpy()
                divergence, count = divergence + apart, count + targets.numel()
    if not np.isfinite(likelihoods).all():
        raise UserError(
            "The model's logits are not finite: its weights are damaged, or too large for its "
            "dtype."
        )
    return likelihoods, None if reference is None else divergence / count


def _rows_at_a_time(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Rows of a batch whose logits fit into memory several times over."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or 1
    return max(1, 2 * _ENTRIES_AT_A_TIME // (vocabulary * batch["input_ids"].shape[1]))


def _next_token_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(B, S - 1, V), of all tokens but the first."""
    inputs: dict[str, Any] = {
        name: values.to(next(model.parameters()).device) for name, values in batch.items()
    }
    if "use_cache" in signature(model.forward).parameters:
        inputs["use_cache"] = False
    logits = model(**inputs, return_dict=True).get("logits")
    if logits is None or logits.shape[:2] != batch["input_ids"].shape:
        raise UserError(
            f"{type(model).__name__} gives no logits for every token: choose a checkpoint of a "
            f"causal language model for task {LANGUAGE_MODELING}."
        )
    return logits[:, :-1]  # type: ignore[no-any-return]


def _compared(logits: Sequence[Tensor], targets: Tensor) -> tuple[Tensor, float]:
    """Log-likelihoods (B, S) of the targets by the first logits (B, S, V), and the sum of
    KL(second || first), in float32 and some tokens at a time."""
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
