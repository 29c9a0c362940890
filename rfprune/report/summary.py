"""Rows and sentences about one run, made from its report.json alone.

The console table, the page and the model card show the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from rfprune.report.report_json import STAGES, Report
from rfprune.settings import GGUF_TYPES
from rfprune.tasks.registry import AUTO_CLASSES, PER_TOKEN_KINDS

Row = tuple[str, ...]

METRIC_NAMES = {"mac": "MACs", "params": "parameters", "memory": "memory", "latency": "latency"}
SUMMARY_HEADINGS = ("", "original", "pruned", "pruned / original")
EXPORT_HEADINGS = ("model and runtime", "score", "size", "latency", "speedup")

DETAIL_SCORES = ("HasAns_", "NoAns_", "best_")
"""SQuAD 2.0 has a dozen scores; those with these prefixes are in report.json alone."""

_RUNTIMES = {
    "onnx": "pruned, ONNX Runtime",
    "onnx_int8": "pruned, ONNX Runtime, int8",
    "openvino": "pruned, OpenVINO",
    "openvino_int8": "pruned, OpenVINO, int8",
    **{f"gguf_{kind}": f"pruned, llama.cpp, {kind}" for kind in GGUF_TYPES},
}
"""Labels of the exports that another runtime runs, by their names in the report."""


def title(report: Report) -> str:
    """Model, task, constraint and method of a run."""
    how = [_method(report)] if removes_units(report) else []
    how.append(_number(report["samples"], "calibration example"))
    return f"{report['model']} on {report['task']}, {target_text(report)} ({', '.join(how)})"


def removes_units(report: Report) -> bool:
    """Whether heads and neurons were removed."""
    return report["constraint"] is not None or bool(report.get("sizes"))


def target_text(report: Report) -> str:
    """What the run was asked for: pruned to 50% of its MACs, with 2:4 zeros by obs."""
    parts = []
    if report.get("sizes"):
        parts.append(f"pruned to the sizes of {report['sizes']}")
    elif removes_units(report):
        metric = METRIC_NAMES.get(report["metric"], report["metric"])
        searched = bool(report.get("max_drop"))  # so no size was asked for
        ratio = round(kept_ratio(report), 3) if searched else report["constraint"]
        parts.append(f"pruned to {percent(ratio)} of its {metric}")
    if report.get("sparsity"):
        settings = report["settings"]
        pattern, scope = settings["sparsity"], settings["sparsity_scope"]
        zeros = f"{pattern} sparsity" if ":" in pattern else f"{percent(float(pattern))} zeros"
        where = "" if scope == "layer" else f" ({scope})"
        parts.append(f"with {zeros} by {settings['sparsity_criterion']}{where}")
    if tokens := report.get("vocabulary"):
        parts.append(f"with {tokens['pruned']:,} of its {tokens['original']:,} tokens")
    return ", ".join(parts)


def kept_ratio(report: Report) -> float:
    """The fraction of the original that was kept, in the metric of the constraint."""
    share: float = report["achieved"].get(report["metric"], report["constraint"])
    return share


def percent(ratio: float) -> str:
    """A ratio as people write it: 12.5%, and 7% rather than 7.000000000000001%."""
    return f"{100 * ratio:.6g}%"


def _method(report: Report) -> str:
    """The name of the method; for the classical criteria, which criterion and allocation."""
    if report["method"] != "importance":
        return str(report["method"])
    settings = report["settings"]
    return f"{settings['importance']} importance, {settings['allocation']} allocation"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def summary_rows(report: Report) -> list[Row]:
    """Scores and costs as text under SUMMARY_HEADINGS: the original, the pruned model, the change.

    The last column has the difference of the scores, and the ratio of the costs.
    """
    conditions = report["latency"]
    shape = f"{conditions['batch_size']} x {conditions['sequence_length']}"
    return [
        *_score_rows(report),
        _cost_row(report, f"MACs ({report['mean_tokens']:.0f} tokens)", "macs", _count),
        *_token_rows(report),
        _cost_row(report, "parameters", "params", _count),
        _cost_row(report, f"weights ({report['stored_dtype']})", "bytes", _megabytes),
        *_sparsity_rows(report),
        _cost_row(report, f"latency (batch {shape})", "latency_ms", _milliseconds),
    ]


def _token_rows(report: Report) -> list[Row]:
    """The number of tokens; empty if all were kept."""
    tokens = report.get("vocabulary")
    if not tokens:
        return []
    before, after = tokens["original"], tokens["pruned"]
    counts = _count(before, before), _count(after, before)
    return [("tokens of the vocabulary", *counts, f"{after / before:.1%}")]


def vocabulary_lines(report: Report) -> list[str]:
    """How the trimmed tokenizer encodes the validation texts; empty if all tokens were kept."""
    tokens = report.get("vocabulary")
    if not tokens:
        return []
    held_out = tokens["held_out"]
    changed, texts = held_out["changed_texts"], held_out["texts"]
    before, after = held_out["tokens_before"], held_out["tokens_after"]
    unknown = held_out["unknown_after"] - held_out["unknown_before"]
    lines = [
        f"The trimmed tokenizer encodes {changed} of {texts} validation texts "
        f"({changed / texts:.1%}) to other pieces: {after / before - 1:+.2%} tokens, and "
        f"{_number(unknown, 'more unknown token')}."
    ]
    if report.get("kind") == "language-modeling":
        lines.append("Perplexities are per token of the original tokenizer.")
    return lines


def _sparsity_rows(report: Report) -> list[Row]:
    """Non-zero parameters and compressed bytes; empty without zeros."""
    zeros = report.get("sparsity")
    if not zeros:
        return []
    before, after = report["original"], report["pruned"]
    left = after["params"] - zeros["zeros"], after["bytes"] - zeros["saved_bytes"]
    return [
        (
            "non-zero parameters",
            _count(before["params"], before["params"]),
            _count(left[0], before["params"]),
            f"{left[0] / before['params']:.1%}",
        ),
        (
            "weights, compressed",
            _megabytes(before["bytes"]),
            _megabytes(left[1]),
            f"{left[1] / before['bytes']:.1%}",
        ),
    ]


def sparsity_lines(report: Report) -> list[str]:
    """Density by layer, the meaning of the compressed size, and what runs faster where."""
    zeros = report.get("sparsity")
    if not zeros:
        return []
    pattern = report["settings"]["sparsity"]
    layers = ", ".join(f"{100 * each:.3g}" for each in zeros["layers"])
    faster = (
        "OpenVINO can decompress sparse int8 weights on Intel processors with AMX "
        "(CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE); other processors, GPUs and ONNX Runtime gain "
        "nothing"
    )
    if pattern == "2:4":
        faster = (
            "on NVIDIA GPUs from Ampere on, torch.sparse.to_sparse_semi_structured runs 2:4 "
            "weights of half precision on sparse tensor cores"
        )
    return [
        f"Not zero in the linear maps of the layers: {100 * zeros['density']:.4g}% of the weights; "
        f"by layer, in percent: {layers}. Embeddings, norms and heads of tasks have no zeros.",
        "Compressed weights are the non-zero values and one bit per weight for their places; the "
        "files of this folder are not compressed.",
        f"In plain PyTorch zeros cost as much time and memory as other numbers; {faster}.",
    ]


def _score_rows(report: Report) -> list[Row]:
    """The main score of the task first."""
    main, scores = report["metric_name"], report["scores"]
    names = [name for name in scores["original"] if not name.startswith(DETAIL_SCORES)]
    rows: list[Row] = []
    for name in sorted(names, key=lambda name: name != main):
        before, after = scores["original"][name], scores["pruned"].get(name)
        change = score_change(report, before, after)
        rows.append((name, score_text(before), score_text(after), change))
    return rows


def _cost_row(report: Report, name: str, key: str, show: Callable[[float, float], str]) -> Row:
    before, after = report["original"][key], report["pruned"][key]
    ratio = f"{after / before:.1%}"
    if key == "latency_ms":
        ratio += f" (speedup {before / after:.2f}x)"
    largest = max(before, after)
    return (name, show(before, largest), show(after, largest), ratio)


def score_text(score: float | None) -> str:
    """A score with two decimals; "undefined" for None."""
    return "undefined" if score is None else f"{score:.2f}"


def score_change(report: Report, before: float | None, after: float | None) -> str:
    """The change in points, or in percent where lower is better (perplexity)."""
    if before is None or after is None:
        return ""
    # Adding 0.0 turns the -0.0 of a rounded small loss into 0.0.
    if not report.get("higher_is_better", True):
        return f"{round(100 * (after / before - 1), 1) + 0.0:+.1f}%"
    return f"{round(after - before, 2) + 0.0:+.2f} points"


def _count(number: float, largest: float) -> str:
    """In the unit of the largest number of the row."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"


