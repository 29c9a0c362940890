"""An OpenVINO model has the weights of the pruned model, and says so if it cannot be made.

Without these tests int8 weights could be those of another model, or a missing runtime could be
reported after minutes of pruning. `test_onnx.py` compares the outputs of all families.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rfprune.cli.validation import check_exports
from rfprune.errors import UserError
from rfprune.export.contract import max_difference
from rfprune.export.onnx import export_onnx
from rfprune.export.openvino import OpenvinoModel, compress_weights, convert_onnx
from tests.export.test_onnx import pruned_model

needs_packages = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("openvino", "nncf", "onnx", "onnxscript"))),
    reason="needs the extra rfprune[openvino]",
)


@needs_packages
def test_int8_weights_compute_nearly_the_same_and_nothing_is_printed(
    tiny_model: Callable[..., Any],
    tiny_batch: Callable[..., Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    source, full, small = (tmp_path / name for name in ("model.onnx", "full.xml", "small.xml"))
    model = tiny_model(hidden_size=64, intermediate_size=96)
    plain = export_onnx(pruned_model(model), tiny_batch(1, 6), source)
    convert_onnx(source, full)
    compress_weights(full, small)
    runs = OpenvinoModel(small)
    difference, largest = max_difference(plain, runs, [tiny_batch(4, 9)])
    assert 1e-6 * largest < difference < 0.1 * largest
    assert max_difference(model, runs, [tiny_batch(4, 9)])[0] > difference, "the pruning is in it"
    sizes = [path.with_suffix(".bin").stat().st_size for path in (small, full)]
    assert sizes[0] < 0.35 * sizes[1]
    assert capfd.readouterr() == ("", "")
    assert logging.getLoggerClass().__module__ == "logging"


@needs_packages
def test_an_operator_that_openvino_does_not_know_is_refused(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, save

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "ab"]
    graph = helper.make_graph(
        [helper.make_node("Unheard", ["a"], ["b"])], "odd", ends[:1], ends[1:]
    )
    save(helper.make_model(graph), tmp_path / "odd.onnx")
    with pytest.raises(UserError, match=r"OpenVINO [\d.]+ cannot read.*leave openvino out"):
        convert_onnx(tmp_path / "odd.onnx", tmp_path / "odd.xml")
    assert [path.name for path in tmp_path.iterdir()] == ["odd.onnx"]


def test_missing_packages_and_a_runtime_that_does_not_start_are_reported_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing = {"nncf"}
    imported: list[str] = []
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else object()
    )
    monkeypatch.setattr(importlib, "import_module", imported.append)
    check_exports(["openvino"])
    assert imported == ["openvino"]
    with pytest.raises(
        UserError, match=r"--quantize needs.*nncf.*its extra openvino, or leave --qu"
    ):
        check_exports(["openvino"], quantize=True)
    missing.add("openvino")
    with pytest.raises(UserError, match=r"--export openvino needs.*pip install openvino"):
        check_exports(["openvino"])
    missing.clear()

    def fails(name: str) -> Any:
        raise ImportError("version `GLIBC_2.38' not found")

    monkeypatch.setattr(importlib, "import_module", fails)
    with pytest.raises(UserError, match=r"openvino, which is installed but.*GLIBC_2.38.*or leave"):
        check_exports(["openvino"])
