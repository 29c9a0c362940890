"""Run a model on prepared batches: its outputs as arrays, in the order of the data."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter, signature

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rfprune.embeddings import embed, pooling_of
from rfprune.errors import UserError

# Padded model inputs (B, S) by name, and the numbers of the B data rows in each batch.
Batches = Sequence[Mapping[str, Tensor]]
RowNumbers = Sequence[NDArray[np.int64]]


def class_logits(
    model: nn.Module, batches: Batches, rows: RowNumbers, num_outputs: int, *, progress: bool
) -> NDArray[np.float32]:
    """The logits (N, num_outputs) of N rows; UserError if the model has other outputs."""
    parts = []
    for batch, (logits,) in _outputs(model, batches, ("logits",), progress):
        _check_shape(model, "logits", logits, (batch_size(batch), num_outputs))
        parts.append(logits.numpy())
    return _in_order(parts, rows)


def token_logits(
    model: nn.Module,
    batches: Batches,
    rows: RowNumbers,
    positions: Sequence[NDArray[np.int64]],
    num_outputs: int,
    *,
    progress: bool,
) -> NDArray[np.float32]:
    """The logits (W, num_outputs) at the `positions` of each of N rows, row by row.

    Positions count from a row's first token, with padding on either side.
    """
    found: list[NDArray[np.float32]] = [np.empty((0, num_outputs), np.float32)] * len(positions)
    outputs = _outputs(model, batches, ("logits",), progress)
    for (batch, (logits,)), numbers in zip(outputs, rows, strict=True):
        is_token = batch["attention_mask"].bool()
        _check_shape(model, "logits", logits, (*is_token.shape, num_outputs))
        for row, kept, values in zip(numbers, is_token, logits, strict=True):
            found[row] = values[kept].numpy()[positions[row]]
    return np.concatenate(found)


def embeddings(
    model: nn.Module, batches: Batches, rows: RowNumbers, *, progress: bool
) -> NDArray[np.float32]:
    """The embeddings (N, d) of N rows, normalised; see `rfprune.embeddings`."""
    pooling, parts = pooling_of(getattr(model, "config", None)), []
    for batch, (hidden,) in _outputs(model, batches, ("last_hidden_state",), progress):
        parts.append(embed(hidden, batch["attention_mask"], pooling).numpy())
    return _in_order(parts, rows)


def batch_size(batch: Mapping[str, Tensor]) -> int:
    """Examples in a batch of any kind of input."""
    return len(next(iter(batch.values())))


def _in_order(parts: Sequence[NDArray[np.float32]], rows: RowNumbers) -> NDArray[np.float32]:
    values = np.concatenate(parts)
    ordered = np.empty_like(values)
    ordered[np.concatenate(rows)] = values
    return ordered


def span_logits(
    model: nn.Module, batches: Batches, rows: RowNumbers, *, progress: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Start and end logits (W, S) of W rows of up to S tokens, without padding.

    Positions count from a row's first token, with padding on either side; -inf stands behind
    shorter rows. UserError if the model has other outputs.
    """
    num_rows = sum(len(numbers) for numbers in rows)
    longest = max(int(batch["attention_mask"].sum(dim=1).max()) for batch in batches)
    start = np.full((num_rows, longest), -np.inf, dtype=np.float32)
    end = start.copy()
    names = ("start_logits", "end_logits")
    outputs = _outputs(model, batches, names, progress)
    for (batch, logits), numbers in zip(outputs, rows, strict=True):
        is_token = batch["attention_mask"].bool().numpy()
        for name, target, values in zip(names, (start, end), logits, strict=True):
            _check_shape(model, name, values, is_token.shape)
            for row, kept, row_values in zip(numbers, is_token, values.numpy(), strict=True):
                target[row, : kept.sum()] = row_values[kept]
    return start, end


def _outputs(
    model: nn.Module, batches: Batches, names: Sequence[str], progress: bool
) -> Iterator[tuple[Mapping[str, Tensor], list[Tensor]]]:
    """Each batch with the named outputs of the model, as float32 on the CPU."""
    from tqdm import tqdm

    device = next(model.parameters()).device
    accepted = _accepted_names(model, batches[0])
    check_embeddings_exist(model, batches)
    # not inference_mode: tensors that a model caches in it can never be differentiated later
    with eval_mode(model), torch.no_grad():
        bar = tqdm(batches, desc="scoring", unit="batch", disable=not progress, leave=False)
        for batch in bar:
            output = model(**{name: batch[name].to(device) for name in accepted})
            missing = [name for name in names if not isinstance(output.get(name), Tensor)]
            if missing:
                raise UserError(
                    f"{type(model).__name__} returns no {' and no '.join(missing)}: choose a "
                    f"checkpoint with the head of this task."
                )
            yield batch, [output[name].float().cpu() for name in names]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within, the model is in eval mode; afterwards every module has its earlier mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _accepted_names(model: nn.Module, batch: Mapping[str, Tensor]) -> list[str]:
    """The inputs that the model's forward accepts: DistilBERT, for example, has no token types."""
    parameters = signature(model.forward).parameters
    accepted = [name for name in batch if name in parameters]
    if "input_ids" in accepted or "pixel_values" in accepted:
        return accepted
    if not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()):
        raise UserError(
            f"{type(model).__name__} takes no {next(iter(batch))}: choose a checkpoint for this "
            f"task."
        )
    return list(batch)


def check_embeddings_exist(model: nn.Module, batches: Batches) -> None:
    """Raise a UserError for tokens without an embedding, which would crash the model."""
    config = getattr(model, "config", None)
    if "input_ids" not in batches[0]:
        return
    positions = getattr(config, "max_position_embeddings", None)
    longest = max(batch["input_ids"].shape[-1] for batch in batches)
    if positions is not None and longest > positions:
        raise UserError(
            f"The model takes at most {positions} tokens, but a row has {longest}: choose "
            f"--max-length {positions} or less."
        )
    vocabulary = getattr(config, "vocab_size", None)
    largest = max(int(batch["input_ids"].max()) for batch in batches)
    if vocabulary is not None and largest >= vocabulary:
        raise UserError(
            f"The tokenizer makes token id {largest}, but the model has only {vocabulary} token "
            f"embeddings: use the tokenizer that the model was trained with."
        )


def _check_shape(model: nn.Module, name: str, values: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(values.shape) != shape:
        raise UserError(
            f"{type(model).__name__} returned {name} of shape {tuple(values.shape)}, but the task "
            f"needs {shape}: choose a checkpoint fine-tuned on this task."
        )
