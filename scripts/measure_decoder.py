"""Perplexity of a pruned language model by method, what it writes, and what that took.

python scripts/measure_decoder.py --model CHECKPOINT --data-dir text --constraint 0.9 0.8 0.7

Measures what `results/decoder_MODEL_TASK_METRIC_Nsamples[_Mevaluated].jsonl` does not hold yet, a
line each; `scripts/decoder_table.py` makes the tables.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import one another

from rfprune.cache import default_folder
from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.tasks.registry import LANGUAGE_MODELING
from scripts.bench import Variants
from scripts.sweep import complete, default_output, measurements, parser_of

VARIANTS: Variants = {
    "curvature": {"method": "curvature"},
    "curvature-select": {"method": "curvature", "tune": False},
    "kwon-dense": {"method": "kwon"},
    "kwon-rearrange": {"method": "kwon", "tune": False},
    "magnitude-l2": {"method": "importance", "importance": "magnitude-l2"},
    "magnitude-l2-select": {"method": "importance", "importance": "magnitude-l2", "tune": False},
}
"""By name, as in the other results: `-select` and `kwon-rearrange` without any fit."""

PROMPTS = (
    "The capital of France is",
    "Photosynthesis is the process by which",
)


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 1 something was not to be
    measured, 2 user error, 130 stopped."""
    given = ["--task", LANGUAGE_MODELING, *(sys.argv[1:] if argv is None else argv)]
    parser = parser_of(__doc__, VARIANTS)
    parser.add_argument("--prompt", nargs="+", default=PROMPTS, help="to be continued")
    parser.add_argument("--output", type=Path, help="default: in results, as said above")
    parser.set_defaults(samples=64, batch_size=8)
    options = parser.parse_args(given)
    output = options.output or default_output(options, "decoder")
    wanted = list(measurements(options))  # whose variants share what is collected
    return complete(options, wanted, VARIANTS, output, default_folder())


if __name__ == "__main__":
    sys.exit(main())
