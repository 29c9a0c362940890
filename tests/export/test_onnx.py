"""An ONNX file computes what the pruned model computes, at any batch size and length.

Without these tests a size could become a constant of the file, or a quantised file overflow on
older processors.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rfprune.errors import UserError
from rfprune.export.contract import max_difference, varied_inputs
from rfprune.export.onnx import OnnxModel, export_onnx, quantize_onnx
from rfprune.model.compact import compact
from rfprune.model.layout import layout_of
from rfprune.model.masks import full_masks
from tests.conftest import MODEL_TYPES

Tiny = Callable[..., Any]


def pruned_model(model: Any) -> Any:
    layout = layout_of(model)
    masks = full_masks(layout)
    masks[0][1], masks[1][:5], masks[2][:] = 0, 0, 0
    return compact(model, layout, masks)


def assert_openvino_computes_the_same(path: Path, plain: Any, batches: list[Any]) -> None:
    """It reads the ONNX file; nothing is checked without the extra rfprune[openvino]."""
    if importlib.util.find_spec("openvino") is None:
        return
    from rfprune.export.openvino import OpenvinoModel, convert_onnx

    convert_onnx(path, path.with_suffix(".xml"))
    difference, largest = max_difference(plain, OpenvinoModel(path.with_suffix(".xml")), batches)
    assert difference < 1e-5 * max(1.0, largest)


@pytest.mark.parametrize(
    ("model_type", "head"),
    [
        *((model_type, "sequence-classification") for model_type in MODEL_TYPES),
        ("bert", "question-answering"),
        ("mpnet", "question-answering"),
        ("modernbert", "sequence-classification"),
        ("gpt2", "sequence-classification"),
        ("llama", "sequence-classification"),
        ("bart", "question-answering"),
        ("t5", "question-answering"),
        ("mpnet", "none"),
        ("deberta-v2", "none"),
    ],
)
def test_every_family_runs_at_any_batch_size_and_length(
    model_type: str, head: str, tiny_model: Tiny, tiny_batch: Tiny, tmp_path: Path
) -> None:
    """Exported from a batch of one, which must not become a constant."""
    model, path = tiny_model(model_type, head), tmp_path / "model.onnx"
    small = pruned_model(model)
    example = tiny_batch(1, 6)
    if model_type in ("bert", "electra"):
        example["token_type_ids"] = torch.zeros_like(example["input_ids"])
    plain = export_onnx(small, example, path)
    runs = OnnxModel(path)
    batches = []
    for rows, length, padding in (
        (1, 4, "none"),
        (4, 6, "left"),
        (3, 9, "right"),
        (2, 40, "right"),
    ):
        batch = tiny_batch(rows, length, padding=padding, seed=rows)
        if "token_type_ids" in example:
            types = torch.zeros_like(batch["input_ids"])
            types[:, length // 2 :] = 1
            batch["token_type_ids"] = types
        batches.append(batch)
    difference, largest = max_difference(plain, runs, batches)
    assert difference < 1e-5 * max(1.0, largest)
    assert max_difference(model, runs, batches)[0] > 1e-2, "the pruning is in it"
    assert [entry.shape for entry in runs.session.get_inputs()] == [["batch", "sequence"]] * len(
        example
    )
    assert head != "none" or runs.output_names == ["last_hidden_state"]
    assert_openvino_computes_the_same(path, plain, batches)


@pytest.mark.parametrize(
    ("model_type", "head"), [("vit", "image-classification"), ("opt", "causal-lm")]
)
def test_images_and_language_models(
    model_type: str, head: str, tiny_model: Tiny, tiny_batch: Tiny, tmp_path: Path
) -> None:
    model, path = tiny_model(model_type, head), tmp_path / "model.onnx"
    batches = [
        tiny_batch(rows, 9, padding="none", seed=rows, model_type=model_type) for rows in (1, 4)
    ]
    plain = export_onnx(pruned_model(model), batches[0], path)
    runs = OnnxModel(path)
    difference, largest = max_difference(plain, runs, varied_inputs(batches[1:]))
    assert difference < 1e-5 * max(1.0, largest)
    assert max_difference(model, runs, batches)[0] > 1e-2, "the pruning is in it"
    assert runs.output_names == ["logits"]
    assert_openvino_computes_the_same(path, plain, batches)


@pytest.mark.parametrize("model_type", ["bart", "t5"])
def test_generators_with_an_encoder_are_refused(
    model_type: str, tiny_model: Tiny, tiny_batch: Tiny, tmp_path: Path
) -> None:
    model = tiny_model(model_type, "seq2seq-lm")
    with pytest.raises(UserError, match=r"ForConditionalGeneration.*two files.*--export"):
        export_onnx(pruned_model(model), tiny_batch(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_the_file_is_valid_reproducible_and_has_no_paths_of_this_machine(
    tiny_model: Tiny, tiny_batch: Tiny, tmp_path: Path
) -> None:
    import onnx

    small = pruned_model(tiny_model()).to(torch.bfloat16).train()
    for name in ("one", "two"):
        plain = export_onnx(small, tiny_batch(), tmp_path / name)
    assert small.training
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in small.parameters())
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    content = (tmp_path / "one").read_bytes()
    assert content == (tmp_path / "two").read_bytes()
    assert b".py" not in content
    onnx.checker.check_model(str(tmp_path / "one"), full_check=True)


def test_weights_of_large_models_are_in_a_second_file(
    tiny_model: Tiny, tiny_batch: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rfprune.export.onnx.MAX_FILE_BYTES", 1000)
    path = tmp_path / "model.onnx"
    plain = export_onnx(pruned_model(tiny_model()), tiny_batch(), path)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert max_difference(plain, OnnxModel(path), [tiny_batch(2, 5)])[0] < 1e-5


def test_int8_weights_compute_nearly_the_same(
    tiny_model: Tiny, tiny_batch: Tiny, tmp_path: Path
) -> None:
    import onnx

    source, target = tmp_path / "model.onnx", tmp_path / "int8.onnx"
    plain = export_onnx(pruned_model(tiny_model()), tiny_batch(), source)
    quantize_onnx(source, target)
    difference, largest = max_difference(plain, OnnxModel(target), [tiny_batch(4, 9)])
    assert 0 < difference < 0.1 * largest
    weights = [
        w for w in onnx.load(target).graph.initializer if w.data_type == onnx.TensorProto.INT8
    ]
    assert len(weights) > 8
    widest = max(abs(int(v)) for w in weights for v in onnx.numpy_helper.to_array(w).ravel())
    assert 32 < widest <= 64, "seven bits, for processors that would overflow with eight"


@pytest.mark.parametrize(
    "sizes", [[(8, 20), (8, 12), (3, 5)], [(4, 9)], [(1, 9)], [(1, 4), (1, 4)]]
)
def test_inputs_of_the_check_vary_in_size(sizes: list[tuple[int, int]], tiny_batch: Tiny) -> None:
    batches = [tiny_batch(rows, length) for rows, length in sizes]
    shapes = [tuple(batch["input_ids"].shape) for batch in varied_inputs(batches)]
    assert len({rows for rows, _ in shapes}) >= 2
    assert len({length for _, length in shapes}) >= 2
    assert max(length for _, length in shapes) == max(length for _, length in sizes)
    images = varied_inputs([tiny_batch(5, model_type="vit")])
    assert [len(batch["pixel_values"]) for batch in images] == [5, 2, 1]