def _megabytes(number: float, _: float = 0.0) -> str:
    return f"{number / 1e6:.2f} MB"


def _milliseconds(number: float, largest: float) -> str:
    """With about three digits: a measured time has no more."""
    return f"{number:.{0 if largest >= 100 else 1 if largest >= 10 else 2}f} ms"


def scoring_line(report: Report) -> str:
    """The number of scored examples, and the divergence from the original."""
    examples = _number(report["evaluated_examples"], "validation example")
    if report["divergence"] is None:
        return f"Scored on {examples}."
    name = "KL divergence from the original's predictions"
    if report["task"] == "stsb" or report.get("kind") == "regression":
        name = "half the mean squared difference from the original's outputs"
    if report.get("kind") in PER_TOKEN_KINDS:
        name += ", in nats per token"
    if report.get("kind") == "seq2seq":
        name += " of the texts that it writes"
    if report.get("kind") == "similarity":
        name = "half the mean squared distance from the original's embeddings"
    return f"Scored on {examples}; {name}: {report['divergence']:.4f}."


def continuation_lines(report: Report) -> list[str]:
    """What the two models write after the same prompt, or from the same sources, as samples."""
    texts = report.get("continuations") or {}
    if written := report.get("written"):
        names = ("source", "target", "original", "pruned")
        return [f"{name.title() + ':':<10}{one[name]!r}" for one in written for name in names]
    if not texts:
        return []
    return [
        f"Prompt:   {texts['prompt']!r}",
        f"Original: {texts['original']!r}",
        f"Pruned:   {texts['pruned']!r}",
    ]


