"""Zeros within whole models: every family, alone and after units were removed, saved and loaded.

Without these tests maps could be left dense, chosen on the wrong inputs, or zeros could reach
embeddings and heads, or be lost on the way to a folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from rfprune import Constraint, Settings, load_pruned, prune
from rfprune.cost.sparsity import density
from rfprune.errors import UserError
from rfprune.model.layout import layout_of
from rfprune.model.linear import weight_of
from rfprune.stages.least_squares import Moments
from rfprune.stages.map_inputs import linear_maps, visit_maps
from tests.conftest import ALL_TYPES

TinyModel = Callable[..., Any]
TinyBatch = Callable[..., dict[str, Tensor]]


def zeros_of(model: Any) -> dict[str, float]:
    """The fraction of zeros of every parameter that has some."""
    shares = {name: float((each == 0).float().mean()) for name, each in model.named_parameters()}
    return {name: share for name, share in shares.items() if share}


@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_every_linear_map_of_the_layers_has_the_pattern(
    model_type: str, tiny_model: TinyModel, tiny_batch: TinyBatch
) -> None:
    """And only these; fused projections, Conv1D and cross-attention included."""
    model = tiny_model(model_type)
    batches = [tiny_batch(model_type=model_type, seed=seed) for seed in range(2)]
    before = zeros_of(model)
    result = prune(model, batches, None, Settings(sparsity="2:4"))
    layout = layout_of(result.model)
    maps = [path for layer in layout.layers for path in linear_maps(result.model, layer)]
    assert maps
    assert zeros_of(result.model).keys() - before.keys() == {f"{path}.weight" for path in maps}
    for path in maps:
        for group in weight_of(result.model.get_submodule(path)).split(4, dim=1):
            assert int(group.count_nonzero(dim=1).max()) == 2
    assert type(result.model) is type(model)
    assert zeros_of(model) == before, "the original is untouched"
    assert result.sparsity is not None
    assert {one.path for one in result.sparsity} == set(maps)
    assert result.warnings == ()


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("model_type", ["bert", "gpt2", "bart", "albert"])
def test_a_density_is_met_within_one_weight(
    model_type: str, scope: str, tiny_model: TinyModel, tiny_batch: TinyBatch
) -> None:
    batches = [tiny_batch(model_type=model_type, seed=seed) for seed in range(2)]
    settings = Settings(sparsity=0.3, sparsity_scope=scope)
    result = prune(tiny_model(model_type), batches, None, settings)
    assert result.sparsity is not None
    total = sum(one.num_weights for one in result.sparsity)
    assert abs(sum(one.num_nonzeros for one in result.sparsity) - 0.7 * total) <= 1 + (
        len(result.sparsity) if scope == "layer" else 0
    )
    densities = [one.num_nonzeros / one.num_weights for one in result.sparsity]
    assert (max(densities) - min(densities) > 0.05) == (scope == "global")


@pytest.mark.parametrize("model_type", ["bert", "llama", "gpt2"])
def test_each_map_sees_the_inputs_that_the_zeros_below_it_make(
    model_type: str, tiny_model: TinyModel, tiny_batch: TinyBatch
) -> None:
    """Moments are those of the inputs in the sparse model, and targets those in the dense one."""
    model = tiny_model(model_type).requires_grad_(False)
    batches = [{**tiny_batch(padding="left", model_type=model_type)}]
    seen: dict[str, Moments] = {}

    def visit(_: int, paths: Any, train: Moments, held_out: Moments) -> None:
        for path in paths:
            seen[path] = train + held_out
            weight = weight_of(model.get_submodule(path))
            weight[:, ::2] = 0

    layout = layout_of(model)
    reference = tiny_model(model_type).requires_grad_(False)
    visit_maps(model, layout, batches, visit, reference=reference)
    assert len(seen) == sum(len(linear_maps(model, layer)) for layer in layout.layers)
    for path, moments in seen.items():
        rows, targets = (inputs_of(each, path, batches[0]) for each in (model, reference))
        assert moments.count == len(rows)
        assert torch.allclose(moments.gram, rows.T @ rows, rtol=1e-4, atol=1e-4)
        assert torch.allclose(moments.cross, rows.T @ targets, rtol=1e-4, atol=1e-4)


def inputs_of(model: Any, path: str, batch: dict[str, Tensor]) -> Tensor:
    """Inputs (tokens, p) of a map in a forward pass, without padding."""
    inputs: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda _, args: inputs.append(args[0])
    )
    model(**batch)
    handle.remove()
    rows = inputs[0].reshape(-1, inputs[0].shape[-1])
    return rows[batch["attention_mask"].bool().flatten()].double()


def test_after_units_were_removed_both_hold(
    tiny_model: TinyModel, tiny_batch: TinyBatch, tmp_path: Path
) -> None:
    model = tiny_model("bert")
    batches = [tiny_batch(seed=seed) for seed in range(9)]
    plain = prune(model, batches, Constraint("mac", 0.6), Settings(round_to=1))
    result = prune(model, batches, Constraint("mac", 0.6), Settings(round_to=1, sparsity="2:4"))
    assert result.layers == plain.layers
    assert result.achieved == plain.achieved
    assert result.sparsity is not None
    assert sum(one.num_weights for one in result.sparsity) == sum(
        weight_of(module).numel()
        for name, module in plain.model.named_modules()
        if isinstance(module, nn.Linear) and ".layer." in name
    )
    result.save(tmp_path / "sparse")
    loaded = load_pruned(tmp_path / "sparse")
    assert zeros_of(loaded) == zeros_of(result.model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_ordinary_model_with_zeros_is_saved_and_loaded(
    dtype: torch.dtype, tiny_model: TinyModel, tiny_batch: TinyBatch, tmp_path: Path
) -> None:
    model = tiny_model("bert").to(dtype)
    result = prune(model, [tiny_batch()], None, Settings(sparsity="2:4"))
    assert result.constraint is None
    assert result.model.dtype == dtype
    result.save(tmp_path / "sparse")
    assert not (tmp_path / "sparse" / "modeling_rfprune.py").exists()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse")
    assert zeros_of(loaded) == zeros_of(result.model) != {}
    batch = tiny_batch(seed=3)
    assert torch.equal(loaded(**batch).logits, result.model(**batch).logits)


def test_the_adjusted_weights_follow_the_original_more_closely(
    tiny_model: TinyModel, tiny_batch: TinyBatch
) -> None:
    model = tiny_model("bert", hidden_size=32, intermediate_size=64)
    batches = [tiny_batch(16, 12, seed=seed) for seed in range(8)]
    test = tiny_batch(16, 12, seed=99)
    model.requires_grad_(False)
    reference = model(**test).logits
    errors = {}
    for criterion in ("obs", "wanda", "magnitude"):
        settings = Settings(sparsity="2:4", sparsity_criterion=criterion)
        sparse = prune(model, batches, None, settings).model
        errors[criterion] = float((sparse(**test).logits - reference).square().mean())
    assert errors["obs"] < 0.7 * min(errors["wanda"], errors["magnitude"])


def test_a_map_that_shares_its_weight_is_refused(
    tiny_model: TinyModel, tiny_batch: TinyBatch
) -> None:
    model = tiny_model("deberta-v2")
    attention = model.deberta.encoder.layer[0].attention
    attention.output.dense.weight = attention.self.pos_key_proj.weight
    with pytest.raises(UserError, match="share"):
        prune(model, [tiny_batch()], None, Settings(sparsity="2:4"))


def test_no_constraint_needs_something_else_to_do(
    tiny_model: TinyModel, tiny_batch: TinyBatch
) -> None:
    with pytest.raises(UserError, match="constraint None is not a fraction"):
        prune(tiny_model(), [tiny_batch()], None)


@pytest.mark.cuda
def test_sparse_tensor_cores_take_the_maps_of_a_model_with_2_of_4(tiny_model: TinyModel) -> None:
    """torch.sparse.to_sparse_semi_structured, with the same outputs to half precision."""
    model = tiny_model("bert", hidden_size=128, intermediate_size=256).half().cuda()
    batch = {"input_ids": torch.randint(5, 90, (32, 8), device="cuda")}
    sparse = prune(model, [batch], None, Settings(sparsity="2:4")).model.eval()
    with torch.inference_mode():
        expected = sparse(**batch).logits
        for layer in layout_of(sparse).layers:
            for path in linear_maps(sparse, layer):
                module = sparse.get_submodule(path)
                compressed = torch.sparse.to_sparse_semi_structured(module.weight.detach())
                module.weight = nn.Parameter(compressed, requires_grad=False)
        found = sparse(**batch).logits
    assert torch.allclose(found, expected, rtol=0.05, atol=0.05)


def test_the_density_of_maps_is_that_of_their_weights(
    tiny_model: TinyModel, tiny_batch: TinyBatch
) -> None:
    result = prune(tiny_model(), [tiny_batch()], None, Settings(sparsity=0.8))
    assert result.sparsity is not None
    weights = [weight_of(result.model.get_submodule(one.path)) for one in result.sparsity]
    assert density(result.sparsity) == pytest.approx(0.2, abs=0.01)
    assert [int(weight.count_nonzero()) for weight in weights] == [
        one.num_nonzeros for one in result.sparsity
    ]
