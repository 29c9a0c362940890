"""Densities and compressed sizes of maps with zeros."""

from __future__ import annotations

from rfprune.cost.sparsity import MapSparsity, density, layer_densities, num_zeros, saved_bytes

MAPS = (
    MapSparsity("a", 0, 800, 400, 0.1),
    MapSparsity("b", 0, 200, 200, 0.0),
    MapSparsity("c", 2, 100, 0, 1.0),
)


def test_densities_are_of_weights_rather_than_of_maps() -> None:
    assert density(MAPS) == 600 / 1100
    assert layer_densities(MAPS, 3) == [0.6, 1.0, 0.0]
    assert num_zeros(MAPS) == 500


def test_a_compressed_map_is_its_values_and_a_bitmask_and_never_larger_than_dense() -> None:
    assert saved_bytes(MAPS[:1], item_size=2) == 800 * 2 - (400 * 2 + 100)
    assert saved_bytes(MAPS[1:2], item_size=2) == 0
    assert saved_bytes(MAPS, item_size=4) == (1600 - 100) + (400 - 13)
