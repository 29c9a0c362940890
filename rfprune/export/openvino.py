"""The OpenVINO export: an .xml and a .bin file, where optimum-intel and sentence-transformers look.

OpenVINO reads the ONNX file of `rfprune.export.onnx` and writes its own format. int8 weights are
made by NNCF, OpenVINO's library of compression. Both are imported inside the functions.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from rfprune.errors import UserError, error_summary, import_without_statistics
from rfprune.export.contract import (
    Export,
    ExportJob,
    RuntimeModel,
    check_outputs,
    file_bytes,
)
from rfprune.export.onnx import MODEL_FILE, write_model
from rfprune.latency.timed_batch import typical_batch

FOLDER = "openvino"
OPENVINO_FILE = "openvino_model.xml"
OPENVINO_INT8_FILE = "openvino_model_quantized.xml"


def write_openvino(folder: Path, job: ExportJob) -> dict[str, Export]:
    """Write folder/openvino/openvino_model.xml, and a second model with int8 weights on request.

    Raises:
        UserError: the model cannot be expressed, or the file computes something else.
    """
    path = folder / FOLDER
    path.mkdir()
    pruned = job.pruned_on_cpu
    with _onnx_file(folder, job) as source:
        convert_onnx(source, path / OPENVINO_FILE)
    runtime = OpenvinoModel(path / OPENVINO_FILE, pruned.config)
    difference = check_outputs("openvino", pruned, runtime, job.batches)
    exports = {"openvino": _export(path / OPENVINO_FILE, runtime, difference)}
    if job.quantize:
        compress_weights(path / OPENVINO_FILE, path / OPENVINO_INT8_FILE)
        runtime = OpenvinoModel(path / OPENVINO_INT8_FILE, pruned.config)
        exports["openvino_int8"] = _export(path / OPENVINO_INT8_FILE, runtime, {})
    return exports


@contextmanager
def _onnx_file(folder: Path, job: ExportJob) -> Iterator[Path]:
    """The ONNX file that the same run has written, or a temporary one."""
    written = folder / "onnx" / MODEL_FILE
    if written.is_file():
        yield written
        return
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary, MODEL_FILE)
        write_model(job.pruned_on_cpu, typical_batch(job.batches), path)
        yield path


def _export(path: Path, runtime: RuntimeModel, difference: Mapping[str, Any]) -> Export:
    num_bytes = file_bytes(path.parent, f"{path.stem}.bin")
    return Export(f"{path.parent.name}/{path.name}", num_bytes, difference, runtime)


def convert_onnx(source: Path, target: Path) -> None:
    """Write an ONNX file as `target` (.xml) and the .bin beside it, with float32 weights.

    Raises:
        UserError: OpenVINO does not know an operator of the file.
    """
    openvino = import_without_statistics("openvino")

    try:
        model = openvino.Core().read_model(source)
    except RuntimeError as error:
        raise UserError(
            f"OpenVINO {openvino.__version__.split('-')[0]} cannot read the ONNX file of this "
            f"model ({error_summary(error)}): leave openvino out of --export"
        ) from error
    openvino.save_model(model, target, compress_to_fp16=False)


def compress_weights(source: Path, target: Path) -> None:
    """Write an OpenVINO model with int8 weights; every output feature has a scale and a zero point.

    Activations are quantised at run time on processors with VNNI instructions, which OpenVINO
    decides when it loads the model.
    """
    openvino = import_without_statistics("openvino")

    with quiet_nncf() as nncf:
        model = nncf.compress_weights(
            openvino.Core().read_model(source), mode=nncf.CompressWeightsMode.INT8_ASYM
        )
    openvino.save_model(model, target, compress_to_fp16=False)


@contextmanager
def quiet_nncf() -> Iterator[Any]:
    """NNCF without messages and progress bars.

    Its import replaces the class of later loggers, which is undone.
    """
    logger_class = logging.getLoggerClass()
    try:
        with redirect_stdout(StringIO()):
            nncf = import_without_statistics("nncf")
            nncf.set_log_level(logging.ERROR)
            yield nncf
    finally:
        logging.setLoggerClass(logger_class)


class OpenvinoModel(RuntimeModel):
    """An OpenVINO model on the CPU, which computes in float32.

    Without that, OpenVINO computes in bfloat16 on processors that have it.

    Args:
        path: the .xml file.
        config: of the PyTorch model.
    """

    def __init__(self, path: Path, config: Any = None) -> None:
        openvino = import_without_statistics("openvino")

        properties = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
            "NUM_STREAMS": 1,
        }
        compiled = openvino.Core().compile_model(path, "CPU", properties)
        super().__init__(
            lambda arrays: compiled(arrays).to_tuple(),
            [port.any_name for port in compiled.inputs],
            [port.any_name for port in compiled.outputs],
            config,
        )
