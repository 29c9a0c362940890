"""`--export` and `--quantize`: files that compute what was pruned, or one sentence and no files.

Deleting this lets an ONNX file with fixed sizes, or one that computes something else, pass as an
export, and a missing package be found after minutes of pruning.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from rfprune import load_pruned
from rfprune.cli.parser import parse
from rfprune.errors import UserError
from rfprune.export import onnx as onnx_export
from rfprune.export.onnx import OnnxModel, export_onnx, max_difference, quantize_onnx, varied_inputs
from rfprune.main import main
from rfprune.model.compact import compact
from rfprune.model.layout import layout_of
from rfprune.model.masks import full_masks
from rfprune.report.report_json import read_report
from rfprune.report.summary import export_lines, export_rows
from tests.conftest import MODEL_TYPES

Tiny = Callable[..., Any]
NEEDED = "--model no/such/folder --task sst2 --constraint 0.5 --output-dir out"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / "cache"))
    monkeypatch.setattr("rfprune.latency.speedup.MAX_ROUNDS", 1)


@pytest.fixture
def flags(tiny_folder: Callable[..., Path], tiny_data_dir: Path) -> Callable[..., list[str]]:
    """`flags("--export onnx", task="mrpc", head=...)`: those of a small run to the folder `out`."""

    def make(more: str, task: str = "mrpc", model_type: str = "bert", **model: Any) -> list[str]:
        folder = tiny_folder(model_type, **model)
        text = f"--model {folder} --task {task} --data-dir {tiny_data_dir} --constraint 0.5"
        text += f" --samples 16 --batch-size 8 --output-dir out {more}"
        return text.split()

    return make


@pytest.fixture
def spied_loggers() -> Iterator[list[str]]:
    """What the exporter and the quantiser log."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("", "torch.onnx")]
    for logger in loggers:
        logger.addHandler(handler)
    yield said
    for logger in loggers:
        logger.removeHandler(handler)


def files_here() -> set[str]:
    return {str(path) for path in Path().rglob("*") if path.is_file()}


