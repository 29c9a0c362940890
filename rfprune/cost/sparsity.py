"""Zeros in linear maps: density, and the size of the weights when they are compressed.

PyTorch and safetensors store zeros like any other number, so the file of a sparse model is no
smaller. Compressed, a map holds its non-zero values and one bit per weight that says where they are
(a bitmask, as runtimes with sparse weights store them). For 2:4 this is also the size of the format
of NVIDIA's sparse tensor cores, which has an index of two bits for each of the two values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MapSparsity:
    """The zeros of one linear map.

    Attributes:
        path: of the map, from the model's root.
        layer: index of its Transformer layer.
        num_weights: weights of the map, zeros included, biases excluded.
        num_nonzeros: weights that are not zero.
        error: mean square of the change of its outputs on the calibration inputs, as a fraction of
            the mean square of the outputs (about their mean where the map has a bias).
    """

    path: str
    layer: int
    num_weights: int
    num_nonzeros: int
    error: float


def density(maps: Iterable[MapSparsity]) -> float:
    """The fraction of the weights of maps that are not zero; 1 without any weights."""
    maps = list(maps)
    total = sum(one.num_weights for one in maps)
    return sum(one.num_nonzeros for one in maps) / total if total else 1.0


def layer_densities(maps: Sequence[MapSparsity], num_layers: int) -> list[float]:
    """The density of the maps of every layer."""
    return [density(one for one in maps if one.layer == layer) for layer in range(num_layers)]


def num_zeros(maps: Iterable[MapSparsity]) -> int:
    """How many weights of the maps are zero."""
    return sum(one.num_weights - one.num_nonzeros for one in maps)


def saved_bytes(maps: Iterable[MapSparsity], item_size: int) -> int:
    """Bytes that compression saves: every zero, less the bitmask; nothing where that is larger.

    Args:
        item_size: bytes of a stored weight.

    Example:
        A map at half density in float16 takes 9/16 of its bytes:

        >>> saved_bytes([MapSparsity("layer.0.query", 0, 1024, 512, 0.1)], item_size=2)
        896
    """
    return sum(
        max(0, (one.num_weights - one.num_nonzeros) * item_size - -(-one.num_weights // 8))
        for one in maps
    )
