"""Tables of scores: quality, published numbers, ablation, studies, decoders, max-drop, GGUF."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rfprune.errors import UserError
from rfprune.settings import ALLOCATIONS, CRITERIA, METHODS
from rfprune.tasks.registry import TASKS
from scripts.bench.harness import Line, grouped, grouped_by
from scripts.bench.markdown import table

PLACE = ("metric", "requested_samples", "batch_size", "max_length", "dtype")
"""One table of results for each combination of these."""

ROW = (*PLACE, "model", "task", "eval_limit", "variant")
"""One row of a table for each combination of these."""

COSTS = {"mac": "MACs", "params": "parameters", "memory": "memory", "latency": "latency"}
BESIDE_PUBLISHED = {
    "curvature": "rfprune, curvature",
    "kwon-scheduled": "rfprune, kwon as published",
    "kprune-published": "K-prune, implemented from the paper",
}
"""Variants that stand beside published numbers."""

DRAWN = {
    "kwon-scheduled": ("Kwon et al. 2022, as published", "#b35806", "o"),
    "kwon-dense": ("--method kwon", "#8073ac", "^"),
    "kprune-published": (BESIDE_PUBLISHED["kprune-published"], "#1b7837", "v"),
    "curvature": ("--method curvature (default)", "#2166ac", "s"),
}
"""Variants in the figure: label, colour and marker; the colours suit colour-blind readers."""

PANELS_PER_ROW = 4
LEAST_POINTS = 5.0
"""Points of the score that a panel spans at least: less would enlarge noise."""


@dataclass(frozen=True)
class Cell:
    """Measurements that differ only in the seed."""

    row: tuple[Any, ...]
    constraint: float
    lines: tuple[Line, ...]

    def values(self, *path: str) -> list[float]:
        """A number of every line."""
        found: list[Any] = list(self.lines)
        for name in path:
            found = [value[name] for value in found]
        return [float(value) for value in found]

    def mean(self, *path: str) -> float:
        """The mean over the seeds of a number in the lines."""
        return fmean(self.values(*path))


def cells_of(lines: Iterable[Line]) -> list[Cell]:
    """Measurements grouped over the seeds.

    Tasks come in the registry's order, variants as they were first measured, constraints falling.

    Raises:
        UserError: the same measurement is there twice.
    """
    cells = []
    for group in grouped(lines, (*ROW, "constraint")):
        first = group[0]
        if len({line["seed"] for line in group}) < len(group):
            raise UserError(
                f"{first['model']} {first['variant']} {first['constraint']} has two results of one "
                f"seed: remove one of the lines from results."
            )
        row = tuple(first[name] for name in ROW)
        cells.append(Cell(row, float(first["constraint"]), tuple(group)))
    variants = list(dict.fromkeys(cell.row[-1] for cell in cells))
    return sorted(cells, key=lambda cell: _order(cell, variants))


def _order(cell: Cell, variants: Sequence[str]) -> tuple[Any, ...]:
    line = cell.lines[0]
    tasks = [*TASKS, line["task"]]
    place = ["" if value is None else value for value in cell.row[: len(PLACE)]]
    return (
        *(str(value).rjust(12) for value in place),
        tasks.index(line["task"]),
        line["task"],
        line["model"],
        line["eval_limit"] or 0,
        variants.index(line["variant"]),
        -cell.constraint,
    )


def _by(cells: Iterable[Cell], names: int) -> list[list[Cell]]:
    """Cells grouped by the first `names` conditions of their rows."""
    return grouped_by(cells, lambda cell: cell.row[:names])


def _constraints(cells: Iterable[Cell]) -> list[float]:
    return sorted({cell.constraint for cell in cells}, reverse=True)


def entry(cell: Cell | None) -> str:
    """Score, standard error of its drop, and divergence at one constraint."""
    if cell is None:
        return ""
    scores = cell.values("score")
    errors = [line["drop_error"] for line in cell.lines if "drop_error" in line]
    error = f" ±{fmean(errors):.1f}" if errors else ""
    spread = f" ({min(scores):.1f}..{max(scores):.1f})" if len(scores) > 1 else ""
    return f"{fmean(scores):.1f}{error}{spread} / {cell.mean('divergence'):.3f}"


def caption(cells: Sequence[Cell]) -> str:
    """The meaning of the numbers of a table, and their conditions."""
    line = cells[0].lines[0]
    counts = sorted({len(cell.lines) for cell in cells})
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    seeds, spread = f"Means over {seeds} seeds", " (lowest..highest over the seeds)"
    if counts == [1]:
        seeds, spread = "One seed", ""
    length = "" if line["max_length"] is None else f", at most {line['max_length']} tokens"
    measured = any("drop_error" in line for cell in cells for line in cell.lines)
    error = " ±standard error of the drop from the original score" if measured else ""
    return (
        f"Score in points{error}{spread} / divergence from the original's predictions (KL in nats; "
        f"in a regression, half the mean squared difference). "
        f"{seeds}; {line['requested_samples']} calibration examples in batches of "
        f"{line['batch_size']}{length}, {line['dtype']}."
    )


def quality(lines: Sequence[Line]) -> str:
    """A table for each combination of conditions: variants in rows, constraints in columns."""
    return "\n".join(_quality_table(cells) for cells in _by(cells_of(lines), len(PLACE)))


def _quality_table(cells: Sequence[Cell]) -> str:
    constraints = _constraints(cells)
    metric = cells[0].lines[0]["metric"]
    heads = [f"{ratio:.4g} of {COSTS.get(metric, metric)}" for ratio in constraints]

    def rows() -> Iterator[list[str]]:
        above = ["", ""]
        for own in _by(cells, len(ROW)):
            line = own[0].lines[0]
            same = [cell for cell in cells if cell.row[:-1] == own[0].row[:-1]]
            original = fmean(cell.mean("original_score") for cell in same)
            scored = f"{line['metric_name']}, {line['evaluated_examples']} examples"
            names = [line["model"], f"{line['task']} [{original:.1f}] ({scored})"]
            by_constraint = {cell.constraint: cell for cell in own}
            entries = [entry(by_constraint.get(ratio)) for ratio in constraints]
            yield [*(["", ""] if names == above else names), line["variant"], *entries]
            above = names

    heads = ["model", "task [original]", "variant", *heads]
    text = table(heads, rows())
    return f"{caption(cells)}\n\n{text}"


def overview(lines: Sequence[Line], published: Sequence[Line]) -> str:
    """Scores by MACs kept, published numbers (peers.csv) beside ours, tasks in their order."""
    chosen = [
        line
        for line in lines
        if line["metric"] == "mac" and line["variant"] in BESIDE_PUBLISHED and line["task"] in TASKS
    ]
    ratios = [name for name in published[0] if name.replace(".", "").isdigit()]

    def rows() -> Iterator[list[str]]:
        found = [*published, *map(_own_row, _by(cells_of(chosen), len(ROW)))]
        for row in sorted(found, key=lambda row: list(TASKS).index(row["task"])):
            names = [row[name] for name in ("task", "method", "model", "dense")]
            yield [*names, *(row.get(ratio, "") for ratio in ratios), row["source"]]

    heads = ["task", "method", "model", "original", *ratios, "numbers"]
    return table(heads, rows())


def _own_row(cells: Sequence[Cell]) -> dict[str, str]:
    """A checkpoint and a method: means over the seeds."""
    line = cells[0].lines[0]
    scores = {f"{cell.constraint:g}": f"{cell.mean('score'):.1f}" for cell in cells}
    return {
        "task": line["task"],
        "method": BESIDE_PUBLISHED[line["variant"]],
        "model": line["model"],
        "source": "measured here",
        "dense": f"{cells[0].mean('original_score'):.1f}",
        **scores,
    }


def ablation(lines: Sequence[Line]) -> str:
    """For every model and task the classical criteria, without and with the least-squares fit."""
    return "\n".join(_ablation_table(cells) for cells in _by(cells_of(lines), len(ROW) - 1))


def _ablation_table(cells: Sequence[Cell]) -> str:
    constraints = _constraints(cells)
    line = cells[0].lines[0]
    by_names: dict[tuple[str, ...], dict[tuple[float, bool], Cell]] = {}
    for cell in sorted(cells, key=lambda cell: _criterion_order(cell.lines[0]["settings"])):
        settings = cell.lines[0]["settings"]
        place = by_names.setdefault(_criterion_names(settings), {})
        place[cell.constraint, settings["tune"]] = cell
    heads = [f"{ratio:g} {fit}" for ratio in constraints for fit in ("pruned", "fitted")]

    def rows() -> Iterator[list[str]]:
        for names, own in by_names.items():
            places = [(ratio, tuned) for ratio in constraints for tuned in (False, True)]
            yield [*names, *(entry(own.get(place)) for place in places)]

    text = table(["importance", "allocation", "rounds", *heads], rows())
    original = f"{line['metric_name']} of the original: {line['original_score']:.1f}"
    scored = f"{original}, {line['evaluated_examples']} examples"
    return f"**{line['model']}, {line['task']}** ({scored}). {caption(cells)}\n\n{text}"


def _criterion_names(settings: Mapping[str, Any]) -> tuple[str, str, str]:
    rounds = str(settings["rounds"])
    if settings["method"] == "importance":
        return settings["importance"], settings["allocation"], rounds
    return f"`--method {settings['method']}`", "", rounds


def _criterion_order(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """The classical criteria first, in any order of measuring."""
    return (
        -METHODS.index(settings["method"]),
        CRITERIA.index(settings["importance"]),
        ALLOCATIONS.index(settings["allocation"]),
        settings["rounds"],
    )


def study(lines: Sequence[Line]) -> str:
    """A row for each number of examples and variant, a column for each constraint."""
    cells = cells_of(lines)
    constraints = _constraints(cells)
    first = lines[0]
    by_row: dict[tuple[int, str], dict[float, Cell]] = {}
    for cell in cells:
        line = cell.lines[0]
        row = by_row.setdefault((line["requested_samples"], line["variant"]), {})
        row[cell.constraint] = cell

    def rows() -> Iterator[list[str]]:
        for (samples, variant), own in sorted(by_row.items()):
            seconds = max(cell.mean("seconds", "prune_total") for cell in own.values())
            entries = [entry(own.get(ratio)) for ratio in constraints]
            yield [str(samples), variant, *entries, f"{seconds:.0f}"]

    heads = ["examples", "variant", *(f"{ratio:g}" for ratio in constraints), "seconds"]
    text = table(heads, rows())
    original = f"original: {first['original_score']:.1f}"
    return f"**{first['model']}, {first['task']}** ({original}): score / divergence.\n\n{text}"


def max_drop(lines: Sequence[Line]) -> str:
    """A row for every model and limit."""
    heads = [
        *("model, calibration examples", "original score", "allowed drop", "MACs kept"),
        *("drop (standard error)", "sizes tried", "time / single run"),
    ]
    ordered = sorted(lines, key=lambda line: (_samples(line), line["points"]))

    def rows() -> Iterator[list[str]]:
        for line in ordered:
            yield [
                _samples(line),
                f"{line['original_score']:.1f}",
                f"{line['points']:g}",
                f"{line['achieved']['mac']:.0%}",
                f"{line['drop']:.2f} ({line['standard_error']:.2f})",
                str(line["probes"]),
                f"{line['seconds'] / line['single_seconds']:.1f}",
            ]

    return table(heads, rows())


def gguf(lines: Sequence[Line]) -> str:
    """A row for every model that llama.cpp ran: perplexities, and greedy tokens that agree."""
    heads = ["model", "MACs kept", "perplexity, PyTorch", "perplexity, llama.cpp", "ratio"]
    heads += ["matching greedy tokens, eight texts", "file size"]

    def rows() -> Iterator[list[str]]:
        for line in sorted(lines, key=lambda line: (line["emptied"] or "", -line["constraint"])):
            without = f", without {line['emptied_block']}" if line["emptied"] else ""
            ours, theirs = line["perplexity"]["pytorch"], line["perplexity"]["llama_cpp"]
            yield [
                f"{line['model']}{without}",
                f"{line['constraint']:g}",
                f"{ours:.3f}",
                f"{theirs:.3f}",
                f"{theirs / ours:.4f}",
                f"{' '.join(map(str, line['agreed_tokens']))} of {line['new_tokens']}",
                f"{line['bytes'] / 1e6:.1f} MB",
            ]

    return table(heads, rows())


def vllm(lines: Sequence[Line]) -> str:
    """A row for every plain model that vLLM ran: parameters, and greedy tokens that agree."""
    heads = ["model", "MACs kept", "original parameters", "saved parameters", "parameters in vLLM"]
    heads += ["matching greedy tokens, eight texts", "versions of vLLM, transformers"]

    def rows() -> Iterator[list[str]]:
        for line in lines:
            yield [
                line["model"],
                f"{line['constraint']:g}",
                *(f"{line['parameters'][name]:,}" for name in ("original", "saved", "in_vllm")),
                f"{' '.join(map(str, line['agreed_tokens']))} of {line['new_tokens']}",
                f"{line['server']['vllm']}, {line['server']['transformers']}",
            ]

    return table(heads, rows())


def _samples(line: Line) -> str:
    return f"{line['model']}, {line['requested_samples']:,}"


DECODERS = """\
# Language models

