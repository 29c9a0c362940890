"""`--export` and `--quantize` write files that compute what was pruned, or an error and no files.

Without these tests an export that computes something else could pass, and a missing package could
be reported after minutes of pruning.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rfprune import load_pruned
from rfprune.cli.parser import parse
from rfprune.cli.validation import EXPORT_PACKAGES
from rfprune.errors import UserError
from rfprune.export.formats import FORMATS
from rfprune.export.onnx import OnnxModel, write_model
from rfprune.main import main
from rfprune.report.report_json import read_report
from rfprune.settings import EXPORTS

Tiny = Callable[..., Any]
HAS_OPENVINO = all(map(importlib.util.find_spec, EXPORT_PACKAGES["openvino"] + ("nncf",)))
RUNTIMES = ("onnx", "openvino")[: 1 + HAS_OPENVINO]
NEEDED = "--model no/such/folder --task sst2 --constraint 0.5 --output-dir out"
NEEDED_OF_TEXT = NEEDED.replace("sst2", "language-modeling")


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
def log_messages() -> Iterator[list[str]]:
    """The messages that the exporter and the quantiser log."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("", "torch.onnx")]
    for logger in loggers:
        logger.addHandler(handler)
    yield messages
    for logger in loggers:
        logger.removeHandler(handler)


def test_a_run_writes_checks_and_reports_every_export(
    flags: Callable[..., list[str]],
    tiny_tokenizer: Tiny,
    capfd: pytest.CaptureFixture[str],
    log_messages: list[str],
) -> None:
    assert main(flags(f"--export dense {' '.join(RUNTIMES)} --quantize")) == 0
    report = read_report(Path("out"))
    exports = report["exports"]
    runtimes = [f"{name}{suffix}" for name in RUNTIMES for suffix in ("", "_int8")]
    assert set(exports) == {"dense", *runtimes, "latency"}
    for name in runtimes:
        path = Path("out", exports[name]["path"])
        path = path.with_suffix(".bin") if path.suffix == ".xml" else path
        assert path.stat().st_size == exports[name]["bytes"]
        assert exports[name]["latency_ms"] > 0
    assert exports["dense"]["bytes"] == Path("out/dense/model.safetensors").stat().st_size
    for entry in (exports["dense"], *map(exports.get, RUNTIMES)):
        assert entry["max_difference"] < 1e-4
        rows, lengths = zip(*entry["checked_on"], strict=True)
        assert len(set(rows)) >= 2
        assert len(set(lengths)) >= 2
    for name in RUNTIMES:
        full, int8 = exports[name], exports[f"{name}_int8"]
        assert int8["bytes"] < full["bytes"]
        assert full["score"] == report["pruned"]["score"]
        assert full["divergence"] == pytest.approx(report["divergence"], rel=1e-3)
        assert abs(int8["divergence"] - full["divergence"]) > 1e-9, "another model was scored"

    output = capfd.readouterr()
    for label in ("pruned, ONNX Runtime, int8", "pruned, OpenVINO, int8")[: len(RUNTIMES)]:
        assert label in output.out
        for name in ("log.txt", "report.html", "README.md"):
            assert label in Path("out", name).read_text(encoding="utf-8")
    assert "onnx/model_quantized.onnx" in output.out
    assert "torch.onnx" not in output.out + output.err
    assert not log_messages

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


def test_a_dense_export_in_half_precision_can_be_pruned_again(
    flags: Callable[..., list[str]], tiny_data_dir: Path
) -> None:
    """It is an ordinary checkpoint, stored in the precision of the pruned one."""
    assert main(flags("--export dense --dtype bfloat16")) == 0
    assert set(read_report(Path("out"))["exports"]) == {"dense"}
    with pytest.raises(UserError, match="out/dense.*not a pruned model"):
        load_pruned("out/dense")
    again = f"--model out/dense --task mrpc --data-dir {tiny_data_dir} --constraint 0.5 --quiet"
    assert main([*again.split(), "--samples", "8", "--output-dir", "again"]) == 0
    assert read_report(Path("again"))["stored_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("missing", "extra"),
    [("onnx", "onnx"), ("onnxruntime", "onnx"), ("onnxscript", "onnx"), ("gguf", "gguf")],
)
def test_a_missing_package_is_an_error_before_the_run(
    missing: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec

    def without(name: str, *arguments: Any) -> Any:
        return None if name == missing else find(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    sentence = rf"\({missing}\): run pip install {missing}, or install .* extra {extra}, or leave"
    with pytest.raises(UserError, match=sentence):
        parse([*NEEDED_OF_TEXT.split(), "--export", extra])
    assert parse([*NEEDED.split(), "--export", "dense"]).output.export == ("dense",)


def test_repeated_flags_are_combined() -> None:
    more = "--export dense --export onnx dense --quantize"
    output = parse([*NEEDED.split(), *more.split()]).output
    assert (output.export, output.quantize) == (("dense", "onnx"), True)
    assert parse(NEEDED.split()).output.export == ()
    assert tuple(FORMATS) == EXPORTS, "the flag has the formats of the registry"


def test_types_of_gguf_files() -> None:
    output = parse([*NEEDED_OF_TEXT.split(), *"--export gguf --gguf-type q4_0 f16".split()]).output
    assert output.gguf_types == ("q4_0", "f16")
    assert parse([*NEEDED_OF_TEXT.split(), "--export", "gguf"]).output.gguf_types == ("f16",)


def broken(*_: Any, **__: Any) -> Any:
    raise torch.onnx.errors.OnnxExporterError("No decomposition for aten.odd\nmany lines")


def shifted(model: Any, *arguments: Any) -> None:
    write_model(model, *arguments)
    model.classifier.bias += 1.0


def not_finite(model: Any, *arguments: Any) -> None:
    write_model(model, *arguments)
    model.classifier.bias.fill_(torch.nan)


def full_disk(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("where", "fault", "sentence"),
    [
        ("torch.onnx.export", broken, "in ONNX (No decomposition for aten.odd)"),
        ("rfprune.export.onnx.write_model", shifted, "onnx export differs from"),
        ("rfprune.export.onnx.write_model", not_finite, "by up to nan"),
        ("rfprune.export.onnx.quantize_onnx", full_disk, "No space left on device"),
        ("rfprune.export.dense.save_dense", full_disk, "No space left on device"),
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
    output = capsys.readouterr()
    assert sentence in output.err
    assert "Traceback" not in output.err
    assert not Path("out").exists()
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "step", ["dense.save_dense", "onnx.write_model", "onnx.quantize_onnx", "formats.time_on_cpu"]
)
def test_ctrl_c_in_an_export_leaves_nothing(
    step: str, flags: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"rfprune.export.{step}", interrupt)
    assert main(flags("--export dense onnx --quantize --skip-tune")) == 130
    assert list(Path().iterdir()) == []
