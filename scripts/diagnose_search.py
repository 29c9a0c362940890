"""Why a searched model can collapse: what the additive objective misses, block by block.

The search of Kwon et al. 2022 adds up the importance of single units (the diagonal of the Fisher
information). Units that act alike cost more together than one by one: for every block this prints
the sum over its pruned units, and their joint error by the block's whole Fisher information.

python scripts/diagnose_search.py --model ... --task mrpc --constraint 0.5 --output results/...
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rfprune.errors import UserError
from rfprune.tasks.registry import TASKS, get_task


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process); 0 done, 2 user error."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="a folder, hub id, alias, or demo")
    parser.add_argument("--task", required=True, help=", ".join(TASKS))
    parser.add_argument("--data-dir", type=Path, help="local data, DIR/TASK/...; else the hub")
    parser.add_argument("--constraint", type=float, default=0.5, help="of MACs (default: 0.5)")
    parser.add_argument("--samples", type=int, default=256, help="to calibrate on (default: 256)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    options = parser.parse_args(argv)
    try:
        result = diagnose(options)
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except (UserError, OSError) as error:
        sys.stderr.write(f"diagnose_search: error: {error}\n")
        return 2
    show(result)
    return 0


def diagnose(options: argparse.Namespace) -> dict[str, Any]:
    """Search one model; predicted errors in nats an example, times two, of every block."""
    import torch

    from rfprune.checkpoints.loading import load, resolve_data_dir
    from rfprune.cost.constraint import Constraint
    from rfprune.cost.macs import mac_costs
    from rfprune.model.batch import mean_tokens
    from rfprune.model.frozen import frozen
    from rfprune.model.layout import layout_of
    from rfprune.stages.calibration import Calibration
    from rfprune.stages.fisher import block_fisher, collect_gradients, diagonal_fisher
    from rfprune.stages.rearrange import quadratic_form
    from rfprune.stages.search import search
    from rfprune.tasks.calibration import calibration_batches

    task = get_task(options.task)
    loaded = load(options.model, task, device=torch.device("cpu"), dtype=torch.float32)
    batches = calibration_batches(
        task,
        loaded.tokenizer,
        resolve_data_dir(options.model, options.data_dir),
        num_samples=options.samples,
        batch_size=32,
        max_length=None,
        seed=options.seed,
        with_labels=False,
    )
    layout = layout_of(loaded.model)
    with frozen(loaded.model):
        gradients = collect_gradients(Calibration(loaded.model, layout, batches))
    importance = diagonal_fisher(gradients)
    costs = mac_costs(layout, mean_tokens(batches))
    masks = search(layout, importance, costs, costs.budget(Constraint("mac", options.constraint)))
    examples = sum(len(batch["input_ids"]) for batch in batches)
    blocks = [
        {
            "block": block.name,
            "kept": int(mask.sum()),
            "of": block.num_units,
            "one_by_one": float(own[mask == 0].sum()) / examples,
            "together": quadratic_form(mask, block_fisher(gradient)) / examples,
        }
        for block, mask, own, gradient in zip(
            layout.blocks, masks, importance, gradients, strict=True
        )
    ]
    pruned = [
        gradient[:, mask == 0].double().sum(1)
        for gradient, mask in zip(gradients, masks, strict=True)
    ]
    whole = torch.stack(pruned).sum(0).square().sum()
    return {
        "model": Path(loaded.source).name,
        "task": options.task,
        "constraint": options.constraint,
        "samples": examples,
        "seed": options.seed,
        "blocks": blocks,
        "one_by_one": sum(block["one_by_one"] for block in blocks),
        "blocks_together": sum(block["together"] for block in blocks),
        "all_together": float(whole) / examples,
    }


def show(result: dict[str, Any]) -> None:
    """The blocks as a table on screen."""
    print(f"{'block':<18}{'kept':>12}{'one by one':>12}{'together':>12}")
    for block in result["blocks"]:
        kept = f"{block['kept']} of {block['of']}"
        print(
            f"{block['block']:<18}{kept:>12}{block['one_by_one']:>12.4f}{block['together']:>12.4f}"
        )
    print(
        f"in all: {result['one_by_one']:.4f} one by one, {result['blocks_together']:.4f} with each "
        f"block's own correlations, {result['all_together']:.4f} all together"
    )


if __name__ == "__main__":
    sys.exit(main())
