"""What every export must do: compute what the pruned model computes, and be measured the same way.

Outputs are compared on real inputs of several sizes. Exports that another runtime runs are scored
on the same data as every model, and timed in one run beside the PyTorch models.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rfprune.errors import UserError
from rfprune.latency.speedup import report_budget
from rfprune.latency.timing import Timer, TimingBudget, time_interleaved
from rfprune.result import PruneResult
from rfprune.settings import GGUF_TYPES
from rfprune.tasks.evaluation import Evaluation, EvaluationSet, divergence, evaluate_model

TOLERANCE = 1e-4
"""Largest difference of outputs, relative to the largest output (or to 1, if that is smaller)."""

HALF_PRECISION_EPS = 50
"""In half precision the largest difference is this many times the spacing of numbers at 1."""

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class ExportJob:
    """The models and data that exports are made from and checked against.

    Attributes:
        original: the model before pruning, on any device; it is timed beside the exports.
        batches: calibration inputs, on which outputs are compared.
        reference: the scores of the original, from which divergences are computed.
        stored: the dtype in which PyTorch weights are saved.
        quantize: also write a variant with int8 weights, in formats that have one.
        gguf_types: of the weights in GGUF files, one file each.
        progress: show progress bars.
    """

    original: Any
    result: PruneResult
    tokenizer: Any
    batches: Sequence[Batch]
    evaluation_set: EvaluationSet
    reference: Evaluation
    stored: torch.dtype
    quantize: bool = False
    gguf_types: tuple[str, ...] = GGUF_TYPES[:1]
    progress: bool = False

    @cached_property
    def pruned_on_cpu(self) -> Any:
        """The pruned model as other runtimes run it; see `float32_cpu_copy`."""
        return float32_cpu_copy(self.result.model)


@dataclass(frozen=True)
class Export:
    """One export that was written.

    Attributes:
        path: its file or folder, relative to the output folder.
        num_bytes: size of its weights.
        difference: outcome of `check_outputs`; empty for quantised weights, which differ.
        runtime: the export as a module on the CPU, for scores and times; None if it is a PyTorch
            checkpoint.
    """

    path: str
    num_bytes: int
    difference: Mapping[str, Any] = field(default_factory=dict)
    runtime: nn.Module | None = None

    @property
    def entry(self) -> dict[str, Any]:
        """What report.json says about it, without scores and times."""
        return {"path": self.path, "bytes": self.num_bytes, **self.difference}


def float32_cpu_copy(model: Any) -> Any:
    """A copy on the CPU in float32, for inference, without a cache of keys and values."""
    plain = copy.deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(False)
    for module in plain.modules():  # an encoder-decoder's decoder has a config of its own
        if getattr(getattr(module, "config", None), "use_cache", False):
            module.config.use_cache = False
    return plain


def check_outputs(
    name: str,
    pruned: Any,
    exported: nn.Module,
    batches: Sequence[Batch],
    stored: torch.dtype | None = None,
) -> dict[str, Any]:
    """Compare an export's logits, or hidden states, with the pruned model's on several inputs.

    Args:
        stored: dtype of the export's weights, if it is not the pruned model's.

    Returns:
        "max_difference", and "checked_on": the shapes of the inputs.

    Raises:
        UserError: the difference is larger than rounding explains.
    """
    parameter = next(pruned.parameters())
    inputs = [
        {key: value.to(parameter.device) for key, value in model_inputs(pruned, batch).items()}
        for batch in varied_inputs(batches)
    ]
    difference, largest = max_difference(pruned, exported, inputs)
    tolerance = max(TOLERANCE, HALF_PRECISION_EPS * torch.finfo(stored or parameter.dtype).eps)
    limit = tolerance * max(1.0, largest)
    if not difference <= limit:
        raise UserError(
            f"the {name} export differs from the pruned model by up to {difference:.2g} on "
            f"calibration inputs, and at most {limit:.2g} is rounding: leave {name} out of --export"
        )
    shapes = [list(next(iter(batch.values())).shape) for batch in inputs]
    return {"max_difference": difference, "checked_on": shapes}


def model_inputs(model: Any, batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch that the model takes, on the CPU (DistilBERT has no token types)."""
    known = signature(model.forward).parameters
    return {
        name: batch[name].cpu()
        for name in ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
        if name in batch and name in known
    }


def compared_outputs(outputs: Mapping[str, Any]) -> list[str]:
    """Names of the outputs that an export has: logits, or the hidden states of an embedder."""
    logits = [name for name in outputs if name.endswith("logits")]
    return logits or ["last_hidden_state"]


