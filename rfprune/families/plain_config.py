"""What each family's configuration calls the sizes that pruning changes: data, one row a family.

`rfprune.model.plain` writes them, so that a pruned model is its family's own plain architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entries:
    """What a family's configuration calls its sizes.

    Attributes:
        neurons: the number of neurons of every layer.
        heads: the number of units of every attention, and then all other entries that are to stay
            in proportion to it; empty where the width of a head cannot be said.
    """

    neurons: str = "intermediate_size"
    heads: tuple[str, ...] = ()


_GROUPED = Entries(heads=("num_key_value_heads", "num_attention_heads"))

ENTRIES: dict[str, Entries] = {
    "bert": Entries(),
    "roberta": Entries(),
    "xlm-roberta": Entries(),
    "camembert": Entries(),
    "ernie": Entries(),
    "electra": Entries(),
    "albert": Entries(),
    "deberta-v2": Entries(),
    "mpnet": Entries(),
    "distilbert": Entries(neurons="hidden_dim"),
    "modernbert": Entries(),
    "gpt2": Entries(neurons="n_inner"),
    "opt": Entries(neurons="ffn_dim"),
    "t5": Entries(neurons="d_ff"),
    "mt5": Entries(neurons="d_ff"),
    "llama": _GROUPED,
    "mistral": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
    "smollm3": _GROUPED,
    "gemma": _GROUPED,
    "starcoder2": _GROUPED,
    "stablelm": Entries(),
    "vit": Entries(),
    "deit": Entries(),
    "beit": Entries(),
}
"""By model type. Not here: families whose configuration cannot say any number of neurons, or has
one entry for the encoder and one for the decoder."""


def said_by(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json of a plain model says of its sizes, by the last part of a block's name."""
    entries = ENTRIES[config["model_type"]]
    names = (*entries.heads, "num_attention_heads", "n_heads", "n_head", "num_heads")
    heads = next((config[name] for name in names if config.get(name) is not None), None)
    return {"heads": heads, "cross_heads": heads, "neurons": config.get(entries.neurons)}
