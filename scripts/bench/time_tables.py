"""Tables of times, memory and bytes: promises, speedup, exports, pruning itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rfprune.latency.promise import TOLERANCE
from scripts.bench.harness import Line, grouped, grouped_by
from scripts.bench.markdown import device_of, table

DTYPES = ("float32", "bfloat16", "float16")
RUNTIMES = ("eager", "compile", "compile-graphs", "onnx")
"""In the order of the tables."""

SHOWN = (32, 128)
"""Batch size and length of the short table of speedups."""

PROMISE = f"""\
# Latency constraints

End-to-end latencies as fractions of the original's. "Predicted" is the latency table's estimate for
the first attempt, and "first measured" the measured latency of that attempt. "Final" is a new
measurement of the last attempt: the median of paired rounds ± its standard error; the spread is
half the interquartile range of single rounds. A constraint is met if the final latency is within
{TOLERANCE:.0%} of it. "Of ideal" is the speedup divided by the ratio of the MACs. The last column
is the latency of a model with as many MACs, chosen by `--metric mac` and timed in the same rounds.

"""

SPEEDUP = """\
# Measured speedup

Each cell: measured speedup **of** ideal speedup, and their ratio in parentheses. The measured
speedup is the median, over rounds that time both models in turn, of the original's time over the
pruned model's. The ideal speedup is the ratio of their multiply-accumulates in the Transformer
layers. `by 8` keeps neurons in multiples of 8. Weights are random, which does not affect the times.
[README.md](README.md#measured-speed) explains the numbers.

"""

OPERATORS = """\
# Lost speedup by kind of operator

The first column is the milliseconds that each kind of operator takes in a forward pass of the
original. For each pruned model: the time beyond the original's divided by the ideal speedup, as a
percentage of the ideal time of the whole pass. The percentages add up to the last row.

"""


def promise(lines: Sequence[Line]) -> str:
    """A row for every constraint."""
    heads = [
        *("model, shape", "constraint", "predicted", "first measured", "attempts"),
        *("final", "error", "spread", "MACs", "of ideal", "with `--metric mac`"),
    ]

    def rows() -> Iterator[list[str]]:
        for line in lines:
            first, measured = line["attempts"][0], line["measured"]
            yield [
                _shape_and_device(line),
                f"{line['constraint']:g}",
                f"{first['predicted']:.3f}",
                f"{first['measured']:.3f}",
                str(len(line["attempts"])),
                f"{measured:.3f} ± {measured * line['error']:.3f}",
                f"{_miss(line):+.1%}",
                f"{line['spread']:.1%}",
                f"{line['mac']:.3f}",
                f"{line['mac'] / measured:.2f}",
                f"{line['by_mac']['measured']:.3f}" if "by_mac" in line else "",
            ]

    return table(heads, rows())


def promise_short(lines: Sequence[Line]) -> str:
    """A row for every model, shape and machine."""
    heads = ["model, shape", "constraints", "error of the first attempt", "final error", "met"]

    def rows() -> Iterator[list[str]]:
        for own in grouped_by(lines, _shape_and_device):
            first = [abs(line["attempts"][0]["measured"] / line["constraint"] - 1) for line in own]
            last = [abs(_miss(line)) for line in own]
            kept = sum(miss <= TOLERANCE for miss in last)
            yield [
                _shape_and_device(own[0]),
                ", ".join(f"{line['constraint']:g}" for line in own),
                f"up to {max(first):.1%}",
                f"up to {max(last):.1%}",
                f"{kept} of {len(own)}",
            ]

    return table(heads, rows())


def _miss(line: Line) -> float:
    return float(line["measured"] / line["constraint"] - 1)


def _shape_and_device(line: Line) -> str:
    shape = f"{line['batch_size']} x {line['length']}"
    return f"{line['model']}, {shape}, {line['dtype']}, {device_of(line)}"


def speedup(lines: Sequence[Line]) -> str:
    """A table for each model, machine and dtype, with all runtimes and shapes."""
    ordered = sorted(lines, key=_speedup_order)
    return "\n".join(_speedup_table(group) for group in grouped_by(ordered, _place))


def _speedup_table(group: Sequence[Line]) -> str:
    columns, first = _columns(group), group[0]

    def rows() -> Iterator[list[str]]:
        for row in grouped(group, ("runtime", "batch_size", "length")):
            shape = f"{row[0]['batch_size']} x {row[0]['length']}"
            names = [row[0]["runtime"], shape, _ms(row[0]["dense_ms"])]
            yield [*names, *_speedups(row, columns)]

    heads = ["runtime", "batch x length", "original", *map(_column_head, columns)]
    versions = first["machine"]["versions"]
    worst = max(line["spread"] for line in group)
    return (
        f"**{first['model']}, {device_of(first)}, {first['dtype']}**\n\n"
        f"{', '.join(f'{name} {number}' for name, number in versions.items())}; spread of the "
        f"rounds' ratios (half the interquartile range) at most {worst:.1%}.\n\n"
        f"{table(heads, rows())}"
    )


def speedup_short(lines: Sequence[Line]) -> str:
    """One table of all machines and runtimes at the shape `SHOWN`."""
    chosen = [line for line in lines if (line["batch_size"], line["length"]) == SHOWN]
    chosen.sort(key=_speedup_order)
    columns = _columns(chosen)

    def rows() -> Iterator[list[str]]:
        for row in grouped_by(chosen, lambda line: (*_place(line), line["runtime"])):
            model, device, dtype = _place(row[0])
            names = [f"{model}, {device}", dtype, row[0]["runtime"]]
            yield [*names, *_speedups(row, columns)]

    heads = ["model, machine", "dtype", "runtime", *map(_column_head, columns)]
    text = table(heads, rows()) if chosen else ""
    shape = f"batch size {SHOWN[0]}, length {SHOWN[1]}"
    return f"Measured speedup of ideal speedup (their ratio) at {shape}.\n\n{text}"


def depth_speed(lines: Sequence[Line]) -> str:
    """A table of the speed of narrower and of fewer layers, at equal MACs."""
    ways = {"widths": "narrower layers", "layers": "fewer layers"}

    def rows() -> Iterator[list[str]]:
        for line in lines:
            own = line["ways"]
            yield [
                f"{line['model']}, {device_of(line)}",
                f"{line['batch_size']} x {line['length']}",
                _ms(line["dense_ms"]),
                f"{own['layers']['ideal']:.2f}",
                *(f"{own[way]['speedup']:.2f}" for way in ways),
            ]

    heads = ["model, machine", "batch", "original", "ideal speedup", *ways.values()]
    return table(heads, rows())


def _place(line: Line) -> tuple[str, str, str]:
    return line["model"], device_of(line), line["dtype"]


def _speedup_order(line: Line) -> tuple[Any, ...]:
    model, device, dtype = _place(line)
    shape = line["batch_size"], line["length"]
    return model, device, DTYPES.index(dtype), RUNTIMES.index(line["runtime"]), *shape


def _columns(lines: Iterable[Line]) -> list[tuple[float, int]]:
    found = {(float(line["constraint"]), int(line["round_to"])) for line in lines}
    return sorted(found, key=lambda column: (-column[0], column[1]))


def _column_head(column: tuple[float, int]) -> str:
    constraint, round_to = column
    return f"{constraint:g} of MACs" + (f", by {round_to}" if round_to > 1 else "")


def _speedups(row: Sequence[Line], columns: Sequence[tuple[float, int]]) -> list[str]:
    own = {_columns([line])[0]: line for line in row}
    return [
        f"{own[column]['speedup']:.2f} of {own[column]['ideal']:.2f} "
        f"({own[column]['quotient']:.2f})"
        if column in own
        else ""
        for column in columns
    ]


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.3g} s"


def operators(lines: Sequence[Line]) -> str:
    """What each kind of operator takes beyond its share of the ideal time."""
    return "\n".join(_operators_table(line) for line in lines)


def _operators_table(line: Line) -> str:
    own = line["pruned"]
    ideals = [row["ms"]["all"] - row["lost_ms"]["all"] for row in own]
    speedups = [f"{row['speedup']:.2f} of {row['ideal']:.2f}" for row in own]
    rows = [["speedup in this run", "", *speedups]]
    for kind, milliseconds in line["dense"]["ms"].items():
        lost = zip(own, ideals, strict=True)
        entries = [f"{row['lost_ms'][kind] / ideal:+.1%}" for row, ideal in lost]
        rows.append([kind, f"{milliseconds:.3g}", *entries])
    heads = ["", "original", *(_column_head((row["constraint"], row["round_to"])) for row in own)]
    shape = f"{line['batch_size']} x {line['length']}"
    where = f"{line['model']}, {device_of(line)}, {line['dtype']}, {line['runtime']}, {shape}"
    return f"**{where}**\n\n{table(heads, rows)}"


def exports(lines: Sequence[Line]) -> str:
    """For every model and format: score, divergence, bytes, milliseconds by shape."""
    return "\n".join(_exports_table(line) for line in lines)


def _exports_table(line: Line) -> str:
    shapes = [f"{one['batch_size']} x {one['sequence_length']}" for one in line["speed"]]
    rows = []
    for name, row in line["models"].items():
        times = [(one["ms"][name], one["ms"]["original"]) for one in line["speed"]]
        entries = [f"{own:.1f} ms ({original / own:.2f}x)" for own, original in times]
        size = f"{row['bytes'] / 1e6:.1f} MB"
        rows.append([name, f"{row['score']:.2f}", f"{row['divergence']:.4f}", size, *entries])
    text = table(["model", "score", "KL", "weights", *shapes], rows)
    metric = line["models"]["original"]["metric_name"]
    clock = "CPU time" if line["clock"] == "cpu" else "wall time"
    return (
        f"**{line['model']}, {line['task']}**, original and pruned to a fraction of its MACs "
        f"({line['method']}); {metric}. Milliseconds per forward pass (speedup over the original "
        f"in PyTorch) by batch size x tokens; {clock}, {device_of(line)}.\n\n{text}"
    )


def pruning_time(lines: Sequence[Line]) -> str:
    """A row for every method and number of processes: seconds, training steps, peak memory."""
    heads = ["model, examples", "method", "processes", "seconds", "by stage"]
    heads += ["time / forward-backward pass", "time / lower bound", "peak memory (loading alone)"]
    heads += ["same masks"]

    def rows() -> Iterator[list[str]]:
        for line in lines:
            stages = [f"{name} {own:.1f}" for name, own in line["seconds"].items()]
            passes = [line["times_forward_backward"], line["times_floor"]]
            peaks = [line["peak_bytes"], line["load_peak_bytes"]]
            shown = [f"{peak / 1e9:.2f} GB" if peak else "" for peak in peaks]
            yield [
                f"{line['model']}, {line['requested_samples']:,}",
                line["method"],
                str(line["processes"]),
                f"{line['seconds']['prune_total']:.1f}",
                ", ".join(stage for stage in stages if not stage.startswith("prune_total")),
                *("" if value is None else f"{value:.2f}" for value in passes),
                f"{shown[0]} ({shown[1]})" if peaks[0] else "",
                {None: "", True: "yes", False: "NO"}[line["same_masks"]],
            ]

    devices = "; ".join(dict.fromkeys(device_of(line) for line in lines))
    return f"{devices}.\n\n{table(heads, rows())}"


def scale(lines: Sequence[Line]) -> str:
    """A row for every size and machine: of each stage the seconds and the peak memory.

    Samples miss short peaks, which the operating system's own count for the process includes.
    """
    stages = ("collect", "search", "compact", "tune")

    def rows() -> Iterator[list[str]]:
        for line in sorted(lines, key=_scale_order):
            sampled = max(line["peak_bytes"].values())
            peak = max(sampled, line.get("peak_resident_bytes") or 0)
            tokens = f"{line['dtype']}, {line['samples']} x {line['length']}"
            offload = line.get("offload", "none")
            yield [
                f"{device_of(line)}, {tokens}",
                "" if offload == "none" else offload,
                f"{line['params'] / 1e6:,.0f} M",
                f"{line['weight_bytes'] / 1e9:.2f} GB",
                *(
                    f"{line['seconds'][name]:,.0f} s, {line['peak_bytes'][name] / 1e9:.1f} GB"
                    for name in stages
                ),
                f"{line['seconds']['wall']:,.0f} s",
                f"{peak / 1e9:.1f} GB, {peak / line['weight_bytes']:.1f} x weights",
            ]

    heads = ["machine, tokens", "offload", "parameters", "weights", *stages, "total", "peak"]
    return table(heads, rows())


def _scale_order(line: Line) -> tuple[Any, ...]:
    size = line["params"], (line.get("offload") or "none") != "none"
    return device_of(line), line["dtype"], line["samples"], line["length"], *size


def large_models(lines: Sequence[Line]) -> str:
    """Plans of large models by number of cards, and the same arithmetic beside measured rows."""
    stages = ("collect", "search", "tune")
    plans = [line for line in lines if line["what"] == "plan"]
    checks = [line for line in lines if line["what"] == "check"]

    def planned() -> Iterator[list[str]]:
        for line in plans:
            seconds = line["predicted_seconds"]
            yield [
                line["model"],
                str(line["cards"]),
                f"{sum(line['bytes'].values()) / 1e9:.1f} GB",
                ", ".join(f"{part} {size / 1e9:.1f}" for part, size in line["bytes"].items()),
                *(f"{seconds[stage]:,.0f} s" for stage in stages),
                f"{sum(seconds.values()) / 60:,.0f} min",
                f"{line['bytes_loaded'] / 1e9:,.0f} GB",
                f"{line['bytes_of_states'] / 1e9:,.0f} GB",
            ]

    def checked() -> Iterator[list[str]]:
        for line in sorted(checks, key=_scale_order):
            offload, measured = line["offload"] or "none", line["measured_seconds"]
            memory = f"{line['bytes'] / 1e9:.1f} / {line['measured_bytes'] / 1e9:.1f} GB"
            yield [
                f"{device_of(line)}, {line['samples']} x {line['length']}",
                "" if offload == "none" else offload,
                f"{line['params'] / 1e6:,.0f} M",
                *(
                    "reference"
                    if line["is_reference"]
                    else f"{line['predicted_seconds'][stage] / measured[stage]:.2f}"
                    for stage in stages
                ),
                "" if offload == "none" else memory,
            ]

    first = plans[0] if plans else checks[0]
    heads = ["model", "GPUs", "memory per GPU", "GB by part", *stages, "total", "weights loaded"]
    own_heads = ["machine, tokens", "offload", "parameters", *stages]
    own_heads += ["memory, calculated / measured"]
    return (
        f"{first['samples']:,} x {first['length']} tokens in batches of {first['batch_size']}, "
        f"{first['dtype']}, {first['constraint']:g} of the MACs; layers in host memory. Seconds "
        f"are multiply-adds divided by the rates measured with {first.get('reference')} on "
        f"{first['device_name']}.\n\n{table([*heads, 'hidden states'], planned())}\n"
        "The same calculation for measured rows: calculated / measured seconds, at the rates of "
        f"the largest model on the same machine and tokens.\n\n{table(own_heads, checked())}"
    )


def collection(lines: Sequence[Line]) -> str:
    """A row for every size: CPU seconds of both ways, and the peak memory beyond the weights."""

    def rows() -> Iterator[list[str]]:
        for group in grouped(lines, ("size", "samples", "length", "batch_size", "device_name")):
            by_way = {line["way"]: line for line in group}
            if len(by_way) < 2:
                continue
            whole, layers = by_way["whole"], by_way["layers"]
            yield [
                f"{device_of(whole)}, {whole['samples']} x {whole['length']}",
                f"{whole['weight_bytes'] / 1e9:.2f} GB",
                *(f"{line['seconds']:.1f} s" for line in (whole, layers)),
                f"{layers['seconds'] / whole['seconds']:.2f}",
                *(f"{line['peak_bytes'] / 1e9:.2f} GB" for line in (whole, layers)),
                f"{(whole['peak_bytes'] - layers['peak_bytes']) / 1e9:.2f} GB",
            ]

    heads = ["machine, tokens", "weights", "whole model", "layer by layer", "ratio"]
    heads += ["peak, whole model", "peak, layer by layer", "saved"]
    return table(heads, rows())


def first_model(lines: Sequence[Line]) -> str:
    """A row for every machine and commit: seconds by step, bytes on the disk."""
    heads = ["machine", "commit", "clone", "install", "prune", "total", "environment"]
    heads += ["pruned model", "repository"]

    def rows() -> Iterator[list[str]]:
        for line in lines:
            steps = [f"{line['seconds'][name]:.0f} s" for name in (*heads[2:5], "total")]
            sizes = [line["bytes"][name] for name in ("environment", "model", "repository")]
            yield [
                f"{line['cores']} cores, load {line['load_average']:g}",
                line["cloned_commit"][:7],
                *steps,
                *(f"{size / 1e6:,.0f} MB" for size in sizes),
            ]

    return table(heads, rows())
