"""Sequence-to-sequence: texts that an encoder-decoder writes, and how far another model is from it.

Pruning needs no targets: the texts to imitate are those that the model itself writes. Both models
then read the same text in the decoder (teacher forcing), and their predictions are compared at each
of its tokens. A token that is written is a row of ids here, with -1 behind the end of a text, so
that its length does not depend on the padding token, which may also start or end a text.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rfprune.errors import RfpruneWarning, UserError
from rfprune.settings import MAX_NEW_TOKENS, WritingSettings
from rfprune.tasks.batching import Batch
from rfprune.tasks.inference import check_embeddings_exist, eval_mode
from rfprune.tasks.language_modeling import compare_logits, rows_at_a_time
from rfprune.tasks.max_length import checked_length
from rfprune.tasks.registry import SEQ2SEQ, Task

_BEHIND_THE_END = -1
_CUT_FRACTION = 0.05  # of the texts that are as long as allowed, above which there is a warning
_OF_SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff"),
)
_OF_BEAMS = ("early_stopping", "length_penalty")
_INPUTS = ("input_ids", "attention_mask")
_DECODER_INPUTS = ("decoder_input_ids", "decoder_attention_mask")


@dataclass(frozen=True, eq=False)
class SourcesAndTargets:
    """The N texts to write from, those to compare with, and the tokenizer of what is written."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    tokenizer: Any

    def texts(self, tokens: NDArray[np.int64]) -> list[str]:
        """The texts of written tokens (N, T)."""
        rows = [row[row != _BEHIND_THE_END].tolist() for row in tokens]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [text.strip() for text in texts]


def encode_sources(
    task: Task, tokenizer: Any, chunk: Any, max_length: int | None
) -> dict[str, Any]:
    """Columns of tokenised sources, each behind the prefix of the task."""
    length = checked_length(task, tokenizer, max_length)
    sources = with_prefix(task.writing, chunk[task.text_columns[0]])
    return dict(tokenizer(sources, truncation=True, max_length=length))


def with_prefix(writing: WritingSettings, sources: Sequence[str]) -> list[str]:
    """The sources as the model reads them."""
    return [writing.source_prefix + source for source in sources]


def generate_targets(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    max_new_tokens: int | None = None,
    num_beams: int | None = None,
) -> list[dict[str, Tensor]]:
    """Make calibration batches of an encoder-decoder: inputs, and the texts it generates from them.

    Pruning then preserves what the model does on its own texts, and no targets are needed.

    Args:
        model: a T5, BART, Marian or other encoder-decoder of transformers.
        batches: input_ids (B, S) and attention_mask (B, S), and nothing that depends on targets.
        max_new_tokens: maximum number of generated tokens; None: as in the model's generation
            config, or 128.
        num_beams: 1 for greedy generation; None: as in the model's generation config.

    Returns:
        The batches with decoder_input_ids (B, T) and decoder_attention_mask (B, T), on the CPU.

    Raises:
        UserError: the model is not an encoder-decoder that generates, a token has no embedding, or
            there are no inputs.

    Example:
        >>> import torch
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> from rfprune import generate_targets, prune
        >>> config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        ...                   vocab_size=100, decoder_start_token_id=0)
        >>> model = T5ForConditionalGeneration(config)
        >>> sources = [{"input_ids": torch.randint(2, 100, (8, 16))} for _ in range(4)]
        >>> batches = generate_targets(model, sources, max_new_tokens=12)
        >>> result = prune(model, batches, 0.5)
        >>> result.achieved["mac"] <= 0.5
        True
    """
    writing = WritingSettings(max_new_tokens=max_new_tokens, num_beams=num_beams)
    _check_sources(batches)
    rows = row_numbers(batches)
    tokens = written_tokens(model, batches, rows, writing)
    return list(with_written(model, batches, rows, tokens))