Perplexity on held-out text, and its ratio to the original's. KL is the mean KL(original || pruned)
in nats per token. Seconds are by stage; the constraints of one run
share one collection. Memory is the peak of the process so far, including model and data. Below the
table are greedy continuations of two prompts.

"""
STAGES = ("collect", "search", "rearrange", "compact", "tune")


def decoders_short(lines: Sequence[Line]) -> str:
    """A row for every method, a column for every constraint: perplexity (KL)."""
    ratios = sorted({line["constraint"] for line in lines}, reverse=True)
    ordered = sorted(lines, key=lambda line: (line["model"], line["samples"], line["seed"]))
    named = [{**line, "where": _text_length(line)} for line in ordered]

    def rows() -> Iterator[list[str]]:
        for group in grouped(named, ("where", "variant")):
            own = {line["constraint"]: line for line in group}
            entries = [_perplexity(own[ratio]) if ratio in own else ""
                       for ratio in ratios]  # fmt: skip
            yield [group[0]["where"], group[0]["variant"], *entries]

    heads = ["model [original], calibration", "method", *(f"{one:g} of MACs" for one in ratios)]
    return table(heads, rows())


def tokens(lines: Sequence[Line]) -> str:
    """A row for every number of calibration tokens of a language model."""
    heads = [
        *("model [original]", "MACs", "calibration", "perplexity", "ratio to original", "KL"),
        *(*STAGES, "memory"),
    ]
    ordered = sorted(lines, key=lambda line: (line["model"], -line["constraint"], line["samples"]))

    def rows() -> Iterator[list[str]]:
        for line in ordered:
            pruned, original = line["nats"]["pruned"], line["nats"]["original"]
            lost = [after - before for after, before in zip(pruned, original, strict=True)]
            yield [
                f"{line['model']} [{line['original_score']:.1f}]",
                f"{line['constraint']:g}",
                f"{line['samples']:,} x {line['mean_tokens']:g} tokens",
                _exponential(pruned),
                _exponential(lost),
                _kl(line),
                *_costs(line),
            ]

    return table(heads, rows())


def _exponential(nats: Sequence[float]) -> str:
    """exp of the mean over blocks of tokens, and its standard error."""
    value = exp(fmean(nats))
    return f"{value:.2f} ({value * stdev(nats) / sqrt(len(nats)):.2f})"


def _costs(line: Line) -> list[str]:
    """Seconds by stage and the most memory."""
    seconds = [line["seconds"].get(stage) for stage in STAGES]
    return [
        *("" if value is None else f"{value:.0f} s" for value in seconds),
        f"{line['peak_memory_bytes'] / 2**30:.1f} GiB",
    ]


def decoders(lines: Sequence[Line]) -> str:
    """A row for every measurement, and then the generated text."""
    heads = [
        *("model [original], calibration", "method", "MACs", "parameters", "perplexity", "ratio"),
        *("KL", *STAGES, "memory"),
    ]

    def rows() -> Iterator[list[str]]:
        for line in lines:
            yield [
                _text_length(line),
                line["variant"],
                *(f"{line['achieved'][name]:.3f}" for name in ("mac", "params")),
                f"{line['score']:.2f}",
                f"{line['score'] / line['original_score']:.2f}",
                _kl(line),
                *_costs(line),
            ]

    originals = {
        f"- {line['model']}, original: *{prompt}* {_inline(text)}": None
        for line in lines
        for prompt, text in line["written_by_original"].items()
    }
    pruned = [
        f"- {line['model']}, {line['variant']} at {line['constraint']:g}, "
        f"{line['samples']} x {line['mean_tokens']:g} tokens: *{prompt}* {_inline(text)}"
        for line in lines
        for prompt, text in line["written"].items()
    ]
    text = table(heads, rows())
    return "\n".join([text, *originals, *pruned]) + "\n"


def _text_length(line: Line) -> str:
    tokens = f"{line['samples']} x {line['mean_tokens']:g} tokens"
    seed = f", seed {line['seed']}" if line["seed"] else ""
    return f"{line['model']} [{line['original_score']:.1f}], {tokens}{seed}"


def _perplexity(line: Line) -> str:
    divergence = _kl(line)
    return f"{line['score']:.1f}" + f" ({divergence})" * bool(divergence)


def _kl(line: Line) -> str:
    return "" if line["divergence"] is None else f"{line['divergence']:.3f}"


def _inline(text: str) -> str:
    """On one line, without markup."""
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def drawn_cells(lines: Iterable[Line], published: Sequence[Line]) -> list[Cell]:
    """The cells in the figure, which shows the tasks with published numbers (peers.csv)."""
    tasks = {row["task"] for row in published}
    return cells_of(
        [
            line
            for line in lines
            if line["variant"] in DRAWN and line["metric"] == "mac" and line["task"] in tasks
        ]
    )


def figure_digest(cells: Sequence[Cell]) -> str:
    """SHA-256 of the numbers that the figure shows; the picture carries it."""
    numbers = [
        (cell.row, cell.constraint, *(cell.values(name) for name in ("score", "divergence")))
        for cell in cells
    ]
    return hashlib.sha256(repr(numbers).encode()).hexdigest()


def draw(cells: Sequence[Cell], path: Path) -> None:
    """A panel for each model and task, score above divergence; mean and range over seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        line = cell.lines[0]
        panels.setdefault((line["model"], line["task"]), []).append(cell)
    columns = min(len(panels), PANELS_PER_ROW)
    rows = -(-len(panels) // columns)
    figure = plt.figure(figsize=(3.1 * columns + 0.4, 4.4 * rows + 0.5), layout="constrained")
    grid: Any = figure.add_gridspec(rows, columns)
    for number, (_, own) in enumerate(sorted(panels.items())):
        row, column = divmod(number, columns)
        above, below = grid[row, column].subgridspec(2, 1).subplots(sharex=True)
        _draw_panel(above, below, own)
        if column == 0:
            above.set_ylabel("score (points)")
            below.set_ylabel("divergence")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": None, "Description": figure_digest(cells)})
    plt.close(figure)


def _draw_panel(above: Any, below: Any, cells: Sequence[Cell]) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    first = cells[0].lines[0]
    metric = first["metric_name"].replace("_", " ")
    above.set_title(f"{first['model']}\n{first['task']} ({metric})", fontsize=10)
    above.axhline(first["original_score"], color="black", linestyle=":", label="original")
    for variant, (label, colour, marker) in DRAWN.items():
        own = [cell for cell in cells if cell.row[-1] == variant]
        kept = [100 * cell.constraint for cell in own]
        for axis, name in ((above, "score"), (below, "divergence")):
            values = [cell.values(name) for cell in own]
            means = [fmean(one) for one in values]
            axis.plot(kept, means, color=colour, marker=marker, markersize=4, label=label)
            low, high = [min(one) for one in values], [max(one) for one in values]
            axis.fill_between(kept, low, high, color=colour, alpha=0.15, linewidth=0)
    bottom, top = above.get_ylim()
    above.set_ylim(min(bottom, top - LEAST_POINTS), top)
    below.set_yscale("log")
    below.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
    below.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    below.yaxis.set_minor_locator(NullLocator())
    below.set_xlabel("MACs kept (%)")
    below.set_xlim(15, 75)
    below.set_xticks(range(20, 80, 10))
    for axis in (above, below):
        axis.grid(alpha=0.3)


def vocabulary(lines: Sequence[Line]) -> str:
    """A row for every model and set of texts: what was trimmed, and how held-out texts fare."""
    heads = [
        *("model", "corpus", "vocabulary size", "parameters", "MB", "score"),
        *("held-out texts tokenised differently", "tokens in held-out texts", "CPU seconds"),
    ]

    def rows() -> Iterator[list[str]]:
        for line in lines:
            held_out, tokens, params = line["held_out"], line["tokens"], line["params"]
            more = held_out["tokens_after"] / held_out["tokens_before"] - 1
            least = "" if line["min_count"] == 1 else f", {line['min_count']} times or more"
            yield [
                line["model"],
                f"{line['texts']}{least}",
                f"{tokens[0]:,} to {tokens[1]:,}",
                f"{params[0] / 1e6:.1f} M to {params[1] / 1e6:.1f} M ({params[1] / params[0]:.0%})",
                " to ".join(f"{number / 1e6:.0f}" for number in line["bytes"]),
                _trimmed_score(line),
                f"{held_out['changed_texts'] / held_out['texts']:.1%}",
                f"{more:+.2%}",
                f"{line['cpu_seconds']:.0f}",
            ]

    return table(heads, rows())


def _trimmed_score(line: Line) -> str:
    """Before and after; without a score, the largest difference of hidden states."""
    if "scores" not in line:
        return f"hidden states differ by {line['difference']:g}"
    before, after = line["scores"]
    return f"{line['metric_name']} {before:.2f} to {after:.2f}"


def recovery(lines: Sequence[Line]) -> str:
    """A row for every training of a pruned model: examples, minutes, score and divergence."""
    heads = ["model, task", "MACs kept", "steps x batch size", "weight of hidden states"]
    heads += ["minutes", "original"]
    heads += ["pruned", "recovered", "KL pruned", "KL recovered"]

    def rows() -> Iterator[list[str]]:
        for line in lines:
            scores, apart = line["scores"], line["divergence"]
            yield [
                f"{line['model']}, {line['task']} ({line['metric_name']})",
                f"{line['constraint']:g}",
                f"{line['steps']} x {line['train_batch_size']}",
                "" if line["hidden_states"] is None else f"{line['hidden_states']:g}",
                f"{line['seconds'] / 60:.1f}",
                *(f"{scores[name]:.2f}" for name in ("original", "before", "after")),
                *(f"{apart[name]:.4f}" for name in ("before", "after")),
            ]

    return table(heads, rows())
