"""Draw results/summary.png from results/summary.csv: score and divergence against MACs kept.

python scripts/plot_results.py
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {
    "kwon-scheduled": ("Kwon et al. 2022", "#b35806", "o"),
    "kwon-dense": ("the same, tuned to the dense model", "#8073ac", "^"),
    "curvature": ("rfprune's own method, curvature", "#2166ac", "s"),
}
"""Variants drawn: label, colour and marker; the colours are told apart by the colour-blind."""

Row = Mapping[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process); 0 done, 2 nothing to draw."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR")
    options = parser.parse_args(argv)
    source = options.results / "summary.csv"
    if not source.is_file():
        sys.stderr.write(f"plot_results: error: no {source}: run scripts/summarise.py first.\n")
        return 2
    with source.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if is_drawn(row)]
    if not rows:
        wanted = " or ".join(VARIANTS)
        sys.stderr.write(f"plot_results: error: {source} has no {wanted} at a MAC constraint.\n")
        return 2
    draw(rows, options.results / "summary.png")
    sys.stderr.write(f"plot_results: wrote {options.results / 'summary.png'}\n")
    return 0


def is_drawn(row: Row) -> bool:
    """Whether a row of summary.csv has a place in the picture."""
    return row["variant"] in VARIANTS and row["metric"] == "mac"


def draw(rows: Sequence[Row], path: Path) -> None:
    """One column a model and task: score above, divergence below; means and range over seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    columns: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        columns.setdefault((row["model"], row["task"]), []).append(row)
    figure, axes = plt.subplots(
        2, len(columns), figsize=(3.2 * len(columns) + 0.6, 5.2), sharex=True, squeeze=False
    )
    most_first = sorted(columns.values(), key=len, reverse=True)
    for column, own in enumerate(most_first):
        _draw_column(axes[0][column], axes[1][column], own)
    axes[0][0].set_ylabel("score (points)")
    axes[1][0].set_ylabel("divergence from the original")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def _draw_column(above: Any, below: Any, rows: Sequence[Row]) -> None:
    first = rows[0]
    above.set_title(f"{first['task']} ({first['metric_name']})\n{first['model']}", fontsize=10)
    original = float(rows[0]["original_score"])
    above.axhline(original, color="black", linestyle=":", label="original")
    for variant, (label, colour, marker) in VARIANTS.items():
        own = [row for row in rows if row["variant"] == variant]
        own.sort(key=lambda row: float(row["constraint"]))
        kept = [100 * float(row["constraint"]) for row in own]
        for axis, name in ((above, "score"), (below, "divergence")):
            mean, low, high = (
                [float(row[f"{name}_{which}"]) for row in own] for which in ("mean", "min", "max")
            )
            axis.plot(kept, mean, color=colour, marker=marker, markersize=4, label=label)
            axis.fill_between(kept, low, high, color=colour, alpha=0.15, linewidth=0)
    below.set_yscale("log")
    below.set_xlabel("MACs kept (%)")
    for axis in (above, below):
        axis.grid(alpha=0.3)


if __name__ == "__main__":
    sys.exit(main())
