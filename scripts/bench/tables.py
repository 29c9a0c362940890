"""Every table and figure made of the result files; `--check` finds those that are stale.

python -m scripts.bench.tables            # update stale files
python -m scripts.bench.tables --check    # write nothing; exit code 1 if something is stale

A table stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` in README.md,
results/README.md or results/h100.md, or is a file of its own in results/.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from pathlib import Path

from rfprune.cli.exit_codes import NOTHING_WRITTEN, script
from rfprune.errors import UserError
from scripts.bench import score_tables, sparsity_tables, time_tables
from scripts.bench.harness import RESULTS, ROOT, Line
from scripts.bench.markdown import table

Files = Mapping[str, Sequence[Line]]
"""Lines of the result files by file name, in the order of the names."""

Lines = Sequence[Line]
MARKERS = "<!-- {}:begin -->", "<!-- {}:end -->"

SECTIONS: Mapping[str, tuple[str, Callable[[Lines], str]]] = {
    "quality": ("quality", score_tables.quality),
    "max-drop": ("max_drop", score_tables.max_drop),
    "decoders": ("decoder", score_tables.decoders_short),
    "tokens": ("tokens", score_tables.tokens),
    "ablation": ("ablation", score_tables.ablation),
    "sparsity": ("sparsity", sparsity_tables.granularities),
    "sparsity-speed": ("sparsity-speed", sparsity_tables.speed),
    "promise": ("promise", time_tables.promise_short),
    "speedup": ("speedup", time_tables.speedup_short),
    "depth-speed": ("depth-speed", time_tables.depth_speed),
    "exports": ("exports", time_tables.exports),
    "gguf": ("gguf", score_tables.gguf),
    "vllm": ("vllm", score_tables.vllm),
    "recovery": ("recovery", score_tables.recovery),
    "pruning-time": ("pruning_time", time_tables.pruning_time),
    "vocabulary": ("vocabulary", score_tables.vocabulary),
    "scale": ("scale", time_tables.scale),
    "large-models": ("plan", time_tables.large_models),
    "collection": ("collection", time_tables.collection),
    "first-model": ("first_model", time_tables.first_model),
}
"""Tables of results/README.md: the kind of file that each is made of, and how."""

PAGES: Mapping[str, tuple[str, str, Callable[[Lines], str]]] = {
    "decoders.md": ("decoder", score_tables.DECODERS, score_tables.decoders),
    "promise.md": ("promise", time_tables.PROMISE, time_tables.promise),
    "speedup.md": ("speedup", time_tables.SPEEDUP, time_tables.speedup),
    "operators.md": ("operators", time_tables.OPERATORS, time_tables.operators),
}
"""Files of their own in results/: the kind, how the page begins, and its tables."""

EARLIER: Mapping[str, tuple[str, Callable[[Lines], str]]] = {
    "promise": ("promise", time_tables.promise),
    "speedup": ("speedup", time_tables.speedup_short),
    "operators": ("operators", time_tables.operators),
    "scale": ("scale", time_tables.scale),
    "all-shapes": ("speedup", time_tables.speedup),
}
"""Tables of results/h100.md, whose lines were measured before lines recorded their code. All other
tables show only lines that did."""

NOT_MEASURED = "Not measured yet.\n"


@script(NOTHING_WRITTEN)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 1 something is stale, 2 user
    error, 130 interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--check", action="store_true", help="only list stale files")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    options = parser.parse_args(argv)
    files = read_results(options.results)
    published = list(csv.DictReader(read(options.results / "peers.csv").splitlines()))
    wanted = texts(files, published, options.results, options.readme)
    stale = [path for path, text in wanted.items() if not path.exists() or read(path) != text]
    quality = [line for part in of_kind(files, "quality").values() for line in part]
    cells = score_tables.drawn_cells(quality, published)
    figure = options.results / "summary.png"
    if cells and not _shows(figure, score_tables.figure_digest(cells)):
        stale.append(figure)
    for path in stale:
        if options.check:
            sys.stderr.write(f"tables: {path} is stale: run python -m scripts.bench.tables\n")
            continue
        if path == figure:
            score_tables.draw(cells, path)
        else:
            path.write_text(wanted[path], encoding="utf-8")
        sys.stderr.write(f"tables: wrote {path}\n")
    return 1 if options.check and stale else 0


def texts(files: Files, published: Sequence[Line], results: Path, readme: Path) -> dict[Path, str]:
    """The current text of each file.

    Args:
        published: the rows of peers.csv.

    Raises:
        UserError: a line is not a result or has no code, or a marker is missing.
    """
    of_results, of_earlier = results / "README.md", results / "h100.md"
    page, earlier = read(of_results), read(of_earlier)
    without = without_code(files)
    for name, (kind, make) in EARLIER.items():
        earlier = with_section(earlier, name, made(without, kind, make), of_earlier)
    page = with_section(page, "provenance", provenance(files), of_results)
    files = {name: lines for name, lines in files.items() if name not in without}
    for name, (kind, make) in SECTIONS.items():
        page = with_section(page, name, made(files, kind, make), of_results)
    page = with_section(page, "studies", studies(files), of_results)
    overview = made(files, "quality", lambda lines: score_tables.overview(lines, published))
    return {
        readme: with_section(read(readme), "results", overview, readme),
        of_results: page,
        of_earlier: earlier,
        **{
            results / name: start + made(files, kind, make)
            for name, (kind, start, make) in PAGES.items()
        },
    }


def read_results(folder: Path) -> Files:
    """The lines of all result files.

    Raises:
        UserError: a line is not JSON.
    """
    files = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = []
        for number, text in enumerate(read(path).splitlines(), start=1):
            try:
                lines.append(dict(json.loads(text)))
            except (ValueError, TypeError) as error:
                raise _no_result(path.name, number, error) from error
        files[path.name] = lines
    return files


def without_code(files: Files) -> Files:
    """The files of results/h100.md, whose lines did not record their code.

    Raises:
        UserError: a line of another file did not.
    """
    found = {}
    kinds = tuple(f"{kind}_" for kind, _ in EARLIER.values())
    for name, lines in files.items():
        missing = [number for number, line in enumerate(lines, start=1) if not line.get("code")]
        if missing and not ("_cuda" in name and name.startswith(kinds)):
            raise UserError(
                f"Line {missing[0]} of {name} has no `code`, the digest of the code that measured "
                f"it: remove the line, and measure again."
            )
        if missing:
            found[name] = lines
    return found


def of_kind(files: Files, kind: str) -> Files:
    """The files whose names begin with the kind."""
    return {name: lines for name, lines in files.items() if name.startswith(f"{kind}_")}


def made(files: Files, kind: str, make: Callable[[Lines], str]) -> str:
    """A table of all lines of a kind.

    Raises:
        UserError: a line lacks a field of the table.
    """
    own = of_kind(files, kind)
    lines = [line for part in own.values() for line in part]
    if not lines:
        return NOT_MEASURED
    try:
        return make(lines)
    except (KeyError, TypeError, ValueError):
        for name, part in own.items():
            for number, line in enumerate(part, start=1):
                try:
                    make([line])
                except (KeyError, TypeError, ValueError) as error:
                    raise _no_result(name, number, error) from error
        raise


def _no_result(name: str, number: int, error: Exception) -> UserError:
    return UserError(
        f"Line {number} of {name} is not a result that its table can show ({type(error).__name__}: "
        f"{error}): remove the line, and measure again."
    )


def studies(files: Files) -> str:
    """A table for each file of a study, which varies the samples or the variant."""
    own = of_kind(files, "study")
    return "\n".join(made({name: own[name]}, "study", score_tables.study) for name in own) or (
        NOT_MEASURED
    )


def provenance(files: Files) -> str:
    """Which code measured the lines of each file."""
    rows = []
    for name, lines in files.items():
        groups: dict[tuple[str, ...], list[Line]] = {}
        for line in lines:
            groups.setdefault(_made_with(line), []).append(line)
        for (package, code, torch, transformers), part in groups.items():
            days = sorted(str(line.get("measured_at", ""))[:10] for line in part)
            day = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
            versions = [package, code, torch, transformers]
            rows.append([f"`{name}`", len(part), hours(part), day, *versions])
    heads = ["file", "lines", "hours", "measured", "rfprune", "code", "torch", "transformers"]
    return table(heads, rows)


def hours(lines: Lines) -> str:
    """Hours that lines took, rounded up to a tenth; "" if one of them recorded no seconds of all of
    its work. Lines that differ in the constraint share one collection, which counts once."""
    total, shared = 0.0, dict[str, float]()
    for line in lines:
        seconds = line.get("seconds")
        if isinstance(seconds, Mapping) and "prune_total" in seconds:
            conditions = [
                line.get(name) for name in (*score_tables.ROW, "requested_samples", "seed")
            ]
            collected = seconds.get("collect", 0.0)
            shared[str(conditions)] = max(collected, shared.get(str(conditions), 0.0))
            total += seconds["prune_total"] - collected + seconds.get("evaluate", 0.0)
        elif isinstance(seconds, int | float):
            total += seconds
        else:
            return ""
    return f"{ceil((total + sum(shared.values())) / 360) / 10:.1f}"


def _made_with(line: Line) -> tuple[str, ...]:
    versions = line.get("versions") or line.get("machine", {}).get("versions", {})
    code = f"`{line['code']}`" if line.get("code") else "not recorded"
    if line.get("commit"):
        code += f" ({line['commit']})"
    names = ("torch", "transformers")
    return versions.get("rfprune", ""), code, *(versions.get(name, "") for name in names)


def with_section(page: str, name: str, text: str, path: Path) -> str:
    """A page with the text between the markers of one section replaced.

    Raises:
        UserError: the markers are not there once each, in their order.
    """
    begin_line, end_line = (marker.format(name) for marker in MARKERS)
    before, begin, rest = page.partition(begin_line)
    _, end, after = rest.partition(end_line)
    if not (begin and end) or begin in rest or end in before + after:
        raise UserError(
            f"{path} needs the lines {begin_line} and {end_line}, once each, in this order."
        )
    return f"{before}{begin}\n\n{text}\n{end}{after}"


def _shows(figure: Path, digest: str) -> bool:
    """Whether the picture was drawn from the numbers of this digest."""
    return figure.exists() and digest.encode() in figure.read_bytes()


def read(path: Path) -> str:
    """The text of a file.

    Raises:
        UserError: it is missing, or not readable as UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"{path} cannot be read: {reason}.") from error


if __name__ == "__main__":
    sys.exit(main())
