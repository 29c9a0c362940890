"""Turn results/decoder_*.jsonl into results/decoders.md and the short table in README.md.

python scripts/decoder_table.py            # write both
python scripts/decoder_table.py --check    # write nothing; exit code 1 where one is stale

The short table goes between the lines `<!-- decoders:begin -->` and `<!-- decoders:end -->`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import one another

from scripts.summarise import keep_current, read, read_measurements, with_tables

BEGIN, END = "<!-- decoders:begin -->", "<!-- decoders:end -->"
INTRODUCTION = """\
# Language models

Perplexity on held-out text, times that of the original; KL, the mean of KL(original || pruned) in
nats a token (the oldest lines have none); seconds by stage (several constraints share one
collection) and the most memory that the process had used by then, model and data included; and what
the models write, greedily.
"""
STAGES = ("collect", "search", "rearrange", "compact", "tune")

Line = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process); 0 done, 1 stale, 2 user error."""
    return keep_current(argv, "decoder_table", __doc__, _wanted)


def _wanted(results: Path, readme: Path) -> dict[Path, str]:
    lines = read_measurements(results, "decoder", "measure_decoder", lambda line: full([line]))
    return {
        results / "decoders.md": f"{INTRODUCTION}\n{full(lines)}",
        readme: with_tables(read(readme), short(lines), readme, BEGIN, END),
    }


def short(lines: Sequence[Line]) -> str:
    """A row for every method, a column for every constraint."""
    ratios = sorted({line["constraint"] for line in lines}, reverse=True)
    heads = "".join(f" {ratio:g} of MACs |" for ratio in ratios)
    rows = [f"| model [original], samples | method |{heads}", "|---|---|" + "---|" * len(ratios)]
    for where, variant in dict.fromkeys((_where(line), line["variant"]) for line in lines):
        own = {
            line["constraint"]: line
            for line in lines
            if (_where(line), line["variant"]) == (where, variant)
        }
        entries = "".join(
            f" {_outcome(own[ratio])} |" if ratio in own else " |" for ratio in ratios
        )
        rows.append(f"| {where} | {variant} |{entries}")
    return "\n".join(rows) + "\n"


def full(lines: Sequence[Line]) -> str:
    """A row for every measurement, and then what was written."""
    rows = [
        "| model [original], samples | method | MACs | parameters | perplexity | times | KL | "
        f"{' | '.join(STAGES)} | memory |",
        "|" + "---|" * (8 + len(STAGES)),
    ]
    for line in lines:
        seconds = " | ".join(_seconds(line["seconds"].get(stage)) for stage in STAGES)
        rows.append(
            f"| {_where(line)} | {line['variant']} | {line['achieved']['mac']:.3f} | "
            f"{line['achieved']['params']:.3f} | {line['score']:.2f} | "
            f"{line['score'] / line['original_score']:.2f} | {_divergence(line)} | {seconds} | "
            f"{line['peak_memory_bytes'] / 2**30:.1f} GiB |"
        )
    samples = [
        f"- {line['model']}, {line['variant']} at {line['constraint']:g}, {_tokens(line)}: "
        f"*{prompt}* {_inline(text)}"
        for line in lines
        for prompt, text in line["written"].items()
    ]
    first = {line["model"]: line["written_by_original"] for line in lines}
    originals = [
        f"- {model}, original: *{prompt}* {_inline(text)}"
        for model, written in first.items()
        for prompt, text in written.items()
    ]
    return "\n".join([*rows, "", *originals, *samples]) + "\n"


def _where(line: Line) -> str:
    return f"{line['model']} [{line['original_score']:.1f}], {_tokens(line)}"


def _tokens(line: Line) -> str:
    return f"{line['samples']} x {line['mean_tokens']:g} tokens"


def _outcome(line: Line) -> str:
    apart = _divergence(line)
    return f"{line['score']:.1f}" + f" ({apart})" * bool(apart)


def _divergence(line: Line) -> str:
    return "" if line["divergence"] is None else f"{line['divergence']:.3f}"


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.0f} s"


def _inline(text: str) -> str:
    """On one line, and no markup."""
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main())
