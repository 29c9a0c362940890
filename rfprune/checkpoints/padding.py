"""The pad token of decoder classifiers, which find the last token of each text by it."""

from __future__ import annotations

import warnings
from typing import Any

from rfprune.errors import RfpruneWarning, UserError
from rfprune.model.validation import reads_last_token


def align_pad_token(model: Any, tokenizer: Any, source: str) -> None:
    """Give the model of a decoder classifier the pad token of its tokenizer.

    Where only the model has one, the tokenizer gets it; where neither has one, both get the
    end-of-text token. Saved outputs have the same entries. Other models read the attention mask.

    Raises:
        UserError: neither has a pad token, and the tokenizer has no end-of-text token.
    """
    if not reads_last_token(model):
        return
    own = model.config.pad_token_id
    if tokenizer.pad_token_id is None:
        known = tokenizer.eos_token_id if own is None else own
        if known is None:
            raise UserError(
                f"The tokenizer of '{source}' has no pad token, by which "
                f"{type(model).__name__} finds the end of a text: set tokenizer.pad_token, and "
                f"save the tokenizer again."
            )
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(known)
    if own not in (None, tokenizer.pad_token_id):
        warnings.warn(
            f"The model of '{source}' has the pad_token_id {own}, and its tokenizer pads with "
            f"{tokenizer.pad_token_id} ({tokenizer.pad_token!r}): the tokenizer's is used.",
            RfpruneWarning,
            stacklevel=2,
        )
    model.config.pad_token_id = tokenizer.pad_token_id
