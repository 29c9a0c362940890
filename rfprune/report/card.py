"""README.md of an output folder: the model card, which the hub shows with its evaluation results.

It says what was measured, how sure that is, and what was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rfprune.report.exports_table import HEADINGS, export_caption, export_lines, export_rows
from rfprune.report.layers import kind_name, kinds_of, parts_of
from rfprune.report.plots import PLOTS_FOLDER
from rfprune.report.promise_text import promise_lines
from rfprune.report.search_text import search_lines
from rfprune.report.table import (
    METRIC_NAMES,
    auto_class,
    is_embedder,
    is_plain,
    scoring,
    seconds_line,
    summary_rows,
)
from rfprune.tasks.registry import TASKS, Task

CARD_FILE = "README.md"
UNKNOWN_REPOSITORY = "<this repository, or the path of this folder>"
"""What stands for the name where it is not known yet; a push fills it in."""

_TEMPLATE = Path(__file__).with_name("templates") / "card.md.jinja"
# Scores that are a share of right answers: their sampling error is that of a proportion.
_PROPORTIONS = ("accuracy", "exact", "exact_match")
_DETAILS = ("HasAns_", "NoAns_", "best_")
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
}

Report = Mapping[str, Any]


def write_card(report: Report, folder: Path, repository: str | None = None) -> Path:
    """Write folder/README.md; `repository` is the hub id it will have, if that is known."""
    path = folder / CARD_FILE
    path.write_text(render_card(report, repository), encoding="utf-8")
    return path


def name_repository(folder: Path, repository: str) -> None:
    """Put the hub id into a card that was written before it was known."""
    path = folder / CARD_FILE
    text = path.read_text(encoding="utf-8")
    if UNKNOWN_REPOSITORY in text:
        path.write_text(text.replace(UNKNOWN_REPOSITORY, repository), encoding="utf-8")


def render_card(report: Report, repository: str | None = None) -> str:
    """The card as text: metadata for the hub, then what people read."""
    from huggingface_hub import ModelCard

    task = TASKS.get(report["task"])
    settings, conditions = report["settings"], report["latency"]
    labels = "with their labels" if settings.get("use_labels") else "without their labels"
    processor = "AutoImageProcessor" if "image" in _kind(report, task) else "AutoTokenizer"
    card = ModelCard.from_template(
        _metadata(report, task),
        template_path=str(_TEMPLATE),
        name=_name(report),
        base=_base(report),
        rows=[[_cell(cell) for cell in row] for row in summary_rows(report)],
        exports=export_rows(report),
        exports_label=export_caption(report),
        export_headings=HEADINGS,
        export_lines=export_lines(report),
        scoring=scoring(report),
        noise=_noise(report),
        noise_limit=_noise_limit(report, task),
        has_plots=bool(report["layers"]),
        plots=PLOTS_FOLDER,
        per_layer=_per_layer(report),
        repository=repository or UNKNOWN_REPOSITORY,
        auto_class=auto_class(report),
        processor=processor,
        is_plain=is_plain(report),
        is_embedder=is_embedder(report),
        command=report["command"].replace("```", "'''"),
        method=_method(settings, report["method"]),
        seed=report["seed"],
        samples=report["samples"],
        task=report["task"],
        labels=labels,
        target=f"{100 * report['constraint']:.6g}% of the original's "
        f"{METRIC_NAMES.get(report['metric'], report['metric'])}",
        search=[*promise_lines(report), *search_lines(report)],
        seconds=seconds_line(report["seconds"]),
        device=report["device"],
        dtype=report["dtype"],
        stored_dtype=report["stored_dtype"],
        versions=report["versions"],
        version_list=", ".join(f"{name} {value}" for name, value in report["versions"].items()),
        rounds=conditions.get("rounds", "several"),
        threads=_threads(conditions),
        batch=conditions["batch_size"],
        length=conditions["sequence_length"],
        warnings=[" ".join(warning.split()) for warning in report["warnings"]],
    )
    return str(card).rstrip() + "\n"


def _metadata(report: Report, task: Task | None) -> Any:
    """What the hub reads: what it is made from, what it is for, and its scores."""
    from huggingface_hub import ModelCardData

    results = [] if task is None else _results(report, task)
    code = [] if is_plain(report) else ["custom_code"]
    library = "sentence-transformers" if is_embedder(report) else "transformers"
    if is_embedder(report):
        code = ["sentence-transformers", "feature-extraction", *code]
    return ModelCardData(
        library_name=library,
        base_model=_hub_id(report["source"]),
        pipeline_tag=_PIPELINES[_kind(report, task)],
        datasets=None if task is None else [task.hub_path],
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        tags=["rfprune", "pruned", "structured-pruning", "compression", *code],
        model_name=_name(report),
        eval_results=results or None,
    )


def _results(report: Report, task: Task) -> list[Any]:
    """The scores of the pruned model as the hub's evaluation results.

    In the unit of the evaluate library: a fraction for GLUE, points of 100 for SQuAD.
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
        if value is not None and not name.startswith(_DETAILS)
    ]


