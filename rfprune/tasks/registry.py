"""The tasks as data, one row per task: columns, label order, metric and lengths.

Lengths follow Kwon et al. 2022; columns and label ids are those of the hub's datasets.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from rfprune.errors import UserError
from rfprune.settings import WritingSettings

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
    "seq2seq",
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
        "seq2seq": "AutoModelForSeq2SeqLM",
    }
)
"""The class of transformers that loads a checkpoint, by the kind of task."""

KINDS_WITH_LABEL_NAMES: tuple[Kind, ...] = (
    "classification",
    "multi-label",
    "token-classification",
    "image-classification",
)
"""Kinds of task with label names in the checkpoint."""

PER_TOKEN_KINDS: tuple[Kind, ...] = ("language-modeling", "seq2seq")
"""Kinds of task with logits over the vocabulary for every token, which are too large to keep:
another model is compared while it runs beside the original."""

GLUE = "nyu-mll/glue"


@dataclass(frozen=True)
class HeldOut:
    """Rows of the training split that become the validation split.

    Attributes:
        fraction: of all rows, between 0 and 1.
        seed: of the draw; the same rows are drawn for every split and every run.
    """

    fraction: float
    seed: int = 0

    @classmethod
    def from_flags(cls, fraction: float | None, seed: int) -> "HeldOut | None":
        """From --validation-fraction and --seed; None without a fraction."""
        return None if fraction is None else cls(fraction, seed)

    def rows(self, split: str, num_rows: int) -> list[int]:
        """The numbers of the rows of "train" or "validation", ascending; at least one each."""
        order = list(range(num_rows))
        random.Random(self.seed).shuffle(order)
        size = min(max(1, round(self.fraction * num_rows)), num_rows - 1)
        drawn = order[:size] if split == "validation" else order[size:]
        return sorted(drawn)


@dataclass(frozen=True)
class Task:
    """One task: its data and its main score.

    Attributes:
        name: as given with --task.
        kind: decides the head, the encoding, the scores and the divergence.
        hub_path: the dataset on the hub, empty if there is none.
        hub_config: its configuration.
        text_columns: columns of the model's input.
        label_column: empty for language modelling; of the targets for seq2seq.
        label_names: by label id; empty without classes.
        metric_name: of the main score.
        max_length: tokens per example, by default.
        stride: tokens by which windows of a long context overlap.
        train_split: the split for calibration.
        validation_splits: the splits that are scored.
        label_range: least and largest label of a regression.
        higher_is_better: False for a perplexity, which is no number of points.
        held_out: makes the validation split from the training split; None: it has its own file.
        writing: how texts are written; seq2seq alone.
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
    held_out: HeldOut | None = None
    writing: WritingSettings = field(default_factory=WritingSettings)

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
SEQ2SEQ = "seq2seq"
OWN_DATA = (CUSTOM, LANGUAGE_MODELING, SIMILARITY, SEQ2SEQ)
"""Tasks on your own data, see `rfprune.tasks.own_data`."""

TASK_NAMES = (*TASKS, *OWN_DATA)

BLOCK_TOKENS = 512
"""Tokens per block of a language model by default."""

_SAMPLES, _BATCH_SIZE = 2048, 32
# An example of a language model is a block of tokens with logits over the vocabulary for each.
# What an encoder-decoder is calibrated on, it has to write first.
_OF_TASK = {LANGUAGE_MODELING: (256, 4), SEQ2SEQ: (512, 16)}


def default_samples(task_name: str) -> int:
    """Calibration examples of a task by default."""
    return _OF_TASK.get(task_name, (_SAMPLES, _BATCH_SIZE))[0]


def default_batch_size(task_name: str) -> int:
    """Examples per batch of a task by default."""
    return _OF_TASK.get(task_name, (_SAMPLES, _BATCH_SIZE))[1]


def get_task(name: str) -> Task:
    """The GLUE or SQuAD task of that name.

    Raises:
        UserError: the name is unknown, or that of a task on your own data.
    """
    if name in OWN_DATA:
        raise UserError(
            f"Task {name!r} needs a checkpoint and data, which only the command rfprune, "
            f"scripts/evaluate.py and scripts/finetune.py read: choose one of {', '.join(TASKS)} "
            f"here."
        )
    if name not in TASKS:
        raise UserError(f"Unknown task {name!r}: choose one of {', '.join(TASKS)}.")
    return TASKS[name]


def with_splits(task: Task, train: str | None, validation: str | None) -> Task:
    """The task with other names of its splits; None keeps a name.

    Raises:
        UserError: one split is both, or the validation split is made from the training split.
    """
    if validation is not None and task.held_out is not None:
        raise UserError(
            f"--validation-split {validation} names a split, and --validation-fraction "
            f"{task.held_out.fraction:g} makes one from the training split: leave one of them out."
        )
    train = train or task.train_split
    splits = task.validation_splits if validation is None else (validation,)
    if train in splits and task.held_out is None:
        raise UserError(
            f"The split {train} would be the training split and the validation split, and scores "
            f"need other rows than the calibration: name another with --train-split or "
            f"--validation-split, or split it with --validation-fraction 0.2."
        )
    return replace(task, train_split=train, validation_splits=splits)


def check_columns(
    text_columns: Sequence[str] | None, label_column: str | None, *, most: int = 2
) -> None:
    """Raise a UserError for too many text columns, a repeated name, or an empty one."""
    names = [*(text_columns or ()), *([] if label_column is None else [label_column])]
    if any(not name for name in names):
        raise UserError("A column's name is empty: name it as the first line of the file does.")
    if len(text_columns or ()) > most:
        number = "one text or two" if most > 1 else "one text"
        raise UserError(
            f"--text-columns {' '.join(text_columns or ())} names {len(text_columns or ())} "
            f"columns, but this task has {number}: name no more columns."
        )
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"Column {name!r} is named twice: a text, a second text and the label are "
                f"different columns."
            )
