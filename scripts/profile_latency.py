"""Measure a latency table on this machine: milliseconds of a model by the sizes of its sublayers.

python scripts/profile_latency.py --model outputs/... --batch-size 32 --sequence-length 128 \\
    --output table.json

It holds for this model, device, dtype, batch size, sequence length and attention implementation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rfprune.cli.exit_codes import NOTHING_WRITTEN, script
from rfprune.cli.validation import check_new_file
from rfprune.errors import UserError, error_summary
from rfprune.settings import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

    from rfprune.latency.table import LatencyCurve, LatencyTable
    from rfprune.model.layout import Layout

SYNTHETIC: Mapping[str, Mapping[str, int]] = {
    "bert-base": {},
    "minilm": {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536},
}
"""Arguments of `transformers.BertConfig`, whose defaults are BERT-base."""

SHOWN = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Fractions of all units that are shown."""


@script(NOTHING_WRITTEN)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    options = _parser().parse_args(argv)
    _check(options)
    table, layout = _measure(options)
    table.save(options.output)
    _print(table, layout, options.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="a folder, hub id, alias, or demo")
    model.add_argument("--synthetic", choices=SYNTHETIC, help="random weights of this shape")
    add = parser.add_argument
    add("--batch-size", type=int, default=32, metavar="N", help="examples (default: 32)")
    add("--sequence-length", type=int, default=128, metavar="N", help="tokens (default: 128)")
    add("--device", help="cpu, cuda or mps (default: the fastest available)")
    add("--dtype", choices=DTYPES, default="float32", help="default: float32")
    add("--round-to", type=int, metavar="N", help="keep neurons in multiples (default: up to 32)")
    add("--seconds", type=float, default=120.0, metavar="S", help="about, at most (default: 120)")
    add("--output", type=Path, required=True, metavar="FILE.json", help="a new file")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Check the flags before torch is imported."""
    for flag in ("batch_size", "sequence_length", "round_to"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value}: give 1 or more.")
    check_new_file("--output", options.output)


def _measure(options: argparse.Namespace) -> tuple[LatencyTable, Layout]:
    import torch

    from rfprune.checkpoints.device import pick_device
    from rfprune.latency.profile import BUDGET, profile_latency
    from rfprune.model.layout import layout_of

    device = pick_device(options.device)
    model = load_model(options.model, options.synthetic, getattr(torch, options.dtype)).to(device)
    layout = layout_of(model)
    batch = _batch(model, options)
    try:
        table = profile_latency(
            model,
            layout,
            batch,
            round_to=options.round_to,
            budget=replace(BUDGET, seconds=options.seconds),
            progress=sys.stderr.isatty(),
        )
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            f"--batch-size {options.batch_size} does not fit into the memory of this GPU: give a "
            f"smaller one"
        ) from error
    return table, layout


def load_model(name: str | None, synthetic: str | None, dtype: Any) -> Any:
    """A model in eval mode, with any head.

    Args:
        name: of a checkpoint: a folder, dense or pruned, a hub id, an alias, or demo.
        synthetic: or of one of `SYNTHETIC`, with random weights.

    Raises:
        UserError: there is no such checkpoint, or it cannot be loaded.
    """
    import torch
    import transformers

    if synthetic is not None:
        torch.manual_seed(0)
        config = transformers.BertConfig(**SYNTHETIC[synthetic])
        return transformers.BertForSequenceClassification(config).to(dtype).eval()
    from rfprune.checkpoints.inspection import read_config
    from rfprune.checkpoints.loading import quiet_transformers, resolve_model
    from rfprune.model.checkpoint import load_pruned
    from rfprune.tasks.registry import get_task

    # an alias has the same shapes for every task
    source = resolve_model(name or "", get_task("sst2"))
    with quiet_transformers():
        try:
            config = read_config(source)
            if "rfprune" in config:
                return load_pruned(source, dtype=dtype).eval()
            architecture = (config.get("architectures") or ["AutoModel"])[0]
            model_class = getattr(transformers, architecture, transformers.AutoModel)
            return model_class.from_pretrained(source, dtype=dtype).eval()
        except UserError:
            raise
        except Exception as error:  # each configuration fails in its own way
            raise UserError(
                f"The checkpoint '{source}' cannot be loaded ({error_summary(error)}): give a "
                f"folder, or a hub id if there is a connection."
            ) from error


def _batch(model: Any, options: argparse.Namespace) -> dict[str, Tensor]:
    """A batch without padding; the tokens do not change the time.

    Raises:
        UserError: the model has fewer positions.
    """
    import torch

    from rfprune.checkpoints.loading import LoadedCheckpoint, resolve_max_length
    from rfprune.tasks.registry import get_task

    if model.main_input_name == "pixel_values":
        size = (model.config.num_channels, model.config.image_size, model.config.image_size)
        return {"pixel_values": torch.randn(options.batch_size, *size).to(model.dtype)}
    source = options.model or options.synthetic
    try:
        resolve_max_length(
            LoadedCheckpoint(model, None, source), get_task("sst2"), options.sequence_length
        )
    except UserError as error:
        raise UserError(str(error).replace("--max-length", "--sequence-length")) from error
    shape = (options.batch_size, options.sequence_length)
    ids = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _print(table: LatencyTable, layout: Layout, path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from rfprune.cost.macs import mac_costs
    from rfprune.latency.table import latency_costs

    console = Console(highlight=False)
    own = table.conditions
    shown = Table(
        "units kept",
        *(f"{curve.kind}s, ms" for curve in table.curves),
        "model, ms",
        "latency",
        "MACs",
        title=(
            f"{own.device_name}, {own.dtype}, {own.batch_size} x {own.sequence_length} tokens, "
            f"{own.attention} attention, {own.threads} threads"
        ),
    )
    costs, macs = latency_costs(table, layout), mac_costs(layout, own.sequence_length)
    for fraction in SHOWN:
        kept = [
            _allowed(table.curve_of(block, layout.hidden_size), block.num_units, fraction)
            for block in layout.blocks
        ]
        sizes = [_allowed(curve, curve.num_units, fraction) for curve in table.curves]
        times = [
            f"{curve.costs(curve.num_units)[size]:.2f} ({size})"
            for curve, size in zip(table.curves, sizes, strict=True)
        ]
        total = costs.total(kept)
        shown.add_row(
            f"{fraction:.0%}",
            *times,
            f"{total:.1f}",
            f"{total / costs.original:.3f}",
            f"{macs.total(kept) / macs.original:.3f}",
        )
    console.print(shown)
    console.print(
        f"{table.rounds} rounds; spread of the whole model's time {table.total_spread:.1%}. Timed "
        f"alone, sublayers take {1 / table.scale if table.scale else 0:.2f} of their time in it."
    )
    console.print(f"Written to {path}")


def _allowed(curve: LatencyCurve, num_units: int, fraction: float) -> int:
    """About that fraction of the units, in allowed multiples."""
    if fraction == 1:
        return num_units
    return min(num_units, round(fraction * num_units / curve.round_to) * curve.round_to)


if __name__ == "__main__":
    sys.exit(main())