def _check_sources(batches: Sequence[Batch]) -> None:
    if not batches:
        raise UserError("there are no batches to write texts from: give at least one")
    for number, batch in enumerate(batches):
        if "input_ids" not in batch or not len(batch["input_ids"]):
            raise UserError(
                f"batches[{number}] holds {', '.join(batch) or 'nothing'}, but texts are written "
                f"from input_ids (B, S): give those, or decoder_input_ids of your own to prune()"
            )


def row_numbers(batches: Sequence[Batch]) -> list[NDArray[np.int64]]:
    """The numbers of the rows of each batch, counted over all of them."""
    ends = np.cumsum([len(batch["input_ids"]) for batch in batches])
    return np.split(np.arange(ends[-1]), ends[:-1])


def written_tokens(
    model: Any,
    batches: Sequence[Batch],
    rows: Sequence[NDArray[np.int64]],
    writing: WritingSettings,
    *,
    progress: bool = False,
) -> NDArray[np.int64]:
    """The ids (N, T) that a model writes, with its start token, and -1 behind the end.

    Args:
        model: an encoder-decoder; its training mode is the same afterwards.
        batches: sources, (B, S).
        rows: the row numbers of each batch.
        writing: the most tokens, and the number of beams.
        progress: whether to show a progress bar.

    Raises:
        UserError: the model does not generate, or has no embedding for a token.
    """
    from tqdm import tqdm

    _check_writes(model)
    check_embeddings_exist(model, batches)
    config = generation_config(model, writing)
    ends = _end_ids(model, config)
    parts = []
    bar = tqdm(batches, desc="writing", unit="batch", disable=not progress, leave=False)
    with torch.no_grad(), eval_mode(model):
        for batch in bar:
            inputs = {name: batch[name].to(model.device) for name in _INPUTS if name in batch}
            ids = model.generate(**inputs, generation_config=config)
            parts.append(_without_filling(ids.cpu(), ends))
    width = max(part.shape[1] for part in parts)
    tokens = np.full((sum(map(len, parts)), width), _BEHIND_THE_END, dtype=np.int64)
    for part, numbers in zip(parts, rows, strict=True):
        tokens[numbers, : part.shape[1]] = part.numpy()
    return tokens


def _check_writes(model: Any) -> None:
    is_pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if not (is_pair and model.can_generate()):
        raise UserError(
            f"{type(model).__name__} is no encoder-decoder that writes texts: choose a T5, BART, "
            f"Marian or similar checkpoint for task {SEQ2SEQ}."
        )


def generation_config(model: Any, writing: WritingSettings) -> Any:
    """The model's generation config without sampling, and with the length and beams asked for."""
    config = copy.deepcopy(model.generation_config)
    longest = writing.max_new_tokens or config.max_new_tokens or config.max_length or MAX_NEW_TOKENS
    positions = getattr(model.config, "max_position_embeddings", None) or longest + 1
    config.max_length, config.max_new_tokens = None, max(1, min(longest, positions - 1))
    if config.min_length:
        config.min_length = min(config.min_length, config.max_new_tokens)
    config.num_beams = writing.num_beams or config.num_beams or 1
    config.do_sample, config.num_return_sequences = False, 1
    config.return_dict_in_generate = False
    for name in (*_OF_SAMPLING, *(_OF_BEAMS if config.num_beams == 1 else ())):
        setattr(config, name, None)
    return config


def _end_ids(model: Any, config: Any) -> Tensor:
    ends = config.eos_token_id
    if ends is None:
        ends = model.config.eos_token_id
    return torch.tensor([] if ends is None else ends).flatten()


def _without_filling(ids: Tensor, ends: Tensor) -> Tensor:
    """Generated ids (B, T) with -1 behind the first end token that follows the start token."""
    is_end = torch.isin(ids[:, 1:], ends)
    is_filling = is_end.cumsum(1) - is_end.long() > 0
    return torch.cat([ids[:, :1], ids[:, 1:].masked_fill(is_filling, _BEHIND_THE_END)], 1)