def _hub_id(source: str) -> str | None:
    """The base model's id, where it has come from the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if Path(source).expanduser().exists():
        return None
    try:
        validate_repo_id(source)
    except HFValidationError:
        return None
    return source


def _name(report: Report) -> str:
    """Folders are private: of a path its last part is enough."""
    model = report["model"].rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1] or "model"
    return f"{model}-{report['task']}-pruned-{report['metric']}-{report['constraint']:g}"


def _base(report: Report) -> str:
    base = _hub_id(report["source"])
    if base is not None:
        return f"[{base}](https://huggingface.co/{base})"
    return f"The checkpoint `{report['model'].rstrip('/').rsplit('/', 1)[-1]}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _kind(report: Report, task: Task | None) -> str:
    return str(report.get("kind") or ("classification" if task is None else task.kind))


def standard_error(score: float, count: int) -> float:
    """Sampling error, in points, of a share of right answers among `count` examples."""
    share = min(max(score / 100, 0.0), 1.0)
    return 100 * math.sqrt(share * (1 - share) / count)


def _noise(report: Report) -> str:
    name, score = report["metric_name"], report["pruned"]["score"]
    count = report["evaluated_examples"]
    if name not in _PROPORTIONS or score is None or not count:
        return ""
    error = standard_error(score, count)
    return (
        f"The standard error of a score like this on {count} examples is about {error:.1f} points: "
        f"take differences below twice that with care."
    )


def _noise_limit(report: Report, task: Task | None) -> str:
    count = report["evaluated_examples"]
    split = "validation" if task is None else " and ".join(task.validation_splits)
    text = f"The score is from {count} examples of the {split} data"
    if report["metric_name"] in _PROPORTIONS:
        text += f", with one calibration sample (seed {report['seed']})"
    else:
        text += (
            f", with one calibration sample (seed {report['seed']}); no error bar was computed for "
            f"{report['metric_name']}"
        )
    return f"{text}. The test data was not used, and other seeds may give other scores."


def _per_layer(report: Report) -> str:
    """A line a kind, and a stack of layers where there are two: 8, 7, ... of 12."""
    before = report.get("original_layers")
    lines = []
    for kind in kinds_of(report):
        for part in parts_of(report):
            counts = ", ".join(map(str, part.having(report["layers"], kind)))
            had = set(part.having(before, kind)) if before else set()
            whole = f" (of {had.pop()} each)" if len(had) == 1 else ""
            place = f"first {part.name} layer to last".replace("  ", " ")
            if counts or not part.name:
                lines.append(f"- {kind_name(report, kind)} kept, {place}{whole}: {counts}")
    return "\n".join(lines)


def _method(settings: Mapping[str, Any], method: str) -> str:
    """The method and what was set otherwise than by default."""
    told = [
        f"{name} {value}"
        for name, value in settings.items()
        if name not in ("method", "seed", "use_labels") and value not in (None, False)
    ]
    return f"{method} ({', '.join(told)})" if told else method


def _threads(conditions: Mapping[str, Any]) -> str:
    count = conditions.get("threads")
    if count is None:
        return ""
    return f", {count} thread" + ("" if count == 1 else "s")
