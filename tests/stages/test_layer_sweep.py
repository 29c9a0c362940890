"""Gradients layer by layer are those of the whole model, for every family; no file stays behind.

Without these tests a large model could be pruned by other statistics than a small one, run out of
memory, or leave its hidden states on the disk.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rfprune.errors import UserError
from rfprune.methods.problem import add_token_mask
from rfprune.model.compact import compact
from rfprune.model.frozen import frozen
from rfprune.model.layout import layout_of
from rfprune.stages import tensor_store
from rfprune.stages.calibration import Calibration
from rfprune.stages.curvature import collect_curvature
from rfprune.stages.fisher import collect_gradients
from rfprune.stages.importance import collect_gradient_norms
from rfprune.stages.objective import Loss
from tests.model.emptied import emptied
from tests.model.test_contract import CASES
from tests.model.test_residency import layers_on_disk

Tiny = Callable[..., Any]
WHOLE, SWEPT = 2**50, 1
"""Memory limits at which a tiny model runs as a whole, and layer by layer with all states on disk
and every batch a chunk."""


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def calibration_of(tiny_model: Tiny, tiny_batch: Tiny) -> Callable[..., Calibration]:
    """`calibration_of(model_type, head, padding="right", num_batches=3, **config)`."""

    def make(
        model_type: str = "bert",
        head: str = "sequence-classification",
        padding: str = "right",
        num_batches: int = 3,
        **config: Any,
    ) -> Calibration:
        config.setdefault("num_labels", 2 if head == "question-answering" else 3)
        model = tiny_model(model_type, head, num_hidden_layers=3, **config)
        layout = layout_of(model)
        batches = []
        for seed in range(num_batches):
            batch = tiny_batch(3 + seed, padding=padding, seed=seed, model_type=model_type)
            if head == "seq2seq-lm" and "input_ids" in batch:  # spectrograms have decoder inputs
                batch["decoder_input_ids"] = batch["input_ids"]
            batches.append(add_token_mask(model, layout, batch))
        return Calibration(model, layout, batches)

    return make


def moments(calibration: Calibration) -> list[Tensor]:
    """All sums of all blocks."""
    with frozen(calibration.model):
        collected = [factors for _, factors in sorted(collect_curvature(calibration))]
    assert {each.examples for each in collected} == {
        sum(len(next(iter(batch.values()))) for batch in calibration.batches)
    }
    return [
        tensor
        for each in collected
        for tensor in (each.input_moment, each.input_sum, each.gradient_moment)
    ]


def assert_all_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for left, right in zip(found, expected, strict=True):
        assert right.abs().max() > 0
        assert torch.equal(left, right)


@pytest.mark.parametrize(("model_type", "head"), CASES)
def test_a_sweep_is_the_whole_model(
    model_type: str, head: str, calibration_of: Tiny, scratch: Path
) -> None:
    whole = replace(calibration_of(model_type, head), max_bytes=WHOLE)
    swept = replace(whole, max_bytes=SWEPT)
    assert_all_equal(moments(swept), moments(whole))
    other = replace(whole, batches=whole.batches[:2])
    assert not torch.equal(moments(other)[-1], moments(whole)[-1])
    with frozen(whole.model):
        order = [number for number, _ in collect_curvature(swept)]
    layers = [whole.layout.blocks[number].layer for number in order]
    assert layers == sorted(layers, reverse=True)
    assert len(set(layers)) >= 3
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("model_type", ["llama", "bart"])
def test_layers_without_blocks(model_type: str, calibration_of: Tiny, scratch: Path) -> None:
    """As an earlier round may leave them: the first of each stack, and one in the middle."""
    original = calibration_of(model_type)
    gone = {block.name for block in original.layout.blocks if block.layer in (0, 1, 3)}
    small = compact(original.model, original.layout, emptied(original.layout, *gone))
    whole = replace(original, model=small, layout=layout_of(small), max_bytes=WHOLE)
    assert 0 < len(whole.layout.blocks) < len(original.layout.blocks)
    assert_all_equal(moments(replace(whole, max_bytes=SWEPT)), moments(whole))


@pytest.mark.parametrize("padding", ["left", "none"])
@pytest.mark.parametrize("head", ["sequence-classification", "question-answering", "none"])
def test_other_statistics_and_paddings(
    head: str, padding: str, calibration_of: Tiny, scratch: Path
) -> None:
    whole = replace(calibration_of("bert", head, padding), max_bytes=WHOLE)
    swept = replace(whole, max_bytes=SWEPT)
    for collect in (
        collect_gradients,
        lambda one: collect_gradients(one, per_batch=True),
        collect_gradient_norms,
    ):
        with frozen(whole.model):
            assert_all_equal(collect(swept), collect(whole))


def test_kept_states_may_be_in_memory(calibration_of: Tiny, monkeypatch: Any) -> None:
    whole = replace(calibration_of("t5"), max_bytes=WHOLE)
    monkeypatch.setattr("rfprune.stages.collection.autograd_bytes", lambda _: 2 * WHOLE)
    monkeypatch.setattr(tensor_store, "scratch_file", lambda: 1 / 0)
    expected = moments(replace(whole, max_bytes=2 * WHOLE + WHOLE))
    assert_all_equal(moments(whole), expected)


def test_factors_of_one_layer_are_in_memory(calibration_of: Tiny, scratch: Path) -> None:
    swept = replace(calibration_of("llama", "causal-lm"), max_bytes=SWEPT)
    earlier: list[weakref.ref[Tensor]] = []
    alive = 0
    with frozen(swept.model):
        for _, factors in collect_curvature(swept):
            alive = max(alive, sum(one() is not None for one in earlier))
            earlier.append(weakref.ref(factors.input_moment))
            del factors
    assert len(earlier) == 6
    assert alive == 0


def reading_lower_layers(outputs: Any, _: Any) -> Tensor:
    total: Tensor = outputs.logits.sum(1) + outputs.hidden_states[1].square().sum((1, 2))
    return total


def reading_attentions(outputs: Any, _: Any) -> Tensor:
    total: Tensor = outputs.logits.sum(1) + outputs.attentions[2].square().sum((1, 2, 3))
    return total


@pytest.mark.parametrize("loss", [reading_lower_layers, reading_attentions])
def test_a_loss_on_lower_layers_runs_the_whole_model(loss: Loss, calibration_of: Tiny) -> None:
    whole = replace(calibration_of("bert"), max_bytes=WHOLE, objective=loss)
    whole.model.set_attn_implementation("eager")
    whole.model.config.output_hidden_states = whole.model.config.output_attentions = True
    assert_all_equal(moments(replace(whole, max_bytes=SWEPT)), moments(whole))
    plain = replace(whole, objective=lambda outputs, _: outputs.logits.sum(1))
    assert not torch.equal(moments(plain)[2], moments(whole)[2])


@pytest.mark.parametrize("max_bytes", [WHOLE, SWEPT])
def test_a_layer_that_is_not_finite_is_named(
    max_bytes: int, calibration_of: Tiny, scratch: Path
) -> None:
    swept = replace(calibration_of("bert"), max_bytes=max_bytes)
    with torch.no_grad():
        swept.model.bert.encoder.layer[1].attention.output.dense.bias[0] = torch.nan
    with pytest.raises(UserError, match=r"hidden states after layer\.1 are not finite"):
        moments(swept)
    assert list(scratch.iterdir()) == []


def test_a_gradient_that_is_not_finite_is_named(calibration_of: Tiny, scratch: Path) -> None:
    """The layer where it arises, although those below it have no finite gradients either."""
    swept = replace(calibration_of("bert"), max_bytes=SWEPT)

    def overflow(_: Any, __: Any, output: Tensor) -> Tensor:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.inf)
        return output

    consumer = swept.model.get_submodule(swept.layout.blocks[3].consumer)
    handle = consumer.register_forward_hook(overflow)
    with pytest.raises(UserError, match=r"gradients of layer\.1\.\w+ are not finite"):
        moments(swept)
    handle.remove()


def test_two_runs_with_one_folder_for_scratch_files(calibration_of: Tiny, scratch: Path) -> None:
    calibrations = [
        replace(calibration_of("bert", seed=seed), max_bytes=SWEPT) for seed in range(2)
    ]
    alone = [moments(one) for one in calibrations]
    together: list[dict[int, Tensor]] = [{}, {}]
    with frozen(calibrations[0].model), frozen(calibrations[1].model):
        for pair in zip(*map(collect_curvature, calibrations), strict=True):
            for found, (number, factors) in zip(together, pair, strict=True):
                found[number] = factors.gradient_moment
    for found, expected in zip(together, alone, strict=True):
        assert_all_equal([found[number] for number in sorted(found)], expected[2::3])
    assert not torch.equal(alone[0][2], alone[1][2])
    assert list(scratch.iterdir()) == []


class FullDisk:
    """A file on a disk with space for a few bytes."""

    def __init__(self, file: Any, space: int) -> None:
        self.file, self.space = file, space

    def write(self, content: Any) -> int:
        self.space -= len(content)
        if self.space < 0:
            raise OSError(28, "No space left on device")
        return int(self.file.write(content[: max(1, len(content) // 2)]))  # as a disk may do

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_disk_that_becomes_full(
    calibration_of: Tiny, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept = replace(calibration_of("bert"), max_bytes=SWEPT)
    original, files = tensor_store.scratch_file, []

    def scratch_file(space: int) -> FullDisk:
        files.append(FullDisk(original(), space))
        return files[-1]

    monkeypatch.setattr(tensor_store, "scratch_file", lambda: scratch_file(2**40))
    expected = moments(replace(swept, max_bytes=WHOLE))
    assert_all_equal(moments(swept), expected)
    monkeypatch.setattr(tensor_store, "scratch_file", lambda: scratch_file(30000))
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\).*TMPDIR"):
        moments(swept)
    assert all(one.file.closed for one in files)
    assert all(not module._forward_hooks for module in swept.model.modules())
    assert list(scratch.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_any_work(
    calibration_of: Tiny, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept = replace(calibration_of("bert"), max_bytes=SWEPT)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 10}))
    monkeypatch.setattr("rfprune.stages.layer_sweep.run_layer", lambda *_: 1 / 0)
    with pytest.raises(UserError, match=r"scratch space, but '.*' has 0\.0 GB.*TMPDIR"):
        moments(swept)


def test_no_folder_for_scratch_files(calibration_of: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", missing)
    with pytest.raises(UserError, match=r"no folder for temporary files.*TMPDIR"):
        moments(replace(calibration_of("bert"), max_bytes=SWEPT))


def test_tensors_come_back(scratch: Path) -> None:
    with tensor_store.TensorStore(max_bytes_in_memory=100) as store:
        values = [
            torch.arange(20.0),
            torch.randn(7, 3, dtype=torch.bfloat16),
            torch.zeros(0, 4),
            torch.tensor([[True, False]]),
            torch.arange(6).view(2, 3).T,
        ]
        kept = [store.keep(value) for value in values]
        assert 0 < store.bytes_in_memory <= 100
        on_disk = store.bytes_on_disk
        assert on_disk > 0
        assert all(torch.equal(store.load(one), v) for one, v in zip(kept, values, strict=True))
        for one, value in zip(kept, values, strict=True):
            store.replace(one, value.clone().fill_(1))
            assert torch.equal(store.load(one), torch.ones_like(value))
            store.release(one)
        again = [store.keep(value) for value in values]
        assert store.bytes_on_disk == on_disk, "freed places are used again"
        assert all(torch.equal(store.load(one), v) for one, v in zip(again, values, strict=True))
    assert list(scratch.iterdir()) == []


def test_the_weights_of_one_layer_are_in_memory(
    tiny_model: Tiny, tiny_batch: Tiny, tmp_path: Path
) -> None:
    """Of a model that is offloaded to disk; it is swept whatever memory there is."""
    model = tiny_model("llama", "causal-lm", num_hidden_layers=4)
    offloaded = layers_on_disk(model, tmp_path).eval()
    whole = Calibration(model, layout_of(model), [tiny_batch()], max_bytes=WHOLE)
    swept = replace(whole, model=offloaded, layout=layout_of(offloaded))
    assert_all_equal(moments(swept), moments(whole))
    loaded = []  # kept alive, so that no two have the same id
    seen = []

    def note(layer: int) -> Callable[..., None]:
        def hook(module: Any, *_: Any) -> None:
            present = [
                number
                for number, path in enumerate(swept.layout.layers)
                if not any(each.is_meta for each in offloaded.get_submodule(path).parameters())
            ]
            assert present == [layer]
            seen.append(layer)
            loaded.append(next(module.parameters()))

        return hook

    for layer, path in enumerate(swept.layout.layers):
        offloaded.get_submodule(path).mlp.down_proj.register_forward_hook(note(layer))
    moments(swept)
    assert seen == [0, 1, 2, 3, 3, 2, 1, 0]
    assert len(set(map(id, loaded))) == len(seen)
