"""Sample texts: how language models continue the beginning of the validation text."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rfprune.tasks.batching import Batch
from rfprune.tasks.inference import eval_mode

PROMPT_TOKENS = 24
NEW_TOKENS = 32


def continuations(
    models: Mapping[str, Any], tokenizer: Any, batches: Sequence[Batch]
) -> dict[str, str]:
    """Texts that models generate greedily after the same prompt.

    Args:
        models: by name.
        tokenizer: of the models.
        batches: blocks of tokens; the prompt is the beginning of the first block.

    Returns:
        The generated texts by model name, and the `prompt`; empty if a model cannot generate.
    """
    if not all(model.can_generate() for model in models.values()):
        return {}
    prompt = batches[0]["input_ids"][:1, :PROMPT_TOKENS]
    prompt = prompt[:, : max(1, prompt.shape[1] // 2)] if _is_short(batches) else prompt
    written = {"prompt": _decoded(tokenizer, prompt[0])}
    for name, model in models.items():
        with torch.inference_mode(), eval_mode(model):
            ids = prompt.to(model.device)
            found = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(NEW_TOKENS, _room(model, ids)),
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or 0,
            )
        written[name] = _decoded(tokenizer, found[0, ids.shape[1] :])
    return written


def _is_short(batches: Sequence[Batch]) -> bool:
    return bool(batches[0]["input_ids"].shape[1] <= PROMPT_TOKENS)


def _room(model: Any, ids: Any) -> int:
    """The number of tokens that the model has positions left for."""
    positions = getattr(model.config, "max_position_embeddings", None) or NEW_TOKENS + ids.shape[1]
    return max(1, int(positions) - int(ids.shape[1]))


def _decoded(tokenizer: Any, ids: Any) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return " ".join(text.split())
