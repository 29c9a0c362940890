"""Error curves, sizes and stage scores of a report are those of the run."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rfprune import Constraint, Settings, prune
from rfprune.model.compact import compact
from rfprune.model.layout import layout_of
from rfprune.report.measure import (
    MAX_POINTS,
    curve_points,
    original_layers,
    stage_scores,
    thinned_units,
)
from rfprune.tasks.evaluation import divergence, evaluate_model, prepare_evaluation
from rfprune.tasks.registry import get_task


@pytest.fixture(scope="module")
def batches(tiny_batch: Callable[..., Any]) -> list[Any]:
    return [tiny_batch(seed=seed) for seed in range(3)]


@pytest.mark.parametrize("method", ["kwon", "curvature"])
def test_every_block_has_a_curve_with_the_chosen_point(
    method: str, tiny_model: Callable[..., Any], batches: list[Any]
) -> None:
    result = prune(tiny_model(), batches, Constraint("mac", 0.5), Settings(method=method))
    assert original_layers(result.layout) == [{"heads": 4, "neurons": 12}] * 2
    assert list(result.layers) != original_layers(result.layout)
    curves = curve_points(result)
    assert [(curve["layer"], curve["kind"]) for curve in curves] == [
        *((0, "heads"), (0, "neurons"), (1, "heads"), (1, "neurons"))
    ]
    for curve in curves:
        assert curve["kept"] == result.layers[curve["layer"]][curve["kind"]]
        assert curve["kept"] in curve["units"]
        assert curve["units"] == list(range(5 if curve["kind"] == "heads" else 13))
        assert curve["errors"] == sorted(curve["errors"], reverse=True)
        assert curve["errors"][0] > curve["errors"][-1] == 0.0
    if method == "kwon":
        assert result.importance is not None
        importance = sorted(result.importance[0].double().tolist())
        expected = [sum(importance[: 4 - n]) for n in range(5)]
        assert curves[0]["errors"] == pytest.approx(expected, rel=1e-5), "the importance lost"


@given(st.integers(0, 5000), st.floats(0, 1))
def test_curves_are_thinned_evenly_and_keep_the_chosen_point(total: int, share: float) -> None:
    kept = round(share * total)
    units = thinned_units(total, kept)
    assert len(units) <= MAX_POINTS
    assert units == sorted(set(units))
    assert {0, kept, total} <= set(units)
    steps = [after - before for before, after in pairwise(units)]
    assert max(steps, default=0) <= total / (MAX_POINTS - 2) + 1


def test_cross_attention_has_its_own_sizes_and_curves(
    tiny_model: Callable[..., Any], tiny_batch: Callable[..., Any]
) -> None:
    """Pruned once more, too, when blocks of the first run may be gone."""
    model = tiny_model("bart")
    batches = [tiny_batch(seed=seed, model_type="bart") for seed in range(3)]
    result = prune(model, batches, Constraint("mac", 0.3), Settings(tune=False))
    names = [{"heads", "neurons"}] * 2 + [{"heads", "cross_heads", "neurons"}] * 2
    assert [set(layer) for layer in result.layers] == names
    assert original_layers(result.layout) == [
        dict.fromkeys(own, 4) | {"neurons": 12} for own in names
    ]
    for curve in curve_points(result):
        assert curve["kept"] == result.layers[curve["layer"]][curve["kind"]]
    kinds = [(curve["layer"], curve["kind"]) for curve in curve_points(result)]
    assert len(kinds) == len(set(kinds)) == 2 * 2 + 2 * 3
    no_cross = tuple(
        torch.zeros_like(mask) if block.name == "layer.2.cross_heads" else torch.ones_like(mask)
        for block, mask in zip(result.layout.blocks, result.masks, strict=True)
    )
    emptied = layout_of(compact(model, result.layout, no_cross))
    assert len(emptied.blocks) == len(result.layout.blocks) - 1
    assert original_layers(emptied)[2] == {"heads": 4, "cross_heads": 0, "neurons": 12}


@pytest.mark.parametrize("method", ["kwon", "curvature"])
def test_stage_scores_are_those_of_the_models(
    method: str,
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Callable[..., Any],
    tiny_data_dir: Path,
    batches: list[Any],
) -> None:
    model = tiny_model()
    data = prepare_evaluation(get_task("mrpc"), tiny_tokenizer(), tiny_data_dir, batch_size=8)
    result = prune(model, batches, Constraint("mac", 0.5), Settings(method=method))
    original, pruned = evaluate_model(model, data), evaluate_model(result.model, data)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stages = stage_scores(model, result, data, original, pruned)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [stage["stage"] for stage in stages] == ["original", "selected", "fitted"]
    assert stages[0] == {"stage": "original", "score": original.score, "divergence": 0.0}
    assert stages[2]["score"] == pruned.score
    # What was selected is the model that is merely made smaller.
    chosen = tuple((mask != 0).float() for mask in result.masks)
    selected = evaluate_model(compact(model, result.layout, chosen), data)
    assert stages[1]["score"] == selected.score
    assert stages[1]["divergence"] == pytest.approx(divergence(original, selected), rel=1e-4)
    assert stages[1]["divergence"] > 0
    assert stages[1]["divergence"] != pytest.approx(stages[2]["divergence"])
