"""Time and memory of pruning as models grow: Llama-shaped decoders of 100M to 1B parameters.

python -m scripts.bench.scale --size 100m 300m 1b --samples 16 --length 128
python -m scripts.bench.scale --size 100m 300m 1b --samples 64 --length 512 --device cuda

Weights and tokens are random, which changes neither. Every size is pruned by a fresh process; its
memory is sampled, stage by stage.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.errors import UserError
from scripts.bench import harness
from scripts.bench.harness import Conditions, machine
from scripts.bench.models import settings_of

SIZES: Mapping[str, Mapping[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "heads": 4},
    "100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14, "heads": 12},
    "300m": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 18, "heads": 16},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "heads": 32},
}
"""A quarter of the heads have keys and values. 1b is Llama 3.2 1B but for its vocabulary."""

VOCABULARY = 32000
SECONDS_BETWEEN = 0.02
"""Between two samples of the memory."""


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    options = _parser().parse_args(argv)
    if options.alone:
        print(json.dumps(_prune(options.size[0], options)))
        return 0
    names = ("device", "dtype", "method", "samples", "length", "batch_size", "constraint")
    shared = harness.conditions_of(options, names)
    output = options.output or harness.default_output(
        "scale", "llama", options.device, options.dtype
    )

    def measure(group: Sequence[Conditions]) -> Iterator[dict[str, Any]]:
        for conditions in group:
            flags = [f"--{name.replace('_', '-')}={value}" for name, value in conditions.items()]
            try:
                found = harness.in_process("scripts.bench.scale", ["--alone", *flags])
            except UserError as error:
                raise UserError(f"{error} Give fewer --samples, or a smaller --size.") from error
            yield conditions | found

    wanted = [one | shared for one in harness.each_combination(size=options.size)]
    here = machine(options.device)
    same = {name: here[name] for name in ("device_name", "threads")}
    return harness.complete(__file__, output, wanted, measure, same=same)


def _parser() -> argparse.ArgumentParser:
    names = "samples length batch-size constraint method device dtype"
    parser = harness.parser_of(
        __doc__, names, samples=16, length=128, batch_size=4, constraint=0.7, device="cpu"
    )
    add = parser.add_argument
    add("--size", nargs="+", choices=SIZES, default=["100m", "300m", "1b"], help="default: all")
    add("--alone", action="store_true", help=argparse.SUPPRESS)
    return parser


def _prune(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Prune one size in this process; seconds and bytes by stage."""
    import torch

    from rfprune.cost.constraint import Constraint
    from rfprune.pruning import prune

    model = make_model(size).to(options.device, getattr(torch, options.dtype))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (options.samples, options.length), generator=generator)
    batches = [{"input_ids": part.to(options.device)} for part in ids.split(options.batch_size)]
    constraint, settings = Constraint("mac", options.constraint), settings_of(method=options.method)
    with sampled_memory(options.device) as peaks:
        start = time.perf_counter()
        result = prune(model, batches, constraint, settings)
        seconds = time.perf_counter() - start
    return {
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "weight_bytes": model.get_memory_footprint(),
        "seconds": {**result.seconds, "wall": seconds},
        "peak_bytes": peaks,
        "achieved": result.achieved,
        "settings": asdict(settings),
        "warnings": list(result.warnings),
    }


def make_model(size: str) -> Any:
    """A decoder with random weights in eval mode."""
    import torch
    import transformers

    shape = dict(SIZES[size])
    heads = shape.pop("heads")
    config = transformers.LlamaConfig(
        **shape,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@contextmanager
def sampled_memory(device: str) -> Iterator[dict[str, int]]:
    """The most bytes in use by stage of pruning, and outside of all stages ("start").

    Of the process on a CPU, of the tensors on a GPU.
    """
    from rfprune.result import StageTimer

    peaks = {"start": _bytes_now(device)}
    stages = ["start"]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SECONDS_BETWEEN):
            stage, now = stages[-1], _bytes_now(device)
            if stage == stages[-1]:  # else the stage has ended while its memory was read
                peaks[stage] = max(peaks.get(stage, 0), now)

    original = StageTimer.stage

    @contextmanager
    def noting_the_stage(self: StageTimer, name: str) -> Iterator[None]:
        stages.append(name)
        try:
            with original(self, name):
                yield
        finally:
            peaks[name] = max(peaks.get(name, 0), _bytes_now(device))
            stages.pop()

    thread = threading.Thread(target=sample, daemon=True)
    StageTimer.stage = noting_the_stage  # type: ignore[method-assign]
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()
        StageTimer.stage = original  # type: ignore[method-assign]


def _bytes_now(device: str) -> int:
    import resource

    import torch

    if device == "cuda":
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(main())