def seconds_line(seconds: Mapping[str, float], cached: Collection[str] = ()) -> str:
    """The time by stage, without stages that did not run; `cached` ones only read a file."""
    stages = ", ".join(
        f"{name} {seconds[name]:.1f}" + " (cached)" * (name in cached)
        for name in STAGES
        if seconds.get(name)
    )
    known = " (original: cached)" if "evaluate" in cached else ""
    return (
        f"Pruning took {seconds['prune_total']:.1f} s ({stages}); loading took "
        f"{seconds['load']:.1f} s, and scoring {seconds['evaluate']:.1f} s{known}."
    )


def latency_lines(report: Report) -> list[str]:
    """Target, predicted and measured latency; empty without a constraint on latency."""
    promise = report.get("promise")
    if not promise:
        return []
    timed = _number(len(promise["attempts"]), "candidate")
    target, predicted, measured = (
        f"{promise[f'{name}_ms']:.3g} ms" for name in ("promised", "predicted", "measured")
    )
    return [
        f"Latency: target {target}, predicted {predicted} from the latency table, measured "
        f"{measured}; {timed} timed."
    ]


def max_drop_lines(report: Report) -> list[str]:
    """The sizes that `--max-drop` tried and how certain its result is; empty without a search."""
    search = report.get("max_drop")
    if not search:
        return []
    tried = ", ".join(
        f"{percent(tried_size(trial))} ({_signed(trial['drop'])})" for trial in search["path"]
    )
    allowed = points_text(search["points"])
    drop = round(search["drop"], 2)
    change = f"loses {drop:.2f}" if drop >= 0 else f"gains {-drop:.2f}"
    lines = [
        f"This is the smallest model found that loses at most {allowed}. Sizes tried, with the "
        f"change of the score: {tried}. The search took {search['seconds']:.0f} s, scoring "
        f"included.",
        f"It {change} points, with a standard error of {search['standard_error']:.2f}. In "
        f"{search['sure']:.0%} of the resampled validation sets it loses at most {allowed}.",
    ]
    if report["constraint"] <= search["least_possible"]:
        lines.append("No smaller model is possible with this metric.")
    return lines


