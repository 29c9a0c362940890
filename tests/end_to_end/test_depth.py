"""prune() with whole layers: plain models within the budget, and what is recorded about them.

Deleting this lets `--depth` exceed the budget, keep the norms of a layer that went, or write a
folder whose masks, report or configuration tell of other layers than the model has.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rfprune.cost.constraint import Constraint
from rfprune.errors import UserError
from rfprune.main import main
from rfprune.methods.budget import cost_model, min_ratio
from rfprune.methods.problem import prepare_problem
from rfprune.model.checkpoint import load_masks, load_pruned
from rfprune.model.layout import layout_of
from rfprune.model.masks import num_kept
from rfprune.pruning import prune, prune_family
from rfprune.settings import METHODS, Settings

Tiny = Callable[..., Any]
Batch = dict[str, Tensor]
FAMILIES = ("bert", "llama", "bart", "t5", "beit")


def batches_of(tiny_batch: Tiny, model_type: str = "bert") -> list[Batch]:
    return [tiny_batch(8, 9, seed=seed, model_type=model_type) for seed in range(3)]


def logits_of(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    return found


@pytest.mark.parametrize("model_type", FAMILIES)
def test_whole_layers_leave_a_plain_model_that_anything_loads_and_that_is_pruned_again(
    model_type: str, tiny_model: Tiny, tiny_batch: Tiny, tmp_path: Path
) -> None:
    model, batches = tiny_model(model_type, num_hidden_layers=4), batches_of(tiny_batch, model_type)
    result = prune(model, batches, Constraint("mac", 0.8), Settings(depth="layers"))
    layers = result.layout.layers
    assert type(result.model) is type(model)
    assert result.removed_layers
    assert len(layout_of(result.model).layers) == len(layers) - len(result.removed_layers)
    full = [block.num_units for block in layout_of(model).blocks]
    expected = [
        0 if block.layer in result.removed_layers else units
        for block, units in zip(result.layout.blocks, full, strict=True)
    ]
    assert list(num_kept(result.masks)) == expected
    assert result.achieved["mac"] <= 0.8
    result.save(tmp_path / "small")
    assert not list((tmp_path / "small").glob("*.py"))
    assert (
        not {"rfprune", "auto_map"}
        & json.loads((tmp_path / "small/config.json").read_text()).keys()
    )
    exact = logits_of(result.model, batches[0])
    assert torch.equal(logits_of(load_pruned(tmp_path / "small"), batches[0]), exact)
    again = type(model).from_pretrained(tmp_path / "small")
    assert torch.equal(logits_of(again, batches[0]), exact)
    found = load_masks(tmp_path / "small")
    assert list(found) == sorted(block.name for block in result.layout.blocks)
    second = prune(again, batches, Constraint("mac", 0.7), Settings(depth="1", tune=False))
    assert second.achieved["mac"] <= 0.7
    second.save(tmp_path / "smaller")
    expected_again = logits_of(second.model, batches[0])
    torch.testing.assert_close(
        logits_of(load_pruned(tmp_path / "smaller"), batches[0]), expected_again
    )


@pytest.mark.parametrize("depth", ["layers", "joint", "1"])
@pytest.mark.parametrize("metric", ["mac", "params", "memory"])
def test_what_is_predicted_is_what_the_model_costs(
    metric: str, depth: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    """Norms and biases of a removed layer go too, and the budget counts them."""
    model, batches = tiny_model("bert", num_hidden_layers=4), batches_of(tiny_batch)
    settings = Settings(depth=depth, tune=False, round_to=1)
    problem = prepare_problem(model, batches, settings)
    smallest = min_ratio(problem, metric)
    ratio = max(0.8, smallest)
    result = prune(model, batches, Constraint(metric, ratio), settings)
    costs = cost_model(problem, metric)
    predicted = costs.total(num_kept(result.masks), result.removed_layers) / costs.original
    assert result.achieved[metric] == pytest.approx(predicted, rel=1e-9)
    assert result.achieved[metric] <= ratio
    assert result.removed_layers or depth == "joint"
    assert type(result.model) is type(model) or depth != "layers"


@pytest.mark.parametrize("depth", ["layers", "joint", "1"])
def test_heads_that_are_one_unit_go_with_their_layer(
    depth: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    """Widths leave the attentions of OLMo 2 whole, so only whole layers meet this constraint."""
    model, batches = tiny_model("olmo2", num_hidden_layers=4), batches_of(tiny_batch)
    result = prune(model, batches, Constraint("mac", 0.7), Settings(depth=depth, tune=False))
    assert result.removed_layers
    assert result.achieved["mac"] <= 0.7
    heads = {layer["heads"] for layer in result.layers}
    assert heads == {0, 1}


def test_layers_and_sizes_together_stay_plain(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    model, batches = tiny_model("llama", num_hidden_layers=4), batches_of(tiny_batch)
    settings = Settings(depth="1", uniform=True, round_to=1, tune=False)
    result = prune(model, batches, Constraint("mac", 0.6), settings)
    assert type(result.model) is type(model)
    config = result.model.config
    assert config.num_hidden_layers == 3
    assert (config.num_key_value_heads, config.intermediate_size) != (4, 12)
    assert result.achieved["mac"] <= 0.6
    both = prune(model, batches, 0.6, Settings(depth="layers", uniform=True, tune=False))
    assert type(both.model) is type(model)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_fits_a_model_without_layers(
    method: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model, batches = tiny_model("gpt2", num_hidden_layers=4), batches_of(tiny_batch)
    selected, fitted = (
        prune(model, batches, 0.75, Settings(method=method, depth="layers", tune=tune))
        for tune in (False, True)
    )
    assert len(selected.removed_layers) == 1
    assert type(fitted.model) is type(model)
    changed = logits_of(fitted.model, batches[0])
    assert torch.isfinite(changed).all()
    if selected.removed_layers == fitted.removed_layers:
        assert not torch.allclose(changed, logits_of(selected.model, batches[0]), atol=1e-3)


def test_a_t5_that_writes_keeps_as_many_layers_in_its_encoder(
    tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    """transformers counts the layers of its cache by the encoder's."""
    model = tiny_model("t5", "seq2seq-lm", num_hidden_layers=4)
    batches = [
        batch | {"decoder_input_ids": batch["input_ids"]} for batch in batches_of(tiny_batch, "t5")
    ]
    with torch.no_grad():  # layers that do nothing, so their removal would be free
        for block in layout_of(model).blocks:
            if block.layer in (1, 2, 3):
                model.get_submodule(block.consumer).weight.zero_()
    result = prune(model, batches, 0.92, Settings(depth="layers", tune=False))
    assert set(result.removed_layers) & {5, 6, 7}
    entries = result.model.config
    assert entries.num_layers >= entries.num_decoder_layers
    result.model.generate(batches[0]["input_ids"], max_new_tokens=3, do_sample=False)
    protected = Settings(depth="1", protect=("layer.4-7",), tune=False)
    with pytest.raises(UserError, match="no layer that can be removed"):
        prune(model, batches, 0.92, protected)


