"""The tasks as data: columns, label order, metric and lengths, one row a task.

Lengths are those of Kwon et al. 2022; columns and label ids are those of the hub's datasets.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from rfprune.errors import RfpruneWarning, UserError

Kind = Literal[
    "classification",
    "regression",
    "multi-label",
    "multiple-choice",
    "token-classification",
    "image-classification",
    "question-answering",
    "language-modeling",
    "similarity",
]

AUTO_CLASSES: Mapping[Kind, str] = MappingProxyType(
    {
        "classification": "AutoModelForSequenceClassification",
        "regression": "AutoModelForSequenceClassification",
        "multi-label": "AutoModelForSequenceClassification",
        "multiple-choice": "AutoModelForMultipleChoice",
        "token-classification": "AutoModelForTokenClassification",
        "image-classification": "AutoModelForImageClassification",
        "question-answering": "AutoModelForQuestionAnswering",
        "language-modeling": "AutoModelForCausalLM",
        "similarity": "AutoModel",
    }
)
"""The class of transformers that loads a checkpoint for each kind of task."""

WITH_CLASSES: tuple[Kind, ...] = (
    "classification",
    "multi-label",
    "token-classification",
    "image-classification",
)
"""Kinds of task whose label ids the checkpoint has names for."""

GLUE = "nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    """What one task reads and what it is scored by.

    `label_names` is in the order of the label ids and empty where there are no classes;
    `label_range` bounds a regression's labels; `max_length` and `stride` are in tokens. Where less
    is better (not `higher_is_better`), the score is no number of points, as for a perplexity.
    """

    name: str
    kind: Kind
    hub_path: str
    hub_config: str | None
    text_columns: tuple[str, ...]
    label_column: str
    label_names: tuple[str, ...]
    metric_name: str
    max_length: int = 128
    stride: int = 0
    train_split: str = "train"
    validation_splits: tuple[str, ...] = ("validation",)
    label_range: tuple[float, float] | None = None
    higher_is_better: bool = True

    @property
    def num_labels(self) -> int:
        """Outputs of the task's head: classes, 1 for a regression, 2 (start, end) for QA."""
        return {"regression": 1, "question-answering": 2}.get(self.kind, len(self.label_names))


def _glue(
    name: str,
    text_columns: tuple[str, ...],
    label_names: tuple[str, ...],
    metric_name: str = "accuracy",
    **changes: Any,
) -> Task:
    return Task(
        name, "classification", GLUE, name, text_columns, "label", label_names, metric_name,
        **changes,
    )  # fmt: skip


def _squad(name: str) -> Task:
    return Task(
        name, "question-answering", f"rajpurkar/{name}", None, ("question", "context"),
        "answers", (), "f1", max_length=384, stride=128,
    )  # fmt: skip


_SENTENCES = ("sentence1", "sentence2")
_TASKS = (
    _glue("mrpc", _SENTENCES, ("not_equivalent", "equivalent")),
    _glue("sst2", ("sentence",), ("negative", "positive"), max_length=64),
    Task(
        "stsb", "regression", GLUE, "stsb", _SENTENCES, "label", (), "spearmanr",
        label_range=(0.0, 5.0),
    ),
    _glue(
        "cola", ("sentence",), ("unacceptable", "acceptable"), "matthews_correlation",
        max_length=64,
    ),
    _glue("rte", _SENTENCES, ("entailment", "not_entailment")),
    _glue("qnli", ("question", "sentence"), ("entailment", "not_entailment")),
    _glue("qqp", ("question1", "question2"), ("not_duplicate", "duplicate")),
    _glue(
        "mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"),
        validation_splits=("validation_matched", "validation_mismatched"),
    ),
    _glue("wnli", _SENTENCES, ("not_entailment", "entailment")),
    _squad("squad"),
    _squad("squad_v2"),
)  # fmt: skip
TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _TASKS})
CUSTOM = "custom"
LANGUAGE_MODELING = "language-modeling"
SIMILARITY = "similarity"
OWN_DATA = (CUSTOM, LANGUAGE_MODELING, SIMILARITY)
"""Tasks that a checkpoint and a data folder make, see `rfprune.tasks.custom`."""

TASK_NAMES = (*TASKS, *OWN_DATA)

BLOCK_TOKENS = 512
"""Tokens that a language model reads at once, where nobody asks for another number."""

_SAMPLES, _BATCH_SIZE = 2048, 32
# An example of a language model is a block of tokens, with logits over the vocabulary for each.
_OF_TASK = {LANGUAGE_MODELING: (256, 4)}


def default_samples(task_name: str) -> int:
    """Calibration examples of a task, where nobody asks for another number."""
    return _OF_TASK.get(task_name, (_SAMPLES, _BATCH_SIZE))[0]


def default_batch_size(task_name: str) -> int:
    """Examples in a batch of a task, where nobody asks for another number."""
    return _OF_TASK.get(task_name, (_SAMPLES, _BATCH_SIZE))[1]


