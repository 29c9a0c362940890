"""README.md of an output folder: the model card, which the hub shows with its evaluation results.

It has the measurements, their uncertainty, and what was not measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rfprune.report.layers import kind_name, kinds_of, removed_layers, stacks_of
from rfprune.report.plots import PLOTS_FOLDER
from rfprune.report.report_json import Report
from rfprune.report.summary import (
    DETAIL_SCORES,
    EXPORT_HEADINGS,
    SUMMARY_HEADINGS,
    auto_class,
    export_caption,
    export_lines,
    export_rows,
    is_embedder,
    is_plain,
    is_reranker,
    latency_lines,
    max_drop_lines,
    removes_units,
    scoring_line,
    seconds_line,
    sparsity_lines,
    summary_rows,
    target_text,
    vocabulary_lines,
)
from rfprune.settings import Settings
from rfprune.tasks.registry import TASKS, Task

CARD_FILE = "README.md"
UNKNOWN_REPOSITORY = "<this repository, or the path of this folder>"
"""Stands in the card for the hub id until a push fills it in."""

_TEMPLATES = Path(__file__).with_name("templates")
# Scores that are a share of correct answers have the standard error of a proportion.
_PROPORTIONS = ("accuracy", "exact", "exact_match")
_OTHER_LINES = {"method", "seed", "use_labels"}
_PIPELINES = {
    "classification": "text-classification",
    "regression": "text-classification",
    "multi-label": "text-classification",
    "multiple-choice": "multiple-choice",
    "token-classification": "token-classification",
    "image-classification": "image-classification",
    "language-modeling": "text-generation",
    "similarity": "sentence-similarity",
    "question-answering": "question-answering",
    "seq2seq": "translation",
}


def write_card(report: Report, folder: Path, repository: str | None = None) -> Path:
    """Write folder/README.md; `repository` is its hub id, if known."""
    path = folder / CARD_FILE
    path.write_text(render_card(report, repository), encoding="utf-8")
    return path


def set_repository(folder: Path, repository: str) -> None:
    """Put the hub id into a card that was written before it was known."""
    path = folder / CARD_FILE
    text = path.read_text(encoding="utf-8")
    if UNKNOWN_REPOSITORY in text:
        path.write_text(text.replace(UNKNOWN_REPOSITORY, repository), encoding="utf-8")


class Markdown(str):
    """Text that is Markdown already; any other text is escaped in the card."""

    __slots__ = ()


def escape_markdown(text: object) -> str:
    """Text that Markdown shows as it is, on one line, also within a table.

    Returns:
        `Markdown` unchanged; anything else as a string, with a backslash before each character that
        has a meaning, and without line breaks.
    """
    if isinstance(text, Markdown):
        return text
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]<>|~&#$])", r"\\\1", line)


def code_span(text: str) -> Markdown:
    """Text as inline code, in more backticks than it has in a row."""
    line = " ".join(text.split())
    ticks = "`" * (_longest_backticks(line) + 1)
    space = " " if "`" in (line[:1], line[-1:]) else ""
    return Markdown(f"{ticks}{space}{line}{space}{ticks}")


def code_block(text: str) -> Markdown:
    """Text as a fenced code block."""
    fence = "`" * max(3, _longest_backticks(text) + 1)
    return Markdown(f"{fence}\n{text}\n{fence}")


def _longest_backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def render_card(report: Report, repository: str | None = None) -> str:
    """The card as text: metadata for the hub, then Markdown for people."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    task = TASKS.get(report["task"])
    settings = report["settings"]
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        undefined=StrictUndefined,
        finalize=escape_markdown,
        autoescape=False,  # the card is Markdown: `finalize` escapes it
    )
    environment.filters["markdown"] = Markdown
    card = environment.get_template("card.md.jinja").render(
        metadata=Markdown(_metadata(report, task).to_yaml()),
        name=_name(report),
        base=_base(report),
        headings=SUMMARY_HEADINGS,
        rows=summary_rows(report),
        exports=export_rows(report),
        exports_caption=export_caption(report),
        export_headings=EXPORT_HEADINGS,
        export_lines=export_lines(report),
        scoring=scoring_line(report),
        standard_error=_standard_error_text(report),
        score_limits=_score_limits(report, task),
        has_plots=bool(report["layers"]),
        plots=PLOTS_FOLDER,
        units_kept=_units_kept(report),
        repository=Markdown(repository or UNKNOWN_REPOSITORY),
        auto_class=Markdown(auto_class(report)),
        is_plain=is_plain(report),
        is_embedder=is_embedder(report),
        is_reranker=is_reranker(report),
        is_image_model="image" in _kind(report, task),
        command=code_block(report["command"]),
        method=_method(settings, report["method"]),
        labels="with their labels" if settings.get("use_labels") else "without their labels",
        target=target_text(report),
        removes_units=removes_units(report),
        sparsity_lines=sparsity_lines(report),
        vocabulary_lines=vocabulary_lines(report),
        search=[*latency_lines(report), *max_drop_lines(report)],
        seconds=seconds_line(report["seconds"]),
        versions=", ".join(f"{name} {value}" for name, value in report["versions"].items()),
        threads=_threads(report["latency"]),
        report=report,
    )
    return card.rstrip() + "\n"


