"""The ONNX export, by PyTorch's exporter: any batch size, any length, and int8 weights on request.

onnx, onnxruntime and onnxscript are imported inside the functions.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rfprune.errors import UserError
from rfprune.export.contract import (
    Export,
    ExportJob,
    RuntimeModel,
    check_outputs,
    compared_outputs,
    file_bytes,
    float32_cpu_copy,
    model_inputs,
)
from rfprune.latency.timed_batch import typical_batch

Batch = Mapping[str, Tensor]

MODEL_FILE = "model.onnx"
QUANTIZED_FILE = "model_quantized.onnx"

MAX_FILE_BYTES = 1_800_000_000
"""Protobuf has a limit of 2 GiB: the weights of larger models go to a second file."""


def write_onnx(folder: Path, job: ExportJob) -> dict[str, Export]:
    """Write folder/onnx/model.onnx, and model_quantized.onnx with int8 weights on request.

    Raises:
        UserError: the model cannot be expressed in ONNX, or the file computes something else.
    """
    path = folder / "onnx"
    path.mkdir()
    pruned = job.pruned_on_cpu
    write_model(pruned, typical_batch(job.batches), path / MODEL_FILE)
    runtime = OnnxModel(path / MODEL_FILE, pruned.config)
    difference = check_outputs("onnx", pruned, runtime, job.batches)
    exports = {"onnx": _export(path / MODEL_FILE, runtime, difference)}
    if job.quantize:
        quantize_onnx(path / MODEL_FILE, path / QUANTIZED_FILE)
        runtime = OnnxModel(path / QUANTIZED_FILE, pruned.config)
        exports["onnx_int8"] = _export(path / QUANTIZED_FILE, runtime, {})
    return exports


def _export(path: Path, runtime: nn.Module, difference: Mapping[str, Any]) -> Export:
    """With the bytes of the second file, model.onnx.data, which large models have."""
    num_bytes = file_bytes(path.parent, f"{path.name}*")
    return Export(f"{path.parent.name}/{path.name}", num_bytes, difference, runtime)


def check_onnx(model: Any, name: str) -> None:
    """Raise a UserError for a model that is no single graph; `name` is the format to leave out."""
    if getattr(model.config, "is_encoder_decoder", False) and model.can_generate():
        raise UserError(
            f"a {type(model).__name__} runs its encoder once and its decoder once per token, which "
            f"takes two files: leave {name} out of --export, or use --export dense and a tool "
            f"that writes both parts"
        )


def export_onnx(model: Any, batch: Batch, path: Path) -> Any:
    """Write any model to `path` as ONNX in float32, and return the float32 copy that was written.

    Args:
        model: a dense or pruned model of transformers on any device; it is not changed.
        batch: see `write_model`.

    Raises:
        UserError: the model cannot be expressed in ONNX.
    """
    plain = float32_cpu_copy(model)
    write_model(plain, batch, path)
    return plain


def write_model(model: Any, batch: Batch, path: Path) -> None:
    """Write a model as ONNX, with free batch size and length.

    Outputs are `logits`, or `start_logits` and `end_logits`, or `last_hidden_state` of a model
    without a head. A decoder is written without its cache of keys and values.

    Args:
        model: from `float32_cpu_copy`.
        batch: example inputs, (B, S) each, or images; the model's inputs among them are exported.

    Raises:
        UserError: the model cannot be expressed in ONNX.
    """
    import onnx

    check_onnx(model, "onnx")
    example = {  # a batch of one would become a constant
        name: torch.cat([value, value]) if len(value) == 1 else value
        for name, value in model_inputs(model, batch).items()
    }
    free = {
        name: {0: "batch"} if name == "pixel_values" else {0: "batch", 1: "sequence"}
        for name in example
    }
    with torch.no_grad(), _quiet_exporter(), _without_pooler(model):
        outputs = compared_outputs(model(**example))
        try:
            program = torch.onnx.export(
                model,
                kwargs=example,
                dynamo=True,
                dynamic_shapes=free,
                input_names=list(example),
                output_names=outputs,
                external_data=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise UserError(
                f"PyTorch's exporter cannot express this {type(model).__name__} in ONNX "
                f"({_root_cause(error)}): leave onnx out of --export"
            ) from error
    assert program is not None
    num_bytes = sum(value.numel() * value.itemsize for value in model.state_dict().values())
    onnx.save_model(
        _without_traces(program.model_proto),
        path,
        save_as_external_data=num_bytes > MAX_FILE_BYTES,
        location=f"{path.name}.data",
    )


def quantize_onnx(source: Path, target: Path) -> None:
    """Write `source` with int8 weights to `target`; activations are quantised at run time.

    Each output feature has its own scale, which loses the least accuracy. Weights have seven bits:
    processors without VNNI instructions overflow silently with eight.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it recommends a preprocessing step that changes nothing here
    try:
        quantize_dynamic(
            onnx.load(source),
            target,
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=source.stat().st_size > MAX_FILE_BYTES,
        )
    finally:
        root.setLevel(level)


class OnnxModel(RuntimeModel):
    """An ONNX file in ONNX Runtime.

    Args:
        path: the file.
        config: of the PyTorch model.
    """

    def __init__(self, path: Path, config: Any = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        outputs = [entry.name for entry in session.get_outputs()]
        super().__init__(
            lambda arrays: session.run(outputs, arrays),
            [entry.name for entry in session.get_inputs()],
            outputs,
            config,
        )
        self.session = session


def _without_traces(model: Any) -> Any:
    """Remove what the exporter records about its own work.

    Shapes of intermediate values are outdated after weights were transposed, and stop other tools.
    Stack traces contain paths of this machine.
    """
    del model.graph.value_info[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for entry in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del entry.metadata_props[:]
    del model.graph.metadata_props[:]
    return model


@contextmanager
def _without_pooler(model: Any) -> Iterator[None]:
    """Within, a model without a head returns hidden states alone: embeddings use no pooler."""
    pooler = getattr(model, "pooler", None)
    if pooler is None or model.base_model is not model:
        yield
        return
    model.pooler = None
    try:
        yield
    finally:
        model.pooler = pooler


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Suppress the messages and warnings of torch.onnx."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _root_cause(error: BaseException) -> str:
    """The first line of the innermost error; the outer ones say how to report a bug to PyTorch."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200].rstrip(".") if lines else type(error).__name__
