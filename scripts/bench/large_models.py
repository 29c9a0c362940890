"""Memory and time of pruning Llama 3 8B and 70B on 80 GB cards, on paper.

python -m scripts.bench.large_models --output results/plan_llama.jsonl

Memory is that of `rfprune.methods.memory_plan`. Seconds are multiply-adds of each stage over the
rate of the largest measured model of the same machine (`scripts.bench.scale`). The same arithmetic
is checked against every measured row. Nothing is run, so lines of an earlier plan are replaced.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.errors import UserError
from scripts.bench import harness, scale
from scripts.bench.harness import Conditions, Line

MODELS: Mapping[str, Mapping[str, int]] = {
    "Llama 3 8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "Llama 3 70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
}
CARDS = (1, 8)
SAMPLES, LENGTH, BATCH_SIZE, KEPT = 1024, 128, 4, 0.7
PROCESS_BYTES = 10**9
"""Of Python and the libraries, in a process that computes on the CPU, as `--max-memory` counts."""

READS = 4
"""How often all layers are loaded: forward and backward, and to fit the student to the original."""

STAGES = ("collect", "search", "tune")
RIDGES = 4
"""Ridge strengths that a fit compares; it is then repeated on all tokens."""


@dataclass(frozen=True)
class Work:
    """Multiply-adds of a stage.

    Attributes:
        shared: those that several processes divide among them.
        repeated: those that every process makes.
    """

    shared: float
    repeated: float = 0.0

    @property
    def total(self) -> float:
        """Those of a single process."""
        return self.shared + self.repeated


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=harness.RESULTS, metavar="DIR")
    parser.add_argument("--output", type=Path, default=harness.default_output("plan", "llama"))
    options = parser.parse_args(argv)
    measured = [
        line
        for path in sorted(options.results.glob("scale_*.jsonl"))
        for line in harness.read_lines(path)
    ]
    gpu = [line for line in measured if line["device"] == "cuda"]
    if not gpu:
        raise UserError(
            f"'{options.results}' has no line of scale_*.jsonl that was measured on a GPU: run "
            f"scripts.bench.scale on one, or give --results another folder"
        )
    plans: list[Conditions] = [
        {"what": "plan", "model": model, "cards": cards, "offload": "cpu"}
        for model in MODELS
        for cards in CARDS
    ]
    checks: list[Conditions] = [
        {"what": "check", "model": line["size"], "cards": number, "offload": line.get("offload")}
        for number, line in enumerate(measured)
    ]
    options.output.unlink(missing_ok=True)

    def make(group: Sequence[Conditions]) -> Iterator[dict[str, Any]]:
        for one in group:
            if one["what"] == "plan":
                yield {**one, **plan(one["model"], one["cards"], largest(gpu))}
            else:
                yield {**one, **check(measured[one["cards"]], measured), "cards": 1}

    return harness.complete(__file__, options.output, [*plans, *checks], make)


def plan(name: str, cards: int, reference: Line) -> dict[str, Any]:
    """Bytes and seconds of pruning a model on cards like that of a measured line."""
    import torch

    from rfprune.methods.memory_plan import Load, plan_memory

    model = _shapes(
        MODELS[name],
        num_attention_heads=MODELS[name]["hidden_size"] // 128,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    load = Load(SAMPLES // cards, BATCH_SIZE, LENGTH)
    where = torch.device("cuda")
    parts = dict(
        plan_memory(model, torch.bfloat16, load, where, process_bytes=0, offloaded=True).parts
    )
    # Each process keeps the statistics of one of as many layers, which run under autograd together.
    parts["layers"] = max(parts["layers"], cards * parts["layers"] // 2)
    parts["a batch"] *= cards
    states, sums = _states_and_sums(model)
    own, of_reference = work(model, SAMPLES * LENGTH, KEPT), _work_of_line(reference)
    rates = {stage: of_reference[stage].total / reference["seconds"][stage] for stage in STAGES}
    return {
        "samples": SAMPLES,
        "length": LENGTH,
        "batch_size": BATCH_SIZE,
        "constraint": KEPT,
        "dtype": "bfloat16",
        "device_name": reference["device_name"],
        "params": _params(model),
        "bytes": {part: size for part, size in parts.items() if size},
        "bytes_loaded": READS * torch.bfloat16.itemsize * _params(model),
        "bytes_of_states": min(states, sums) + (sums if states > sums else 0),
        "multiply_adds": {stage: own[stage].total for stage in STAGES},
        "rates": rates,
        "predicted_seconds": {
            stage: (own[stage].shared / cards + own[stage].repeated) / rates[stage]
            for stage in STAGES
        },
        "reference": f"{reference['params'] / 1e6:,.0f} M parameters, {reference['dtype']}",
    }


def check(line: Line, measured: Sequence[Line]) -> dict[str, Any]:
    """What the same arithmetic gives for a measured line, beside what was measured."""
    import torch

    from rfprune.methods.memory_plan import Load, plan_memory

    names = ("device", "dtype", "samples", "length", "offload")
    same = [one for one in measured if all(one.get(n) == line.get(n) for n in names)]
    reference = largest(same)
    own, of_reference = _work_of_line(line), _work_of_line(reference)
    on_cpu = line["device"] == "cpu"
    total = plan_memory(
        _shapes_of_line(line),
        getattr(torch, line["dtype"]),
        Load(line["samples"], line["batch_size"], line["length"]),
        torch.device(line["device"]),
        process_bytes=PROCESS_BYTES if on_cpu else 0,
        offloaded=line.get("offload", "none") != "none",
    ).total
    shown = (*names, "params", "device_name", "threads", "batch_size", "constraint")
    return {
        **{name: line[name] for name in shown if name in line},
        "bytes": total,
        "measured_bytes": max(*line["peak_bytes"].values(), line.get("peak_resident_bytes") or 0),
        "is_reference": line is reference,
        "predicted_seconds": {
            stage: reference["seconds"][stage] * own[stage].total / of_reference[stage].total
            for stage in STAGES
        },
        "measured_seconds": {stage: line["seconds"][stage] for stage in STAGES},
    }


def work(model: Any, tokens: int, kept: float) -> dict[str, Work]:
    """Multiply-adds of the stages that take most of the time.

    Args:
        model: without weights.
        tokens: of all calibration batches.
        kept: fraction of the units that stay.
    """
    from rfprune.model.layout import layout_of

    layout, d = layout_of(model), model.config.hidden_size
    weights = sum(
        weight.numel()
        for path in layout.layers
        for weight in model.get_submodule(path).parameters()
    )
    head = model.config.vocab_size * d
    collect = tokens * (3 * weights + 2 * head)  # forward; forward again and backward
    forward = tokens * (1 + 2 * kept) * weights  # teacher once, student twice
    search = solves = 0.0
    for block in layout.blocks:
        p = block.num_units * block.unit_width
        collect += tokens * (p**2 + d**2)
        search += 2 / 3 * p**3 + p**2 * d / 2  # factor and inverse p³/2, removals p³/6
        k = kept * p
        forward += tokens * (k**2 + k * d + 2 * d**2)  # moments of the fit and of the alignment
        solves += (RIDGES + 1) * (k**3 / 6 + k**2 * d) + (RIDGES + 2) * k**2 * d
        solves += RIDGES * (d**3 / 6 + d**3) + (RIDGES + 1) * d**3
    return {"collect": Work(collect), "search": Work(search), "tune": Work(forward, solves)}


def _states_and_sums(model: Any) -> tuple[int, int]:
    """Bytes of the hidden states that a collection keeps, and of the sums of all blocks. If the
    states take more, they are collected in chunks, between which the sums are kept as well."""
    from rfprune.model.layout import layout_of

    layout, d = layout_of(model), model.config.hidden_size
    states = (len(layout.layers) + 2) * SAMPLES * LENGTH * d * 2
    return states, 4 * sum((b.num_units * b.unit_width) ** 2 + d**2 for b in layout.blocks)


def largest(lines: Sequence[Line]) -> Line:
    """The line of the largest model, which rates are taken from."""
    return max(lines, key=lambda line: line["params"])


def _work_of_line(line: Line) -> dict[str, Work]:
    tokens = line["samples"] * line["length"]
    return work(_shapes_of_line(line), tokens, line["constraint"])


def _shapes_of_line(line: Line) -> Any:
    from transformers import AutoModelForCausalLM

    from rfprune.checkpoints.offload import without_weights

    return without_weights(AutoModelForCausalLM, scale.config_of(line["size"]))


def _shapes(sizes: Mapping[str, int], **more: int) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    from rfprune.checkpoints.offload import without_weights

    return without_weights(AutoModelForCausalLM, LlamaConfig(**sizes, **more))


def _params(model: Any) -> int:
    from rfprune.cost.params import total_params

    return total_params(model)


if __name__ == "__main__":
    sys.exit(main())
