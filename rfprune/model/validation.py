"""Checks of a model before any work is done with it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rfprune.errors import UserError
from rfprune.families.architectures import ARCHITECTURES
from rfprune.model.batch import Batch, model_inputs
from rfprune.model.layout import Layout


def check_finite_weights(model: PreTrainedModel) -> None:
    """Check that all parameters are in memory and finite.

    Raises:
        UserError: names the first parameter that is offloaded, or holds NaN or infinity.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UserError(
                f"parameter '{name}' is offloaded, but pruning needs every weight in memory; load "
                "the model onto devices that hold all of it"
            )
        if not torch.isfinite(parameter).all():
            raise UserError(
                f"parameter '{name}' holds NaN or infinity; save or download the checkpoint again"
            )


def check_layer_outputs(model: PreTrainedModel, layout: Layout, batch: Batch) -> None:
    """Check that the layers of a model return what the row of its family says.

    `rfprune.model.layerwise.layer_calls` replaces layers by stand-ins, which must return the same
    kind of value. A wrong row would fail late in a run, and only in models of four layers or more.

    Args:
        batch: the model runs on its first example.

    Raises:
        UserError: a layer returns a tensor where the row has a tuple, or the other way round.
    """

    def check(_: nn.Module, __: Any, output: Any) -> None:
        expected = layout.layer_output_length
        length = len(output) if isinstance(output, tuple) else None
        if (length is None) != (expected is None) or (length or 0) < (expected or 0):
            returned, in_row = (
                "a tensor" if number is None else f"a tuple of {number}"
                for number in (length, expected)
            )
            raise UserError(
                f"the layers of this {layout.model_type} model return {returned}, but the row of "
                f"its family says {in_row}; correct `layer_output_length` in "
                "rfprune/families/architectures.py, or install a release of transformers that this "
                "version was tested with"
            )

    with ExitStack() as stack, torch.no_grad():
        for path in layout.layers:
            stack.callback(model.get_submodule(path).register_forward_hook(check).remove)
        model(**{name: value[:1] for name, value in model_inputs(batch).items()})


def reads_last_token(model: Any) -> bool:
    """Whether the head of a model reads the last token that is not the pad token: a classifier on a
    decoder."""
    family = ARCHITECTURES.get(getattr(model.config, "model_type", ""))
    is_causal = family is not None and family.causal
    return is_causal and type(model).__name__.endswith("ForSequenceClassification")


def check_pad_token(model: PreTrainedModel, batches: Sequence[Batch]) -> None:
    """Check that a classifier on a decoder finds the last token of each example.

    Raises:
        UserError: the model has no pad token, or the batches are padded with another one.
    """
    if not reads_last_token(model):
        return
    name, pad = type(model).__name__, model.config.pad_token_id
    way_out = "set model.config.pad_token_id = tokenizer.pad_token_id"
    for batch in batches:
        tokens, mask = batch.get("input_ids"), batch.get("attention_mask")
        if tokens is None or len(tokens) < 2:
            continue
        if pad is None:
            raise UserError(
                f"model.config.pad_token_id is None, but {name} needs the id of the pad token to "
                f"find the last token of each example in a batch: {way_out}"
            )
        if mask is None:
            continue
        places = torch.arange(tokens.shape[1], device=tokens.device)
        last = (places * (tokens != pad)).argmax(dim=1, keepdim=True)
        if not mask.gather(1, last).all():
            other = int(tokens[mask == 0][0])
            raise UserError(
                f"model.config.pad_token_id is {pad}, but the batches are padded with {other}, so "
                f"{name} would read padding as the last token: {way_out}, and pad with that id"
            )
