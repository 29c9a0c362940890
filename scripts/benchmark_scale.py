"""How time and memory of pruning grow with the model: llama-shaped decoders of 100M to 1B.

python scripts/benchmark_scale.py --size 100m 300m 1b --samples 16 --length 128
python scripts/benchmark_scale.py --size 100m 300m 1b --samples 256 --length 512 --device cuda

Weights and tokens are random, which changes neither. Every size is pruned by a process of its own,
whose memory is watched stage by stage. It goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import one another

from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.errors import UserError
from rfprune.settings import METHODS
from scripts.bench import say
from scripts.sweep import append_line, read_lines

SIZES: Mapping[str, Mapping[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "heads": 4},
    "100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14, "heads": 12},
    "300m": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 18, "heads": 16},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "heads": 32},
}
"""Key and value heads are a quarter of the heads. 1b is Llama 3.2 1B but for its vocabulary."""

VOCABULARY = 32000
DTYPES = ("float32", "bfloat16")
KEY = ("size", "device", "dtype", "method", "samples", "length", "batch_size", "constraint")
SECONDS_BETWEEN = 0.02
"""How often memory is looked at."""


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130 stopped."""
    options = _parser().parse_args(argv)
    if options.alone:
        print(json.dumps(_prune(options.size[0], options)))
        return 0
    _complete(options, options.output or _default_output(options))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--size", nargs="+", choices=SIZES, default=["100m", "300m", "1b"], help="default: all")
    add("--samples", type=int, default=16, help="calibration examples (default: 16)")
    add("--length", type=int, default=128, help="their tokens (default: 128)")
    add("--batch-size", type=int, default=4, help="default: 4")
    add("--constraint", type=float, default=0.7, help="fraction of MACs to keep (default: 0.7)")
    add("--method", choices=METHODS, default=METHODS[0], help=f"default: {METHODS[0]}")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--dtype", choices=DTYPES, default="float32", help="default: float32")
    add("--output", type=Path, metavar="FILE", help="default: in results, named after the device")
    add("--alone", action="store_true", help=argparse.SUPPRESS)
    return parser


def _default_output(options: argparse.Namespace) -> Path:
    results = Path(__file__).resolve().parents[1] / "results"
    return results / f"scale_llama_{options.device}_{options.dtype}.jsonl"


def _complete(options: argparse.Namespace, output: Path) -> None:
    """Measure what the output does not hold yet, a process each."""
    from rfprune.cost.constraint import Constraint

    Constraint("mac", options.constraint)
    measured = {tuple(line[name] for name in KEY) for line in read_lines(output)}
    append_line(output, None)
    for size in dict.fromkeys(options.size):
        conditions = {name: getattr(options, name) for name in KEY} | {"size": size}
        if tuple(conditions.values()) in measured:
            continue
        say(f"pruning {size}")
        line = conditions | _in_process(size, options)
        append_line(output, line)
        say(_in_words(line))


def _in_process(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a fresh process says of one size.

    Raises:
        UserError: it failed, for want of memory more likely than not.
    """
    flags = ["--samples", "--length", "--batch-size", "--constraint", "--method", "--device"]
    command = [sys.executable, __file__, "--alone", "--size", size, "--dtype", options.dtype]
    for flag in flags:
        command += [flag, str(getattr(options, flag.removeprefix("--").replace("-", "_")))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it was killed: out of memory?"])[-1]
        raise UserError(f"Pruning {size} failed ({last[:200]}): give fewer --samples, or less.")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _prune(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Prune one size here, and say what it took."""
    import torch

    from rfprune.cost.constraint import Constraint
    from rfprune.pruning import prune
    from rfprune.settings import Settings
    from scripts.speedup_timing import machine

    model = make_model(size).to(options.device, getattr(torch, options.dtype))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (options.samples, options.length), generator=generator)
    batches = [{"input_ids": part.to(options.device)} for part in ids.split(options.batch_size)]
    weights = model.get_memory_footprint()
    with watched_memory(options.device) as peaks:
        start = time.perf_counter()
        result = prune(
            model,
            batches,
            Constraint("mac", options.constraint),
            Settings(method=options.method, round_to=None),
        )
        seconds = time.perf_counter() - start
    return {
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "weight_bytes": weights,
        "seconds": {**result.seconds, "wall": seconds},
        "peak_bytes": peaks,
        "achieved": result.achieved,
        "warnings": list(result.warnings),
        **machine(options.device),
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
def watched_memory(device: str) -> Iterator[dict[str, int]]:
    """The most bytes in use by stage of the pruning, and outside of all stages ("start").

    Of the process on a CPU, of the tensors on a GPU.
    """
    from rfprune.result import StageTimer

    peaks = {"start": _bytes_now(device)}
    stages = ["start"]
    done = threading.Event()

    def look() -> None:
        while not done.wait(SECONDS_BETWEEN):
            stage, now = stages[-1], _bytes_now(device)
            if stage == stages[-1]:  # else the stage has ended while its memory was looked at
                peaks[stage] = max(peaks.get(stage, 0), now)

    own = StageTimer.stage

    @contextmanager
    def watched(self: StageTimer, name: str) -> Iterator[None]:
        stages.append(name)
        try:
            with own(self, name):
                yield
        finally:
            peaks[name] = max(peaks.get(name, 0), _bytes_now(device))
            stages.pop()

    watcher = threading.Thread(target=look, daemon=True)
    StageTimer.stage = watched  # type: ignore[method-assign]
    watcher.start()
    try:
        yield peaks
    finally:
        done.set()
        watcher.join()
        StageTimer.stage = own  # type: ignore[method-assign]


def _bytes_now(device: str) -> int:
    import resource

    import torch

    if device == "cuda":
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def _in_words(line: Mapping[str, Any]) -> str:
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in line["seconds"].items())
    peak = max(line["peak_bytes"].values())
    return (
        f"{line['size']}: {line['params'] / 1e6:.0f} M parameters, peak {peak / 1e9:.2f} GB "
        f"({peak / line['weight_bytes']:.1f} times its weights), seconds: {seconds}"
    )


if __name__ == "__main__":
    sys.exit(main())