def _metadata(report: Report, task: Task | None) -> Any:
    """The metadata that the hub reads: base model, task and scores."""
    from huggingface_hub import ModelCardData

    results = [] if task is None else _results(report, task)
    tags = [] if is_plain(report) else ["custom_code"]
    if is_embedder(report):
        tags = ["sentence-transformers", "feature-extraction", *tags]
    return ModelCardData(
        library_name="sentence-transformers" if is_embedder(report) else "transformers",
        base_model=_hub_id(report["source"]),
        pipeline_tag=_pipeline(report, task),
        datasets=None if task is None else [task.hub_path],
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        tags=["rfprune", "pruned", "structured-pruning", "compression", *tags],
        model_name=_name(report),
        eval_results=results or None,
    )


def _results(report: Report, task: Task) -> list[Any]:
    """The scores of the pruned model as evaluation results of the hub.

    They are in the unit of the evaluate library: a fraction for GLUE, points of 100 for SQuAD.
    """
    from huggingface_hub import EvalResult

    in_points = task.kind == "question-answering"
    own_data = " (data from a local folder)" if report.get("data_dir") else ""
    scores = report["scores"]["pruned"]
    return [
        EvalResult(
            task_type=_PIPELINES[task.kind],
            dataset_type=task.hub_path,
            dataset_name=f"{task.name}{own_data}",
            dataset_config=task.hub_config,
            dataset_split="+".join(task.validation_splits),
            metric_type="exact_match" if name == "exact" else name,
            metric_name=f"{name} on {report['evaluated_examples']} examples",
            metric_value=round(value if in_points else value / 100, 6),
        )
        for name, value in sorted(scores.items(), key=lambda item: item[0] != task.metric_name)
        if value is not None and not name.startswith(DETAIL_SCORES)
    ]


def _hub_id(source: str) -> str | None:
    """The hub id of the base model; None for a local folder."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if Path(source).expanduser().exists():
        return None
    try:
        validate_repo_id(source)
    except HFValidationError:
        return None
    return source


def _model_name(report: Report) -> str:
    """The last part of the model's name: the path of a local folder is private."""
    name: str = report["model"].rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    return name or "model"


def _name(report: Report) -> str:
    metric, ratio = report["metric"], report["constraint"]
    parts = [] if ratio is None else [f"{metric}-{ratio:g}"]
    if report.get("sparsity"):
        parts.append(f"sparsity-{report['settings']['sparsity'].replace(':', 'of')}")
    return "-".join([_model_name(report), report["task"], "pruned", *parts])


def _base(report: Report) -> Markdown:
    base = _hub_id(report["source"])
    if base is not None:
        return Markdown(f"[{escape_markdown(base)}](https://huggingface.co/{base})")
    return Markdown(f"The checkpoint {code_span(_model_name(report))}")


def _kind(report: Report, task: Task | None) -> str:
    return str(report.get("kind") or ("classification" if task is None else task.kind))


def _pipeline(report: Report, task: Task | None) -> str:
    if report["metric_name"] == "rougeL":
        return "summarization"
    return _PIPELINES[_kind(report, task)]


def standard_error(score: float, count: int) -> float:
    """Standard error, in points, of a share of correct answers among `count` examples."""
    share = min(max(score / 100, 0.0), 1.0)
    return 100 * math.sqrt(share * (1 - share) / count)


def _standard_error_text(report: Report) -> str:
    score, count = report["pruned"]["score"], report["evaluated_examples"]
    if report["metric_name"] not in _PROPORTIONS or score is None or not count:
        return ""
    return (
        f"The standard error of such a score on {count} examples is about "
        f"{standard_error(score, count):.1f} points; differences below twice that may be noise."
    )


def _score_limits(report: Report, task: Task | None) -> str:
    split = "validation" if task is None else " and ".join(task.validation_splits)
    text = (
        f"The score is from {report['evaluated_examples']} examples of the {split} data and one "
        f"calibration sample (seed {report['seed']})"
    )
    if report["metric_name"] not in _PROPORTIONS:
        text += f"; no standard error was computed for {report['metric_name']}"
    return f"{text}. The test data was not used, and other seeds may give other scores."


def _units_kept(report: Report) -> list[str]:
    """One line per kind of units, and per stack of layers if there are two: 8, 7, ... of 12."""
    before = report.get("original_layers")
    lines = [removed] if (removed := removed_layers(report)) else []
    for kind in kinds_of(report):
        for stack in stacks_of(report):
            counts = ", ".join(map(str, stack.counts(report["layers"], kind)))
            had = set(stack.counts(before, kind)) if before else set()
            total = f" (of {had.pop()} each)" if len(had) == 1 else ""
            where = f"first {stack.name} layer to last".replace("  ", " ")
            if counts or not stack.name:
                lines.append(f"{kind_name(report, kind)} kept, {where}{total}: {counts}")
    return lines


def _method(settings: Mapping[str, Any], method: str) -> str:
    """The method and the settings that differ from their defaults; seed and labels have lines."""
    defaults = asdict(Settings())
    values = [
        f"{name} {value}"
        for name, value in settings.items()
        if name not in _OTHER_LINES and value != defaults.get(name)
    ]
    return f"{method} ({', '.join(values)})" if values else method


def _threads(conditions: Mapping[str, Any]) -> str:
    count = conditions.get("threads")
    if count is None:
        return ""
    return f", {count} thread" + ("" if count == 1 else "s")