def test_a_run_leaves_every_export_and_says_so(
    flags: Callable[..., list[str]],
    tiny_tokenizer: Tiny,
    capfd: pytest.CaptureFixture[str],
    spied_loggers: list[str],
) -> None:
    assert main(flags("--export dense onnx --quantize")) == 0
    report = read_report(Path("out"))
    exports = report["exports"]
    assert set(exports) == {"dense", "onnx", "onnx_int8", "latency"}
    onnx, int8 = exports["onnx"], exports["onnx_int8"]
    for entry in (onnx, int8):
        path = Path("out", entry["path"])
        assert path.stat().st_size == entry["bytes"]
        assert entry["latency_ms"] > 0
    assert int8["bytes"] < onnx["bytes"]
    assert exports["dense"]["bytes"] == Path("out/dense/model.safetensors").stat().st_size
    for entry in (exports["dense"], onnx):
        assert entry["max_difference"] < 1e-4
        rows, lengths = zip(*entry["checked_on"], strict=True)
        assert len(set(rows)) >= 2
        assert len(set(lengths)) >= 2
    assert onnx["score"] == report["pruned"]["score"]
    assert onnx["divergence"] == pytest.approx(report["divergence"], rel=1e-3)
    assert abs(int8["divergence"] - onnx["divergence"]) > 1e-9, "another model was scored"

    said = capfd.readouterr()
    assert "pruned, ONNX Runtime, int8" in said.out
    assert "onnx/model_quantized.onnx" in said.out
    for name in ("log.txt", "report.html", "README.md"):
        assert "pruned, ONNX Runtime, int8" in Path("out", name).read_text(encoding="utf-8")
    assert "torch.onnx" not in said.out + said.err
    assert not spied_loggers

    inputs = tiny_tokenizer()(["a warm film .", "bad"], padding=True, return_tensors="pt")
    pruned = load_pruned("out").eval()
    dense = transformers.AutoModelForSequenceClassification.from_pretrained("out/dense").eval()
    runs = OnnxModel(Path("out/onnx/model.onnx"))
    with torch.no_grad():
        expected = pruned(**inputs).logits
        torch.testing.assert_close(dense(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(runs(**inputs)["logits"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", ["stsb", "squad_v2"])
def test_every_kind_of_task_is_exported_and_scored(
    task: str, flags: Callable[..., list[str]]
) -> None:
    head = "question-answering" if task == "squad_v2" else "sequence-classification"
    labels = {"num_labels": 1} if task == "stsb" else {}
    arguments = flags("--export onnx --quantize", task, "distilbert", head=head, **labels)
    assert main(arguments) == 0
    report = read_report(Path("out"))
    exports = report["exports"]
    assert exports["onnx"]["score"] == pytest.approx(report["pruned"]["score"], abs=1e-3)
    assert exports["onnx"]["divergence"] == pytest.approx(report["divergence"], rel=1e-2)
    assert exports["onnx_int8"]["scores"].keys() == report["scores"]["pruned"].keys()


def test_without_the_flag_nothing_is_added(flags: Callable[..., list[str]]) -> None:
    assert main(flags("")) == 0
    report = read_report(Path("out"))
    assert "exports" not in report
    assert not export_rows(report)
    assert not export_lines(report)
    assert not Path("out/onnx").exists()
    assert not Path("out/dense").exists()


def test_a_dense_export_of_half_precision_is_pruned_again(
    flags: Callable[..., list[str]], tiny_data_dir: Path
) -> None:
    """It is an ordinary checkpoint, stored in the precision of the pruned one."""
    assert main(flags("--export dense --dtype bfloat16")) == 0
    report = read_report(Path("out"))
    assert set(report["exports"]) == {"dense"}
    again = f"--model out/dense --task mrpc --data-dir {tiny_data_dir} --constraint 0.5 --quiet"
    assert main([*again.split(), "--samples", "8", "--output-dir", "again"]) == 0
    assert read_report(Path("again"))["stored_dtype"] == "bfloat16"


def pruned_model(model: Any) -> Any:
    layout = layout_of(model)
    masks = full_masks(layout)
    masks[0][1], masks[1][:5], masks[2][:] = 0, 0, 0
    return compact(model, layout, masks)


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
    ],
)
def test_every_family_runs_at_any_size(
    model_type: str, head: str, tiny_model: Tiny, tiny_batch: Tiny, tmp_path: Path
) -> None:
    """Made from a batch of one, which must not become a constant."""
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


@pytest.mark.parametrize(
    ("model_type", "head"), [("vit", "image-classification"), ("opt", "causal-lm")]
)
def test_images_and_texts_to_be_continued(
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


@pytest.mark.parametrize("model_type", ["bart", "t5"])
def test_what_reads_once_and_writes_often_is_refused(
    model_type: str, tiny_model: Tiny, tiny_batch: Tiny, tmp_path: Path
) -> None:
    model = tiny_model(model_type, "seq2seq-lm")
    with pytest.raises(UserError, match="its encoder once and its decoder at every token"):
        export_onnx(pruned_model(model), tiny_batch(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_images_are_varied_by_number_alone(tiny_batch: Tiny) -> None:
    shapes = [len(b["pixel_values"]) for b in varied_inputs([tiny_batch(5, model_type="vit")])]
    assert shapes == [5, 2, 1]


def test_the_file_is_sound_and_names_no_folder_of_this_machine(
    tiny_model: Tiny, tiny_batch: Tiny, tmp_path: Path
) -> None:
    import onnx

    for name in ("one", "two"):
        export_onnx(pruned_model(tiny_model()), tiny_batch(), tmp_path / name)
    content = (tmp_path / "one").read_bytes()
    assert content == (tmp_path / "two").read_bytes()
    assert b".py" not in content
    onnx.checker.check_model(str(tmp_path / "one"), full_check=True)


def test_large_weights_lie_beside_the_file(
    tiny_model: Tiny, tiny_batch: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "LARGEST_FILE_BYTES", 1000)
    path = tmp_path / "model.onnx"
    plain = export_onnx(pruned_model(tiny_model()), tiny_batch(), path)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert max_difference(plain, OnnxModel(path), [tiny_batch(2, 5)])[0] < 1e-5


def test_int8_weights_are_nearly_the_same_model(
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


def test_the_model_is_left_alone(tiny_model: Tiny, tiny_batch: Tiny, tmp_path: Path) -> None:
    small = pruned_model(tiny_model()).to(torch.bfloat16).train()
    plain = export_onnx(small, tiny_batch(), tmp_path / "model.onnx")
    assert small.training
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in small.parameters())
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "sizes", [[(8, 20), (8, 12), (3, 5)], [(4, 9)], [(1, 9)], [(1, 4), (1, 4)]]
)
def test_inputs_of_the_check_vary(sizes: list[tuple[int, int]], tiny_batch: Tiny) -> None:
    batches = [tiny_batch(rows, length) for rows, length in sizes]
    shapes = [tuple(batch["input_ids"].shape) for batch in varied_inputs(batches)]
    assert len({rows for rows, _ in shapes}) >= 2
    assert len({length for _, length in shapes}) >= 2
    assert max(length for _, length in shapes) == max(length for _, length in sizes)


# What cannot be: one sentence, exit code 2, and no file.


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--export", "--export: expected at least one argument"),
        ("--export pt", "--export: invalid choice: 'pt'"),
        ("--export ONNX", "--export: invalid choice: 'ONNX'"),
        ("--export onnx tensorrt", "--export: invalid choice: 'tensorrt'"),
        ("--export onnx,dense", "--export: invalid choice: 'onnx,dense'"),
        ("--export=", "--export: invalid choice: ''"),
        ("--export dense ../../etc", "--export: invalid choice: '../../etc'"),
        ("--quantize", "--quantize makes a second ONNX file"),
        ("--quantize --export dense", "--quantize makes a second ONNX file"),
        ("--export onnx --quantize int8", "unrecognized arguments: int8"),
        ("--export onnx --quantise", "unrecognized arguments: --quantise"),
    ],
)
def test_flags_that_cannot_be(more: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*NEEDED.split(), *more.split()]) == 2
    said = capsys.readouterr()
    assert sentence.lower() in said.err.lower()
    assert said.err.count("\n") == 1
    assert (said.out, files_here()) == ("", set())


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_told_before_any_work(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec

    def without(name: str, *arguments: Any) -> Any:
        return None if name == missing else find(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(UserError, match=rf"here \({missing}\): run pip install {missing}"):
        parse([*NEEDED.split(), "--export", "onnx"])
    assert parse([*NEEDED.split(), "--export", "dense"]).output.export == ("dense",)


def test_flags_add_up() -> None:
    more = "--export dense --export onnx dense --quantize"
    output = parse([*NEEDED.split(), *more.split()]).output
    assert (output.export, output.quantize) == (("dense", "onnx"), True)
    assert parse(NEEDED.split()).output.export == ()


def broken(*_: Any, **__: Any) -> Any:
    raise torch.onnx.errors.OnnxExporterError("No decomposition for aten.odd\nmany lines")


def shifted(*arguments: Any, **options: Any) -> Any:
    exported = export_onnx(*arguments, **options)
    with torch.no_grad():
        exported.classifier.bias += 1.0
    return exported


def not_finite(*arguments: Any, **options: Any) -> Any:
    exported = shifted(*arguments, **options)
    nn.init.constant_(exported.classifier.bias, np.nan)
    return exported


def full_disk(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("where", "fault", "sentence"),
    [
        ("torch.onnx.export", broken, "into ONNX (No decomposition for aten.odd)"),
        ("rfprune.export.exports.export_onnx", shifted, "differs from the pruned model by up to 1"),
        (
            "rfprune.export.exports.export_onnx",
            not_finite,
            "differs from the pruned model by up to nan",
        ),
        ("rfprune.export.exports.quantize_onnx", full_disk, "No space left on device"),
        ("rfprune.export.exports.save_dense", full_disk, "No space left on device"),
    ],
)
def test_an_export_that_fails_leaves_nothing(
    where: str,
    fault: Any,
    sentence: str,
    flags: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(where, fault)
    assert main(flags("--export dense onnx --quantize --skip-tune")) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert "Traceback" not in said.err
    assert not Path("out").exists()
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("step", ["save_dense", "export_onnx", "quantize_onnx", "time_on_cpu"])
def test_ctrl_c_in_an_export_leaves_nothing(
    step: str, flags: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"rfprune.export.exports.{step}", interrupt)
    assert main(flags("--export dense onnx --quantize --skip-tune")) == 130
    assert list(Path().iterdir()) == []


def test_exports_are_no_pruned_models(
    flags: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """To load_pruned the dense folder is an ordinary checkpoint; the ONNX folder is none at all."""
    assert main(flags("--export dense")) == 0
    with pytest.raises(UserError, match="so this is not a pruned model"):
        load_pruned("out/dense")
    Path("onnx").mkdir()
    shutil.copy("out/config.json", "onnx/model.onnx")
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_pruned("onnx")
    capsys.readouterr()
    arguments = flags("--output-dir again")
    arguments[1] = "onnx"
    assert main(arguments) == 2
    assert "no config.json" in capsys.readouterr().err
