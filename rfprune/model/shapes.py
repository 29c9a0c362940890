"""How many units a sublayer has, and what enters the linear maps that make them."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from rfprune.errors import UserError
from rfprune.families.schema import Sublayer
from rfprune.model.linear import linear, weight_of


def head_width(config: PretrainedConfig) -> int:
    """Features of one attention head."""
    for entry in ("head_dim", "d_kv"):
        width = getattr(config, entry, None)
        if isinstance(width, int) and width > 0:
            return width
    return int(config.hidden_size // config.num_attention_heads)


def producers_of(sublayer: Sublayer, config: PretrainedConfig) -> tuple[str, ...]:
    """Those that the configuration has of a sublayer's producers."""
    gated = sublayer.gated and getattr(config, "is_gated_act", False)
    return sublayer.gated if gated else sublayer.producers


def bias_table(model: nn.Module, sublayer: Sublayer, layer_path: str) -> str | None:
    """Path of the embedding where a layer looks up its position bias: its own or the first's."""
    if sublayer.bias_table is None:
        return None
    own = f"{layer_path}.{sublayer.bias_table}"
    if own in dict(model.named_modules()):
        return own
    first = layer_path.rpartition(".")[0] + ".0"
    return f"{first}.{sublayer.bias_table}"


def positional_maps(
    model: nn.Module, sublayer: Sublayer, layer_path: str, producers: list[str]
) -> tuple[list[str], int]:
    """Paths of what the embeddings of relative positions enter, and how many these are.

    Where there are no linear maps of their own for them, they enter those of queries and keys.
    """
    inner = model.get_submodule(f"{layer_path}.{sublayer.inner}")
    positions = 2 * getattr(inner, "pos_ebd_size", 0) if sublayer.positions else 0
    if not positions:
        return [], 0
    given = dict(model.named_modules()).keys() & {f"{layer_path}.{p}" for p in sublayer.positions}
    return sorted(given) or producers[:2], positions


def shapes(
    model: nn.Module, sublayer: Sublayer, consumer: str, producers: list[str], width: int
) -> tuple[int, int, list[int]]:
    """How many units there are, the features that the consumer reads, the rows of each producer.

    Keys and values that several query heads share have fewer rows than the queries; there are as
    many units as there are of them.
    """
    features = weight_of(linear(model, consumer)).shape[1]
    rows = [weight_of(linear(model, path)).shape[0] for path in producers]
    sizes = [size / sublayer.fused for size in (*rows, sublayer.fused * features)]
    num_units = int(min(sizes) // width)
    sound = num_units > 0 and all(size % (num_units * width) == 0 for size in sizes)
    if not sound or (sublayer.kind == "neuron" and len(set(sizes)) > 1):
        made = dict(zip(producers, rows, strict=True))
        raise UserError(
            f"'{consumer}' reads {features} features but its producers make {made}; "
            "the checkpoint's shapes do not fit together"
        )
    return num_units, features, rows


def original_units(config: PretrainedConfig, consumer: str, num_units: int) -> tuple[int, ...]:
    """Which units of the model before any pruning those of a consumer are, as far as is known."""
    for entry in (getattr(config, "rfprune", None) or {}).get("blocks", []):
        if entry["consumer"] == consumer and entry["units"] is not None:
            return tuple(entry["units"])
    return tuple(range(num_units))
