"""The ablation table that papers print: importance x allocation x rounds, pruned and refitted.

python scripts/ablate.py --model CHECKPOINT --task sst2 --data-dir data --constraint 0.5 0.3

Measures what `results/ablation_MODEL_TASK_METRIC_Nsamples.jsonl` does not hold yet, a line each,
and prints the table of what it holds. Of several seeds the first is for all criteria, and the
others for random importance alone. `scripts/ablation_table.py` puts the tables of all files into
the README.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import one another

from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.settings import ALLOCATIONS, CRITERIA
from scripts.ablation_table import SELECT, full_table
from scripts.bench import Conditions, Variants
from scripts.summarise import cells_of
from scripts.sweep import complete, default_output, measurements, parser_of, read_lines

ROUNDS = 3
IN_ROUNDS = ("taylor", "fisher")
"""The criteria that are also measured in rounds, with the global allocation."""


def variants() -> Variants:
    """What is measured, by name: each without and with the fit of what is left."""
    found: dict[str, dict[str, Any]] = {
        f"{criterion}-{allocation}": {
            "method": "importance",
            "importance": criterion,
            "allocation": allocation,
        }
        for criterion in CRITERIA
        for allocation in ALLOCATIONS
    }
    for criterion in IN_ROUNDS:
        in_rounds = {**found[f"{criterion}-global"], "rounds": ROUNDS}
        found[f"{criterion}-global-rounds-{ROUNDS}"] = in_rounds
    found |= {method: {"method": method} for method in ("kwon", "curvature")}
    both: dict[str, dict[str, Any]] = {}
    for name, settings in found.items():
        both |= {f"{name}{SELECT}": {**settings, "tune": False}, name: settings}
    return both


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 1 something was not to be
    measured, 2 user error, 130 stopped."""
    parser = parser_of(__doc__, variants())
    parser.add_argument("--output", type=Path, help="default: in results, as said above")
    parser.set_defaults(samples=512)
    options = parser.parse_args(argv)
    output = options.output or default_output(options, "ablation")
    with TemporaryDirectory() as folder:
        cache = Path(folder)
        code = complete(options, wanted(options), variants(), output, cache)
    if lines := read_lines(output):
        sys.stdout.write(full_table(cells_of(lines)))
    return code


def wanted(options: argparse.Namespace) -> list[Conditions]:
    """What the flags ask for: a seed beyond the first is for random importance alone."""
    return [
        conditions
        for conditions in measurements(options)
        if conditions["seed"] == options.seed[0] or conditions["variant"].startswith("random")
    ]


if __name__ == "__main__":
    sys.exit(main())