def test_several_constraints_share_the_comparison_of_layers(
    tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model, batches = tiny_model("llama", num_hidden_layers=6), batches_of(tiny_batch)
    settings = Settings(depth="layers", tune=False)
    together = list(prune_family(model, batches, [0.84, 0.5], settings))
    alone = [prune(model, batches, ratio, settings) for ratio in (0.84, 0.5)]
    for one, other in zip(together, alone, strict=True):
        assert one.removed_layers == other.removed_layers
        assert torch.equal(logits_of(one.model, batches[0]), logits_of(other.model, batches[0]))
    assert [len(one.removed_layers) for one in together] == [1, 3]


REFUSED: dict[str, tuple[dict[str, Any], float, str]] = {
    "all layers": (
        {"depth": "3"},
        0.5,
        "--depth 3 .* has 3 layers, and one layer must stay.*at most 2",
    ),
    "more layers than there are": ({"depth": 9}, 0.5, "--depth 9 .*choose at most 2"),
    "protected layers": ({"depth": 2, "protect": ("layer.1-2",)}, 0.5, "choose at most 1"),
    "floors": ({"depth": 1, "min_heads": 2}, 0.5, "keep layers with --protect"),
    "less than a layer": ({"depth": "layers"}, 0.2, "--depth layers.*costs 0.33.*--depth joint"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_layers_cannot_do_is_refused_before_anything_is_collected(
    name: str, tiny_model: Tiny, tiny_batch: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rfprune.pruning

    monkeypatch.setattr(rfprune.pruning, "collect_statistics", None)
    settings, ratio, says = REFUSED[name]
    model = tiny_model(num_hidden_layers=3)
    with pytest.raises(UserError, match=says) as raised:
        prune(model, [tiny_batch()], ratio, Settings(**settings))
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="one must stay"):
        prune(tiny_model(num_hidden_layers=1), [tiny_batch()], 0.5, Settings(depth="joint"))


def test_the_command_writes_a_plain_folder_that_names_the_layers(
    tiny_folder: Tiny, tiny_data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tiny_folder(num_hidden_layers=4), tmp_path / "out"
    flags = f"--model {folder} --task sst2 --data-dir {tiny_data_dir} --constraint 0.8 --depth"
    flags += f" --output-dir {output} --no-cache --batch-size 4 --device cpu --score-stages"
    assert main(flags.split()) == 0
    printed = capsys.readouterr().out
    report = json.loads((output / "report.json").read_text())
    (removed,) = report["removed_layers"]
    assert report["plain"] is True
    assert report["settings"]["depth"] == "layers"
    assert report["layers"][removed] == {"heads": 0, "neurons": 0}
    sentence = f"ayers removed: {removed} (of 4)"
    assert sentence in printed
    for name in ("README.md", "report.html", "log.txt"):
        assert sentence in (output / name).read_text(), name
    assert "trust_remote_code" not in (output / "report.html").read_text()
    code = (
        "import sys; from transformers import AutoModelForSequenceClassification as A; "
        f"m = A.from_pretrained({str(output)!r}); assert m.config.num_hidden_layers == 3; "
        "assert not any(n.startswith('rfprune') for n in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