class RuntimeModel(nn.Module):
    """An exported file in its runtime, called like the PyTorch model it was made from.

    Runtimes use as many threads of the CPU as PyTorch does, and compute no gradients.

    Args:
        run: computes the outputs, in the order of `output_names`, from arrays by input name.
        config: of the PyTorch model.
    """

    def __init__(
        self,
        run: Callable[[dict[str, NDArray[Any]]], Iterable[NDArray[Any]]],
        input_names: Sequence[str],
        output_names: Sequence[str],
        config: Any = None,
    ) -> None:
        super().__init__()
        self.run = run
        self.input_names, self.output_names = list(input_names), list(output_names)
        self.config = config
        # Callers take the device of a model from its parameters.
        self.device_parameter = nn.Parameter(torch.zeros(0), requires_grad=False)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Outputs by name; inputs that the file does not have are ignored."""
        outputs = self.run({name: inputs[name].numpy() for name in self.input_names})
        return {
            name: torch.from_numpy(output)
            for name, output in zip(self.output_names, outputs, strict=True)
        }


def varied_inputs(batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """Three real inputs of different batch sizes and lengths, with padding if the data has any.

    Texts: the longest batch, half of a batch of middle length, and the shortest example. Images
    have one size: a whole batch, half of it, and one image.
    """
    if "input_ids" not in batches[0]:
        first, sizes = batches[0], (None, max(1, len(next(iter(batches[0].values()))) // 2), 1)
        return [{name: value[:size] for name, value in first.items()} for size in sizes]
    ordered = sorted(batches, key=lambda batch: batch["input_ids"].shape[1])
    longest, middle, shortest = ordered[-1], ordered[len(ordered) // 2], ordered[0]
    if len(longest["input_ids"]) == 1:
        longest = {name: value.repeat(2, 1) for name, value in longest.items()}
    row = int(shortest["attention_mask"].sum(1).argmin())
    example = _without_padding({name: value[row : row + 1] for name, value in shortest.items()})
    length = example["input_ids"].shape[1]
    if length == longest["input_ids"].shape[1]:
        example = {name: value[:, : max(1, length // 2)] for name, value in example.items()}
    half = max(1, len(middle["input_ids"]) // 2)
    half_batch = _without_padding({name: value[:half] for name, value in middle.items()})
    return [dict(longest), half_batch, example]


def _without_padding(batch: Batch) -> dict[str, Tensor]:
    """Without the columns in which no row has a token."""
    used = batch["attention_mask"].any(0)
    return {name: value[:, used] for name, value in batch.items()}


def max_difference(one: Any, other: Any, batches: Sequence[Batch]) -> tuple[float, float]:
    """The largest difference between outputs of two models, and the first's largest output.

    Both are NaN if an output is NaN.
    """
    differences, sizes = [], []
    with torch.inference_mode():
        for batch in batches:
            first, second = one(**batch), other(**batch)
            for name in compared_outputs(first):
                differences.append((first[name].float() - second[name].float()).abs().max().cpu())
                sizes.append(first[name].float().abs().max().cpu())
    return float(torch.stack(differences).max()), float(torch.stack(sizes).max())


def evaluate_export(runtime: nn.Module, job: ExportJob) -> dict[str, Any]:
    """Scores and divergence from the original, by the evaluation of every other model."""
    data = job.evaluation_set
    evaluation = evaluate_model(runtime, data, reference=job.original, progress=job.progress)
    return {
        "score": evaluation.score,
        "scores": dict(evaluation.scores),
        "divergence": divergence(job.reference, evaluation),
    }


def time_on_cpu(
    models: Mapping[str, nn.Module],
    batch: Batch,
    *,
    budget: TimingBudget | None = None,
    timer: Timer = time.perf_counter,
) -> tuple[dict[str, float], dict[str, int]]:
    """Time forward passes of several models in turn.

    Returns:
        Median milliseconds by model, and the conditions: batch size, length, rounds, threads.
    """
    inputs = model_inputs(next(iter(models.values())), batch)
    with torch.inference_mode():
        timings = time_interleaved(
            [partial(model.eval(), **inputs) for model in models.values()],
            "cpu",
            budget or report_budget(),
            timer=timer,
        )
    shape = next(iter(inputs.values())).shape
    conditions = {"batch_size": shape[0], "sequence_length": shape[-1]}
    conditions |= {"rounds": timings[0].rounds, "threads": torch.get_num_threads()}
    return {
        name: timing.median_ms for name, timing in zip(models, timings, strict=True)
    }, conditions


def file_bytes(folder: Path, pattern: str) -> int:
    """Total size of the files that match a pattern."""
    return sum(path.stat().st_size for path in folder.glob(pattern))
