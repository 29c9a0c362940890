"""A model as ONNX, by PyTorch's exporter: any batch size, any length, and int8 on request.

onnx, onnxruntime and onnxscript are imported inside the functions.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rfprune.errors import UserError

Batch = Mapping[str, Tensor]

LARGEST_FILE_BYTES = 1_800_000_000
"""Of a model in one file: protobuf takes 2 GiB, so what is larger has its weights beside it."""


def export_onnx(model: Any, batch: Batch, path: Path) -> Any:
    """Write a model to `path` as ONNX in float32; gives the float32 model that was exported.

    Inputs are those of `batch` that the model takes, (B, S) each, with both sizes free, or images
    in batches of any size; outputs are `logits`, or `start_logits` and `end_logits`. A decoder is
    written without its cache of keys and values.

    Args:
        model: of transformers, dense or pruned, on any device; it is left as it is.

    Raises:
        UserError: the exporter cannot express the model, or one file would not do for it.
    """
    import onnx

    if getattr(model.config, "is_encoder_decoder", False) and model.can_generate():
        raise UserError(
            f"a {type(model).__name__} runs its encoder once and its decoder at every token, which "
            "one ONNX file cannot: leave --export onnx out, or give a dense export (to_dense) to a "
            "tool that writes both parts"
        )
    plain = copy.deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(False)
    for module in plain.modules():  # the decoder of an encoder-decoder has a copy of its own
        if getattr(getattr(module, "config", None), "use_cache", False):
            module.config.use_cache = False
    example = {  # a size of one would become a constant
        name: torch.cat([value, value]) if len(value) == 1 else value
        for name, value in model_inputs(plain, batch).items()
    }
    free = {
        name: {0: "batch"} if name == "pixel_values" else {0: "batch", 1: "sequence"}
        for name in example
    }
    with torch.no_grad(), _quiet_exporter():
        outputs = [name for name in plain(**example) if name.endswith("logits")]
        try:
            program = torch.onnx.export(
                plain,
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
                f"PyTorch's exporter cannot turn this {type(model).__name__} into ONNX "
                f"({_first_line(error)}): leave --export onnx out"
            ) from error
    assert program is not None
    written = _cleaned(program.model_proto)
    size = sum(value.numel() * value.itemsize for value in plain.state_dict().values())
    onnx.save_model(
        written,
        path,
        save_as_external_data=size > LARGEST_FILE_BYTES,
        location=f"{path.name}.data",
    )
    return plain


def quantize_onnx(source: Path, target: Path) -> None:
    """Write `source` with int8 weights to `target`; activations are quantised as they come.

    Each output of a linear map has a scale of its own, which loses least. Weights have seven bits:
    with eight, processors without VNNI instructions overflow in silence.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it recommends a preparation that changes nothing here
    try:
        quantize_dynamic(
            onnx.load(source),
            target,
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=source.stat().st_size > LARGEST_FILE_BYTES,
        )
    finally:
        root.setLevel(level)


class OnnxModel(nn.Module):
    """An ONNX file that is called as the PyTorch model it was made from: on the CPU, no gradients.

    It runs on as many threads as PyTorch has.
    """

    def __init__(self, path: Path, config: Any = None) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self.config = config
        self.input_names = [entry.name for entry in self.session.get_inputs()]
        self.output_names = [entry.name for entry in self.session.get_outputs()]
        self.where = nn.Parameter(torch.zeros(0), requires_grad=False)  # tells the device

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Logits by name; inputs that the model does not take are left out."""
        arrays = {name: inputs[name].numpy() for name in self.input_names}
        outputs = self.session.run(self.output_names, arrays)
        return {
            name: torch.from_numpy(output)
            for name, output in zip(self.output_names, outputs, strict=True)
        }


def model_inputs(model: Any, batch: Batch) -> dict[str, Tensor]:
    """What of a batch the model takes, on the CPU: DistilBERT, for one, has no token types."""
    known = signature(model.forward).parameters
    return {
        name: batch[name].cpu()
        for name in ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
        if name in batch and name in known
    }


def varied_inputs(batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """Real inputs of different batch sizes and lengths, with padding where the data has any.

    The longest batch, half of a middling one, and the shortest example alone. Images are of one
    size: a batch of them, half of one, and one alone.
    """
    if "input_ids" not in batches[0]:
        first, sizes = batches[0], (None, max(1, len(next(iter(batches[0].values()))) // 2), 1)
        return [{name: value[:size] for name, value in first.items()} for size in sizes]
    ordered = sorted(batches, key=lambda batch: batch["input_ids"].shape[1])
    longest, middle, shortest = ordered[-1], ordered[len(ordered) // 2], ordered[0]
    if len(longest["input_ids"]) == 1:
        longest = {name: value.repeat(2, 1) for name, value in longest.items()}
    row = int(shortest["attention_mask"].sum(1).argmin())
    alone = _trimmed({name: value[row : row + 1] for name, value in shortest.items()})
    length = alone["input_ids"].shape[1]
    if length == longest["input_ids"].shape[1]:
        alone = {name: value[:, : max(1, length // 2)] for name, value in alone.items()}
    half = max(1, len(middle["input_ids"]) // 2)
    return [dict(longest), _trimmed({name: v[:half] for name, v in middle.items()}), alone]


def max_difference(one: Any, other: Any, batches: Sequence[Batch]) -> tuple[float, float]:
    """The largest difference between logits of two models, and the largest logit of the first.

    What is not a number stays so.
    """
    differences, sizes = [], []
    with torch.inference_mode():
        for batch in batches:
            first, second = one(**batch), other(**batch)
            for name in (name for name in first if name.endswith("logits")):
                differences.append((first[name].float() - second[name].float()).abs().max().cpu())
                sizes.append(first[name].float().abs().max().cpu())
    return float(torch.stack(differences).max()), float(torch.stack(sizes).max())


def _trimmed(batch: Batch) -> dict[str, Tensor]:
    """Without the columns in which no row has a token."""
    used = batch["attention_mask"].any(0)
    return {name: value[:, used] for name, value in batch.items()}


def _cleaned(model: Any) -> Any:
    """Take out what the exporter noted on the way.

    Shapes in between are those from before weights were transposed, on which other tools stumble;
    stack traces name folders of this machine.
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
def _quiet_exporter() -> Iterator[None]:
    """Keep back what torch.onnx says about itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # what wraps it says what to do about PyTorch
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200].rstrip(".") if lines else type(error).__name__
