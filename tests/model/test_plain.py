"""Plain models load with the stock class and compute what the pruned model computes.

Without these tests `--uniform` could write folders that need our code, or another model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rfprune.errors import UserError
from rfprune.families.architectures import ARCHITECTURES
from rfprune.model.checkpoint import load_masks, load_pruned, save_pruned
from rfprune.model.compact import compact
from rfprune.model.layout import Layout, layout_of
from rfprune.model.masks import masked
from rfprune.model.plain import plain_sizes, to_plain
from tests.conftest import ALL_TYPES, ENCODER_DECODER_TYPES, predictions

Tiny = Callable[..., Any]

SIZE_ENTRIES = {
    model_type: row.size_entries for model_type, row in ARCHITECTURES.items() if row.size_entries
}
FAMILIES = [model_type for model_type in ALL_TYPES if model_type in SIZE_ENTRIES]


def masks_of(layout: Layout, heads: int | None, neurons: int) -> tuple[Tensor, ...]:
    """Keep the last units of every block, scaled; None: all heads."""
    masks = []
    for block in layout.blocks:
        kept = heads if block.kind == "head" else neurons
        mask = torch.zeros(block.num_units)
        mask[-(kept or block.num_units) :] = 1.25
        masks.append(mask)
    return tuple(masks)


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = predictions(model(**batch))
    return found


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_plain_model_is_the_pruned_one_without_our_code(
    model_type: str, tiny_model: Tiny, tiny_batch: Tiny, tmp_path: Path
) -> None:
    model, batch = tiny_model(model_type), tiny_batch(model_type=model_type)
    layout = layout_of(model)
    masks = masks_of(layout, 2 if SIZE_ENTRIES[model_type].heads else None, 5)
    pruned = compact(model, layout, masks)
    plain = to_plain(pruned)
    expected = logits(pruned, batch)
    assert not torch.allclose(expected, logits(model, batch), atol=1e-2), "pruning matters"
    with masked(model, layout, masks):
        torch.testing.assert_close(expected, logits(model, batch), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(plain, batch), expected)
    assert type(plain) is type(model)
    assert not hasattr(plain.config, "rfprune")
    assert hasattr(pruned.config, "rfprune"), "what was given stays as it is"
    save_pruned(plain, layout, masks, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not {"rfprune", "auto_map"} & config.keys()
    assert not list(tmp_path.glob("*.py"))
    assert config[SIZE_ENTRIES[model_type].neurons] == 5
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again, batch), expected)
    loaded = load_pruned(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded, batch), expected)
    found = load_masks(tmp_path)
    assert all(torch.equal(found[b.name], m) for b, m in zip(layout.blocks, masks, strict=True))


def test_modes_and_gradient_flags_are_those_of_the_pruned_model(tiny_model: Tiny) -> None:
    model = tiny_model().train()
    model.classifier.requires_grad_(False)
    layout = layout_of(model)
    plain = to_plain(compact(model, layout, masks_of(layout, None, 3)))
    assert plain.training
    assert not plain.classifier.weight.requires_grad
    assert plain.bert.encoder.layer[0].output.dense.weight.requires_grad


@pytest.mark.parametrize(("model_type", "groups"), [("llama", (1, 2, 4)), ("qwen2", (1, 2, 3, 4))])
def test_groups_of_heads_are_removed_where_the_configuration_has_their_width(
    model_type: str, groups: tuple[int, ...], tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    """A configuration may check its sizes: LLaMA's heads must divide the hidden size."""
    model, batch = tiny_model(model_type), tiny_batch()
    layout = layout_of(model)
    assert plain_sizes(model, layout)["head"] == groups
    plain = to_plain(compact(model, layout, masks_of(layout, 2, 5)))
    entries = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    assert [getattr(plain.config, name) for name in entries] == [4, 2, 4, 5]
    layout = layout_of(plain)
    smaller = compact(plain, layout, masks_of(layout, 1, 3))
    with masked(plain, layout, masks_of(layout, 1, 3)):
        torch.testing.assert_close(
            logits(smaller, batch), logits(plain, batch), rtol=1e-4, atol=1e-5
        )
    assert to_plain(smaller).config.num_attention_heads == 2


def test_sizes_that_the_configuration_cannot_express_are_refused(tiny_model: Tiny) -> None:
    model = tiny_model()
    layout = layout_of(model)
    assert plain_sizes(model, layout) == {"head": (4,), "neuron": tuple(range(1, 13))}
    fewer_heads = compact(model, layout, masks_of(layout, 2, 12))
    with pytest.raises(UserError, match=r"have \[2\] heads.* can only express 4 in all.*--uniform"):
        to_plain(fewer_heads)
    uneven = list(masks_of(layout, None, 6))
    uneven[1] = torch.ones(12)
    with pytest.raises(UserError, match=r"\[4\] heads and \[6, 12\] neurons"):
        to_plain(compact(model, layout, uneven))
    assert plain_sizes(compact(model, layout, uneven), layout)["neuron"][-1] == 12
    uneven[1] = torch.zeros(12)
    without = compact(model, layout, uneven)
    with pytest.raises(UserError, match="layers without neurons"):
        plain_sizes(without, layout_of(without))


def test_a_family_without_size_entries_is_refused_by_name(tiny_model: Tiny) -> None:
    model = tiny_model("dinov2")
    with pytest.raises(UserError, match=r"dinov2 model has no .*neurons.*--uniform.*leave it out"):
        plain_sizes(model, layout_of(model))


def test_every_supported_family_has_size_entries_or_a_reason() -> None:
    without = {"dinov2", "dinov2_with_registers", *ENCODER_DECODER_TYPES} - {"t5", "mt5"}
    assert set(ARCHITECTURES) - set(SIZE_ENTRIES) <= without | {"siglip_vision_model"}, (
        "neurons are a ratio of the width, or two numbers, or that of the pooler as well"
    )


def test_masks_of_another_model_are_noticed(tiny_model: Tiny, tmp_path: Path) -> None:
    model = tiny_model()
    layout = layout_of(model)
    masks = masks_of(layout, None, 5)
    save_pruned(to_plain(compact(model, layout, masks)), layout, masks, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 6}))
    with pytest.raises(UserError, match="keeps 5 where config.json has 6"):
        load_masks(tmp_path)
    with pytest.raises(UserError, match="not of the same model"):
        load_pruned(tmp_path)


def test_only_a_refusal_by_the_configuration_makes_a_number_of_heads_invalid(
    tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", hidden_size=24, num_attention_heads=6, num_key_value_heads=6)
    layout = layout_of(model)
    assert plain_sizes(model, layout)["head"] == (1, 2, 3, 4, 6), "LLaMA wants a divisor of 24"

    def broken(_: Any) -> Any:
        raise KeyError("a defect")

    monkeypatch.setattr(type(model.config), "from_dict", broken)
    with pytest.raises(KeyError, match="a defect"):
        plain_sizes(model, layout)
