"""Tables of zeros within the layers: what each granularity costs, and what it gains by runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from scripts.bench.harness import Line, grouped
from scripts.bench.markdown import device_of, table


def granularities(lines: Sequence[Line]) -> str:
    """A table for each model and task: variants in rows, by the fraction of non-zeros."""
    names = ("model", "task", "requested_samples", "eval_limit")
    return "\n".join(_granularities(own) for own in grouped(lines, names))


def _granularities(lines: Sequence[Line]) -> str:
    first = lines[0]
    heads = [
        *("non-zero layer weights", "pattern, criterion", f"{first['metric_name']}", "KL"),
        *("non-zero parameters", "compressed, float16"),
    ]
    examples = f"{first['samples']} calibration examples, {first['evaluated_examples']} scored"

    def rows() -> Iterator[list[str]]:
        megabytes = first["original_bytes"] / 1e6
        millions = first["original_params"] / 1e6
        yield ["1", "original", f"{first['original_score']:.2f}", "0",
               f"{millions:.1f} M", f"{megabytes:.1f} MB"]  # fmt: skip
        for group in grouped(sorted(lines, key=lambda line: -line["nonzeros"]), ("nonzeros",)):
            for line in sorted(group, key=lambda line: float(line["divergence"])):
                yield [
                    f"{line['nonzeros']:g}",
                    line["variant"],
                    f"{line['score']:.2f}",
                    f"{line['divergence']:.4f}",
                    f"{line['nonzero_params'] / 1e6:.1f} M",
                    f"{line['compressed_bytes'] / 1e6:.1f} MB",
                ]

    text = table(heads, rows())
    return f"**{first['model']}, {first['task']}** ({examples}), lowest KL first:\n\n{text}"


def speed(lines: Sequence[Line]) -> str:
    """A table for each model: milliseconds by runtime, as fractions of the original's."""

    def rows() -> Iterator[list[str]]:
        for line in lines:
            shape = f"{line['batch_size']} x {line['length']}"
            for name, one in line["models"].items():
                original = line["models"]["original"]["ms"]
                times = [
                    f"{value:.1f} ms ({value / original[runtime]:.2f})"
                    for runtime, value in one["ms"].items()
                ]
                yield [
                    line["model"],
                    shape,
                    name,
                    *times,
                    f"{one['compressed_bytes'] / 1e6:.1f} MB",
                ]

    runtimes = list(lines[0]["models"]["original"]["ms"])
    heads = ["model", "batch", "weights", *runtimes, "compressed, float16"]
    text = table(heads, rows())
    devices = ", ".join(dict.fromkeys(device_of(line) for line in lines))
    return f"{text}\n{devices}; CPU time, median of {lines[0]['rounds']} rounds.\n"
