"""What a run says of the search of `--max-drop`, drawn from the entry "max_drop" of report.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def shown_points(points: float) -> str:
    """With its unit: 1 point, 0.5 points."""
    return f"{points:g} point" + ("" if points == 1 else "s")


def trial_line(trial: Mapping[str, float]) -> str:
    """One size that was tried: what was kept, its score and its distance from the original."""
    return (
        f"{100 * trial['ratio']:.6g}%: {trial['score']:.2f} ({_change(trial['drop'])}), divergence "
        f"{trial['divergence']:.4f}"
    )


def search_lines(report: Mapping[str, Any]) -> list[str]:
    """The path of the search, and how sure its outcome is; none without a search."""
    found = report.get("max_drop")
    if not found:
        return []
    path = ", ".join(
        f"{100 * trial['ratio']:.6g}% ({_change(trial['drop'])})" for trial in found["path"]
    )
    allowed = shown_points(found["points"])
    drop = round(found["drop"], 2)
    told = f"loses {drop:.2f}" if drop >= 0 else f"gains {-drop:.2f}"
    lines = [
        f"The smallest that loses at most {allowed}; tried: {path}, in {found['seconds']:.0f} s "
        f"with all scoring.",
        f"It {told} points, with a standard error of {found['standard_error']:.2f}: in "
        f"{found['sure']:.0%} of resampled validation sets at most {allowed} "
        f"{'is' if found['points'] == 1 else 'are'} lost.",
    ]
    if report["constraint"] <= found["least_possible"]:
        lines.append("Nothing smaller is possible by this metric.")
    return lines


def _change(drop: float) -> str:
    """In points; the sum with 0.0 takes the sign from what rounds to -0.00."""
    return f"{round(-drop, 2) + 0.0:+.2f}"