# Other names that checkpoints give to a class, in normal form (see _normal_form).
_SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "not_equivalent": (
        "notparaphrase", "nonparaphrase", "noparaphrase", "notduplicate", "nonduplicate",
        "inequivalent", "nonequivalent", "unequivalent", "different", "no", "false",
    ),
    "equivalent": ("paraphrase", "isparaphrase", "duplicate", "isduplicate", "same", "yes", "true"),
    "negative": ("neg", "bad", "1star"),
    "positive": ("pos", "good", "2star", "2stars", "5star", "5stars"),
    "unacceptable": ("notacceptable", "ungrammatical", "notgrammatical", "no", "false"),
    "acceptable": ("isacceptable", "grammatical", "yes", "true"),
    "entailment": ("entailed", "entails", "entail", "isentailment"),
    "not_entailment": ("nonentailment", "noentailment", "notentailed", "notentails", "notentail"),
    "neutral": (),
    "contradiction": ("contradictory", "contradicts", "contradict"),
}  # fmt: skip
_SAME_AS = {"not_duplicate": "not_equivalent", "duplicate": "equivalent"}


def get_task(name: str) -> Task:
    """The task of that name; UserError names the known ones. `custom` takes more than a name."""
    if name in OWN_DATA:
        raise UserError(
            f"Task {name!r} is made from a checkpoint and a data folder, by rfprune itself, "
            f"scripts/evaluate.py and scripts/finetune.py: choose one of {', '.join(TASKS)} here."
        )
    if name not in TASKS:
        raise UserError(f"Unknown task {name!r}: choose one of {', '.join(TASKS)}.")
    return TASKS[name]


def check_columns(
    text_columns: Sequence[str] | None, label_column: str | None, *, most: int = 2
) -> None:
    """Of `custom`: UserError for over `most` texts, one column twice, or one without a name."""
    names = [*(text_columns or ()), *([] if label_column is None else [label_column])]
    if any(not name for name in names):
        raise UserError("A column's name is empty: give it as the first line of the file does.")
    if len(text_columns or ()) > most:
        number = "one text or two" if most > 1 else "one text here"
        raise UserError(
            f"--text-columns {' '.join(text_columns or ())}: a model reads {number}; name no more "
            f"columns."
        )
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"Column {name!r} is named twice: a text, a second text and the label are "
                f"different columns."
            )


def check_labels(config: Any, task: Task) -> None:
    """Check that a checkpoint's head (its config's `id2label`) answers what the task asks.

    `LABEL_0` and `0` are taken to be in the task's order. Names in another order, or names of
    another task, are a UserError; names nobody knows are taken in order with a RfpruneWarning.
    """
    names = names_in_order(config)
    if len(names) != task.num_labels:
        raise UserError(
            f"Task {task.name} needs a head with {_outputs(task)}, but the checkpoint's has "
            f"{len(names)} ({', '.join(names)}): choose a checkpoint fine-tuned on {task.name}."
        )
    if task.kind != "classification" or task.name == CUSTOM:
        return  # the labels of `custom` are those of the checkpoint
    ids = _label_ids(task)
    found = [ids.get(_normal_form(name)) for name in names]
    if any(label not in (None, position) for position, label in enumerate(found)):
        raise UserError(
            f"The checkpoint's label order is ({', '.join(names)}) but task {task.name} has "
            f"({', '.join(task.label_names)}): its head must be reordered, in weights and "
            f"id2label, or another checkpoint chosen."
        )
    if any(label is None for label in found):
        _unknown_names(names, task)


def _unknown_names(names: list[str], task: Task) -> None:
    """Refuse the names of another task; warn of names that no task has."""
    for other in TASKS.values():
        ids = _label_ids(other)
        if other.kind == "classification" and all(_normal_form(name) in ids for name in names):
            raise UserError(
                f"The checkpoint's labels ({', '.join(names)}) are those of task {other.name}, "
                f"not of {task.name} ({', '.join(task.label_names)}): choose a checkpoint "
                f"fine-tuned on {task.name}."
            )
    warnings.warn(
        f"The checkpoint's labels ({', '.join(names)}) are not known names of task {task.name}: "
        f"they are taken to mean ({', '.join(task.label_names)}), in this order.",
        RfpruneWarning,
        stacklevel=3,
    )


def names_in_order(config: Any) -> list[str]:
    """The checkpoint's label names by label id; UserError where the ids have gaps."""
    named = {int(key): str(name) for key, name in dict(config.id2label).items()}
    if sorted(named) != list(range(len(named))):
        raise UserError(
            f"The checkpoint's id2label has the ids {sorted(named)}: they must run from 0 without "
            f"gaps; mend its config.json."
        )
    return [named[label] for label in range(len(named))]


def _outputs(task: Task) -> str:
    """The outputs of the task's head, in words."""
    if task.kind == "regression":
        return "1 output (a regression)"
    if task.kind == "question-answering":
        return "2 outputs (start and end of a span)"
    return f"{task.num_labels} labels ({', '.join(task.label_names)})"


def _label_ids(task: Task) -> dict[str, int]:
    """Every known name of the task's classes, in normal form, with its label id."""
    ids: dict[str, int] = {}
    for label, name in enumerate(task.label_names):
        synonyms = _SYNONYMS[_SAME_AS.get(name, name)]
        official = (_normal_form(name), _normal_form(_SAME_AS.get(name, name)))
        ids |= dict.fromkeys((*official, *synonyms, f"label{label}", str(label)), label)
    return ids


def _normal_form(name: str) -> str:
    """Lower case, letters and digits alone: NOT_ENTAILMENT and not-entailment are one name."""
    return re.sub(r"[^0-9a-z]", "", name.lower())
