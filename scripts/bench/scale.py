"""Time and memory of pruning as models grow: Llama-shaped decoders of 100M to 8B parameters.

python -m scripts.bench.scale --size 100m 300m 1b --offload none disk --samples 16 --length 128
python -m scripts.bench.scale --size 3b --offload disk --samples 4 --length 128
python -m scripts.bench.scale --size 100m 300m 1b --samples 64 --length 512 --device cuda

Weights and tokens are random, which changes neither. Every size is pruned and saved by a fresh
process; its memory is sampled, stage by stage. With --offload the layers are loaded one by one from
a checkpoint, which is written before and removed afterwards.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.errors import UserError
from rfprune.settings import OFFLOADS
from scripts.bench import harness
from scripts.bench.harness import Conditions, machine
from scripts.bench.models import settings_of

SIZES: Mapping[str, Mapping[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "heads": 4},
    "100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14, "heads": 12},
    "300m": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 18, "heads": 16},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "heads": 32},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "heads": 24},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "heads": 32},
}
"""A quarter of the heads have keys and values. 1b, 3b and 8b are Llama 3 but for the vocabulary."""

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
        "scale", "llama", options.device, options.dtype, "offload"
    )

    def measure(group: Sequence[Conditions]) -> Iterator[dict[str, Any]]:
        for conditions in group:
            flags = [f"--{name.replace('_', '-')}={value}" for name, value in conditions.items()]
            with tempfile.TemporaryDirectory(prefix="rfprune-scale-") as folder:
                if conditions["offload"] != "none":
                    write_checkpoint(conditions["size"], Path(folder) / "model", options.dtype)
                flags += ["--folder", folder]
                try:
                    found = harness.in_process("scripts.bench.scale", ["--alone", *flags])
                except UserError as error:
                    raise UserError(
                        f"{error} Give fewer --samples, or a smaller --size."
                    ) from error
            yield conditions | found

    sizes = harness.each_combination(size=options.size, offload=options.offload)
    wanted = [one | shared for one in sizes]
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
    offloads = ("none", *OFFLOADS)
    add("--offload", nargs="+", choices=offloads, default=["none"], help="default: none")
    add("--alone", action="store_true", help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def _prune(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Prune one size in this process and save it; seconds and bytes by stage."""
    import torch

    from rfprune.cost.constraint import Constraint
    from rfprune.cost.memory import total_bytes
    from rfprune.cost.params import total_params
    from rfprune.methods.memory_plan import peak_resident_bytes
    from rfprune.pruning import prune

    model = _model(size, options)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (options.samples, options.length), generator=generator)
    batches = [{"input_ids": part.to(options.device)} for part in ids.split(options.batch_size)]
    constraint, settings = Constraint("mac", options.constraint), settings_of(method=options.method)
    with sampled_memory(options.device) as peaks:
        start = time.perf_counter()
        result = prune(model, batches, constraint, settings)
        pruned = time.perf_counter()
        result.save(options.folder / "smaller")
        peaks["save"] = _bytes_now(options.device)
        seconds = time.perf_counter() - start
    return {
        "params": total_params(model),
        "weight_bytes": total_bytes(model),
        "seconds": {**result.seconds, "save": seconds - (pruned - start), "wall": seconds},
        "peak_bytes": peaks,
        "peak_resident_bytes": peak_resident_bytes(),
        "achieved": result.achieved,
        "settings": asdict(settings),
        "warnings": list(result.warnings),
    }


def _model(size: str, options: argparse.Namespace) -> Any:
    """A decoder in memory, or one with its layers in the files of `write_checkpoint`."""
    import torch
    import transformers

    from rfprune.checkpoints.offload import layers_elsewhere, without_weights

    dtype, (offload,) = getattr(torch, options.dtype), options.offload
    if offload == "none":
        return make_model(size).to(options.device, dtype)
    layout = without_weights(transformers.AutoModelForCausalLM, config_of(size))
    return transformers.LlamaForCausalLM.from_pretrained(
        options.folder / "model",
        dtype=dtype,
        device_map=layers_elsewhere(layout, torch.device(options.device), offload),
    ).eval()


def config_of(size: str) -> Any:
    """The configuration of a size."""
    import transformers

    shape = dict(SIZES[size])
    heads = shape.pop("heads")
    return transformers.LlamaConfig(
        **shape,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        use_cache=False,
    )


def make_model(size: str) -> Any:
    """A decoder with random weights in eval mode."""
    import torch
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config_of(size)).eval()


def write_checkpoint(size: str, folder: Path, dtype: str) -> None:
    """Write random weights of a size, one file a layer: no more of them are ever in memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from rfprune.checkpoints.offload import without_weights

    config = config_of(size)
    config.dtype = dtype
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, dict[str, Any]] = {}
    for name, weight in without_weights(AutoModelForCausalLM, config).named_parameters():
        part = "-".join(name.split(".")[1:3])
        files.setdefault(f"model-{part}.safetensors", {})[name] = weight
    places, total = {}, 0
    for file, weights in files.items():
        made = {}
        for name, weight in weights.items():
            value = torch.ones(weight.shape)
            if value.dim() > 1:
                value.normal_(0, config.initializer_range, generator=generator)
            made[name] = value.to(getattr(torch, dtype))
            places[name] = file
            total += made[name].nbytes
        save_file(made, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


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
    import torch

    if device == "cuda":
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(main())
