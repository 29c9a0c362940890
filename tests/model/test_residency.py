"""Models that accelerate has offloaded to the CPU or to disk.

Deleting this lets a weight be read where it is not, a change of a student be lost, or a model that
does not fit its memory stay there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import PreTrainedModel

from rfprune import Constraint, PruneResult, Settings, load_pruned, prune
from rfprune.cache import model_digest
from rfprune.cost.memory import total_bytes
from rfprune.cost.params import total_params
from rfprune.model.residency import execution_device, is_offloaded, resident, stored_tensors

Tiny = Callable[..., Any]

HALF = Constraint("mac", 0.5)


def on_disk(model: PreTrainedModel, folder: Path, where: dict[str, str]) -> PreTrainedModel:
    """A model whose weights are loaded from files when they are needed."""
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    offloaded: PreTrainedModel = type(model).from_pretrained(
        folder, device_map=where, offload_folder=folder / "offload"
    )
    return offloaded.eval()


def layers_on_disk(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A model whose layers alone are on disk."""
    others = [name for name, _ in model.model.named_children() if name != "layers"]
    where = {"model.layers": "disk", "lm_head": "cpu"} | {f"model.{name}": "cpu" for name in others}
    return on_disk(model, folder, where)


def all_on_disk(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A model that is on disk with its embeddings and its head."""
    return on_disk(model, folder, {"": "disk"})


def on_cpu(model: PreTrainedModel, _: Path) -> PreTrainedModel:
    """A model whose weights accelerate keeps outside of it, on the CPU."""
    offloaded: PreTrainedModel = cpu_offload(model, execution_device=torch.device("cpu"))
    return offloaded


PLACES = [layers_on_disk, all_on_disk, on_cpu]


@pytest.fixture
def llama(tiny_model: Tiny) -> Callable[[], PreTrainedModel]:
    name = ["LlamaForCausalLM"]
    return lambda: tiny_model("llama", "causal-lm", tie_word_embeddings=True, architectures=name)


def same(result: PruneResult, expected: PruneResult) -> None:
    """Check that two results have the same masks, costs, sizes and weights."""
    assert result.layers == expected.layers
    assert result.achieved == expected.achieved
    for mask, other in zip(result.masks, expected.masks, strict=True):
        assert torch.equal(mask, other)
    weights = dict(stored_tensors(expected.model))
    for name, weight in stored_tensors(result.model):
        assert torch.equal(weight, weights.pop(name)), name
    assert not weights


def trainable(model: PreTrainedModel) -> dict[str, bool]:
    """Whether each weight takes a gradient, by name."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: weight.requires_grad for name, weight in named}


@pytest.mark.parametrize("offload", PLACES)
def test_an_offloaded_model_is_counted_read_and_hashed_as_in_memory(
    offload: Callable[[PreTrainedModel, Path], PreTrainedModel],
    llama: Callable[[], PreTrainedModel],
    tmp_path: Path,
) -> None:
    model = llama()
    offloaded = offload(llama(), tmp_path)
    assert is_offloaded(offloaded)
    assert not is_offloaded(model)
    assert execution_device(offloaded) == torch.device("cpu")
    assert total_params(offloaded) == total_params(model)
    assert total_bytes(offloaded) == total_bytes(model)
    assert model_digest(offloaded) == model_digest(model)
    for name, tensor in stored_tensors(offloaded):
        assert torch.equal(tensor, model.state_dict()[name])


@pytest.mark.parametrize("offload", PLACES)
def test_weights_are_resident_within_and_only_within(
    offload: Callable[[PreTrainedModel, Path], PreTrainedModel],
    llama: Callable[[], PreTrainedModel],
    tmp_path: Path,
) -> None:
    model, ids = llama(), torch.arange(5)[None]
    offloaded = offload(llama(), tmp_path)
    layer = offloaded.model.layers[0]
    with resident(layer), resident(layer.mlp):
        assert not any(weight.is_meta for weight in layer.parameters())
        weight = layer.mlp.down_proj.weight
        assert torch.equal(offloaded(input_ids=ids).logits, model(input_ids=ids).logits)
        assert layer.mlp.down_proj.weight is weight, "a call within loads nothing"
        assert all(weight.is_meta for weight in offloaded.model.layers[1].parameters())
    assert all(weight.is_meta for weight in layer.parameters())
    assert torch.equal(offloaded(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("offload", "settings"),
    [
        (layers_on_disk, Settings()),
        (all_on_disk, Settings(rounds=2)),
        (on_cpu, Settings(uniform=True)),
        (layers_on_disk, Settings(method="kwon")),
        (all_on_disk, Settings(method="importance", importance="magnitude-l1", tune=False)),
        (layers_on_disk, Settings(sparsity="0.5", sparsity_criterion="wanda")),
    ],
    ids=["curvature", "rounds", "uniform", "kwon", "magnitude", "sparsity"],
)
def test_pruning_is_the_same_as_in_memory(
    offload: Callable[[PreTrainedModel, Path], PreTrainedModel],
    settings: Settings,
    llama: Callable[[], PreTrainedModel],
    tiny_batch: Tiny,
    tmp_path: Path,
) -> None:
    batches = [tiny_batch(seed=seed) for seed in range(9)]
    expected = prune(llama(), batches, HALF, settings)
    offloaded = offload(llama(), tmp_path)
    flags, digest = trainable(offloaded), model_digest(offloaded)
    result = prune(offloaded, batches, HALF, settings)
    assert is_offloaded(result.model)
    assert all(weight.is_meta for weight in result.model.model.layers.parameters())
    same(result, expected)
    assert trainable(offloaded) == flags
    assert model_digest(offloaded) == digest
    logits = expected.model(**batches[0]).logits
    assert torch.equal(result.model(**batches[0]).logits, logits)
    for dtype in (None, torch.float16):
        expected.save(tmp_path / "expected", dtype=dtype, overwrite=True)
        result.save(tmp_path / "smaller", dtype=dtype, overwrite=True)
        weights = load_pruned(tmp_path / "expected").state_dict()
        for name, weight in load_pruned(tmp_path / "smaller").state_dict().items():
            assert torch.equal(weight, weights[name])
        config = (tmp_path / "expected" / "config.json").read_bytes()
        assert (tmp_path / "smaller" / "config.json").read_bytes() == config


def test_norms_of_outputs_need_no_whole_model(
    tiny_model: Tiny, tiny_batch: Tiny, tmp_path: Path
) -> None:
    """The errors without an attention are measured layer by layer."""
    batches = [tiny_batch(seed=seed) for seed in range(9)]
    expected = prune(tiny_model("gemma3_text", head="causal-lm"), batches, HALF)
    offloaded = layers_on_disk(tiny_model("gemma3_text", head="causal-lm"), tmp_path)
    result = prune(offloaded, batches, HALF)
    assert is_offloaded(result.model)
    same(result, expected)


@pytest.mark.parametrize(
    ("model_type", "head", "uniform"),
    [
        ("bert", "sequence-classification", False),
        ("albert", "sequence-classification", False),
        ("t5", "seq2seq-lm", False),
        ("t5", "seq2seq-lm", True),
        ("beit", "sequence-classification", False),
        ("gpt2", "causal-lm", False),
    ],
)
def test_families_that_differ(
    model_type: str,
    head: str,
    uniform: bool,
    tiny_model: Tiny,
    tiny_batch: Tiny,
    tmp_path: Path,
) -> None:
    """Norms after the sublayers, shared layers, two stacks, parameters of a layer itself, weights
    that are stored transposed."""
    batches = [tiny_batch(seed=seed, model_type=model_type) for seed in range(9)]
    if model_type == "t5":
        batches = [batch | {"labels": batch["input_ids"]} for batch in batches]
    settings, constraint = Settings(uniform=uniform), Constraint("mac", 0.95 if uniform else 0.5)
    expected = prune(tiny_model(model_type, head), batches, constraint, settings)
    offloaded = cpu_offload(tiny_model(model_type, head), execution_device=torch.device("cpu"))
    result = prune(offloaded, batches, constraint, settings)
    same(result, expected)
    result.save(tmp_path / "smaller")
    weights = dict(stored_tensors(expected.model))
    for name, weight in load_pruned(tmp_path / "smaller").state_dict().items():
        assert torch.equal(weight, weights[name])
