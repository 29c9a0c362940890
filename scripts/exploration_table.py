"""Turn results/exploration_*.jsonl (what scripts/explore.py wrote) into results/exploration.md.

python scripts/exploration_table.py            # write it
python scripts/exploration_table.py --check    # write nothing; exit code 1 where it is stale

Every variation stands beside `plain` of the same model, constraint and seed: the divergence and its
change, means over the seeds that both have.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import one another

from scripts.summarise import keep_current, read_measurements

Line = Mapping[str, Any]
Place = tuple[str, int, float]
"""Task, samples and constraint: a column."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process); 0 done, 1 stale, 2 user error."""
    return keep_current(argv, "exploration_table", __doc__, _wanted)


def _wanted(results: Path, _: Path) -> dict[Path, str]:
    lines = read_measurements(results, "exploration", "explore", _needed)
    return {results / "exploration.md": table(lines)}


def table(lines: Sequence[Line]) -> str:
    """Markdown: a row for each variation, a column for each task and constraint."""
    found: dict[tuple[str, Place], dict[int, Line]] = defaultdict(dict)
    for line in lines:
        found[line["variation"], _place(line)][line["seed"]] = line
    places = list(dict.fromkeys(_place(line) for line in lines))
    heads = [f"{task}, {ratio:g} of MACs, {n} examples" for task, n, ratio in places]
    text = [
        "Divergence, its change against `plain` at the same seeds, and the score. Means over "
        "seeds; one seed unless a number of seeds is given.",
        "",
        f"| variation | {' | '.join(heads)} |",
        f"|---|{'---|' * len(heads)}",
    ]
    for variation in dict.fromkeys(line["variation"] for line in lines):
        entries = [_entry(found[variation, place], found["plain", place]) for place in places]
        text.append(f"| `{variation}` | {' | '.join(entries)} |")
    return "\n".join(text) + "\n"


def _needed(line: Line) -> tuple[Any, ...]:
    return _place(line), *(line[name] for name in ("variation", "seed", "divergence", "score"))


def _place(line: Line) -> Place:
    return line["task"], line["requested_samples"], line["constraint"]


def _entry(lines: Mapping[int, Line], plain: Mapping[int, Line]) -> str:
    seeds = sorted(set(lines) & set(plain))
    if not seeds:
        return ""
    divergence = fmean(lines[seed]["divergence"] for seed in seeds)
    change = divergence / fmean(plain[seed]["divergence"] for seed in seeds) - 1
    score = fmean(lines[seed]["score"] for seed in seeds)
    counted = f" ({len(seeds)} seeds)" if len(seeds) > 1 else ""
    return f"{divergence:.4f}, {change:+.0%}, {score:.1f}{counted}"


if __name__ == "__main__":
    sys.exit(main())