def with_written(
    model: Any,
    batches: Sequence[Batch],
    rows: Sequence[NDArray[np.int64]],
    tokens: NDArray[np.int64],
) -> Iterator[dict[str, Tensor]]:
    """The batches with written texts (N, T) in the decoder: its inputs and their mask, (B, T).

    At each position that the mask keeps, the decoder predicts the token that was written next.
    """
    filling = getattr(model.config, "pad_token_id", None) or 0
    for batch, numbers in zip(batches, rows, strict=True):
        own = torch.from_numpy(tokens[numbers])
        mask = own[:, 1:] != _BEHIND_THE_END
        width = int(mask.sum(1).max())
        mask = mask[:, :width]
        ids = torch.where(mask, own[:, :width], filling)
        yield {**batch, **dict(zip(_DECODER_INPUTS, (ids, mask.long()), strict=True))}


def target_divergence(
    model: nn.Module,
    reference: nn.Module,
    batches: Sequence[Batch],
    *,
    progress: bool = False,
) -> float:
    """Mean KL(reference || model) over the decoder's tokens, in nats per token.

    Args:
        model: an encoder-decoder.
        reference: another one of the same vocabulary.
        batches: of `with_written`.
        progress: whether to show a progress bar.
    """
    from tqdm import tqdm

    total, count = 0.0, 0
    bar = tqdm(batches, desc="comparing", unit="batch", disable=not progress, leave=False)
    with torch.no_grad(), eval_mode(model), eval_mode(reference):
        for batch in bar:
            size = rows_at_a_time(model, batch["decoder_input_ids"])
            for first in range(0, len(batch["input_ids"]), size):
                part = {name: values[first : first + size] for name, values in batch.items()}
                logits = [_decoder_logits(one, part) for one in (model, reference)]
                kept = part["decoder_attention_mask"].bool()
                ids = part["decoder_input_ids"][kept][None].to(logits[0].device)
                flat = [values[kept.to(values.device)][None] for values in logits]
                total += compare_logits(flat, ids)[1]
                count += int(kept.sum())
    return total / count


def _decoder_logits(model: Any, batch: Batch) -> Tensor:
    names = [name for name in (*_INPUTS, *_DECODER_INPUTS) if name in batch]
    inputs = {name: batch[name].to(model.device) for name in names}
    logits: Tensor = model(**inputs, use_cache=False, return_dict=True).logits
    return logits


def warn_about_long_targets(
    model: Any, tokens: NDArray[np.int64], writing: WritingSettings
) -> None:
    """Warn if many texts (N, T) had no end yet when they reached the most tokens."""
    config = generation_config(model, writing)
    most, ends = int(config.max_new_tokens), _end_ids(model, config).numpy()
    last = tokens[:, most:]  # behind the start token: the last that was allowed, or none
    cut = int(((last != _BEHIND_THE_END) & ~np.isin(last, ends)).sum())
    if cut > _CUT_FRACTION * len(tokens):
        warnings.warn(
            f"{cut} of {len(tokens)} texts that the model wrote were cut at {most} tokens: choose "
            f"a larger --max-new-tokens to let it end them.",
            RfpruneWarning,
            stacklevel=2,
        )


def sample_texts(
    pairs: SourcesAndTargets, written: Mapping[str, Sequence[str]], *, width: int
) -> list[dict[str, str]]:
    """Sources and targets beside the texts that models wrote from the first of them.

    Args:
        written: by the name of the model.
        width: the most characters of a text.
    """

    def shown(text: str) -> str:
        line = " ".join(text.split())
        return line if len(line) <= width else line[: width - 3] + "..."

    columns = {"source": pairs.sources, "target": pairs.targets, **written}
    rows = range(min(map(len, columns.values())))
    return [{name: shown(texts[row]) for name, texts in columns.items()} for row in rows]