def trial_line(trial: Mapping[str, float]) -> str:
    """One size that `--max-drop` tried: its score, the change of it, and the divergence."""
    score = f"{trial['score']:.2f} ({_signed(trial['drop'])})"
    return f"{percent(tried_size(trial))}: {score}, divergence {trial['divergence']:.4f}"


def tried_size(trial: Mapping[str, float]) -> float:
    """The fraction of the cost that the model of a trial keeps; reports of earlier versions have
    only the one that was asked for."""
    return round(trial.get("achieved", trial["ratio"]), 3)


def points_text(points: float) -> str:
    """Points of a score with their unit: 1 point, 0.5 points."""
    return f"{points:g} point" + ("" if points == 1 else "s")


def _signed(drop: float) -> str:
    """The change in points that a drop is; adding 0.0 turns -0.0 into 0.0."""
    return f"{round(-drop, 2) + 0.0:+.2f}"


def export_rows(report: Report) -> list[Row]:
    """PyTorch models and exports side by side under EXPORT_HEADINGS; empty if none was timed."""
    exports = report.get("exports") or {}
    conditions = exports.get("latency")
    if conditions is None:
        return []
    entries = [
        (f"{name}, PyTorch", report[name] | {"latency_ms": conditions[f"{name}_ms"]})
        for name in ("original", "pruned")
    ]
    timed = {name for name, entry in exports.items() if "latency_ms" in entry}
    entries += [(label, exports[name]) for name, label in _RUNTIMES.items() if name in timed]
    slowest = max(entry["latency_ms"] for _, entry in entries)
    return [
        (
            label,
            score_text(entry["score"]),
            _megabytes(entry["bytes"]),
            _milliseconds(entry["latency_ms"], slowest),
            f"{conditions['original_ms'] / entry['latency_ms']:.2f}x",
        )
        for label, entry in entries
    ]


def export_caption(report: Report) -> str:
    """The conditions under which the exports were timed."""
    conditions = (report.get("exports") or {}).get("latency")
    if conditions is None:
        return "Exports"
    return (
        f"Exports, timed together on the CPU (batch {conditions['batch_size']} x "
        f"{conditions['sequence_length']}, {_number(conditions['threads'], 'thread')})"
    )


def export_lines(report: Report) -> list[str]:
    """A sentence per export: path, size, and largest difference from the pruned model."""
    lines = []
    for name, entry in (report.get("exports") or {}).items():
        if name == "latency":
            continue
        text = f"{entry['path']}: {_megabytes(entry['bytes'])}"
        if entry.get("max_difference") is not None:
            shapes = ", ".join(" x ".join(map(str, shape)) for shape in entry["checked_on"])
            text += (
                f"; its outputs differ from the pruned model's by at most "
                f"{entry['max_difference']:.1e} (checked on inputs of {shapes})"
            )
        lines.append(f"{text}.")
    return lines


def reload_line(report: Report) -> str:
    """The one line of Python that loads the pruned model."""
    folder = json.dumps(report["output_dir"], ensure_ascii=False)
    code = "" if is_plain(report) else ", trust_remote_code=True"
    if is_embedder(report):
        return f"sentence_transformers.SentenceTransformer({folder}{code})"
    if is_reranker(report):
        return f"sentence_transformers.CrossEncoder({folder}{code})"
    return f"transformers.{auto_class(report)}.from_pretrained({folder}{code})"


def auto_class(report: Report) -> str:
    """The class of transformers that loads the pruned model."""
    kind: Any = report.get("kind")
    if kind is None:  # early reports have no kind of task
        kind = "question-answering" if "squad" in report["task"] else "classification"
    found: str = AUTO_CLASSES[kind]
    return found


def is_embedder(report: Report) -> bool:
    """Whether sentence-transformers can load the pruned model."""
    return bool(report.get("embedder"))


def is_reranker(report: Report) -> bool:
    """Whether the pruned model is a cross-encoder of sentence-transformers."""
    return bool(report.get("reranker"))


def is_plain(report: Report) -> bool:
    """Whether the pruned model is a plain architecture, which needs no code of its own."""
    return bool(report.get("plain", report.get("settings", {}).get("uniform")))
