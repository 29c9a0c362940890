"""Somebody's own checkpoint on their own data, made into a `Task` row.

Of task `custom`, what is asked and how it is scored comes from the checkpoint's configuration; of
language modelling and similarity it is known. Columns come from the data.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rfprune.errors import RfpruneWarning, UserError
from rfprune.tasks.entity_scores import names_entities
from rfprune.tasks.files import Table, read_table
from rfprune.tasks.image_classification import IMAGE
from rfprune.tasks.label_order import label_names_by_id
from rfprune.tasks.labels import label_names
from rfprune.tasks.multiple_choice import choice_columns
from rfprune.tasks.registry import (
    BLOCK_TOKENS,
    CUSTOM,
    LANGUAGE_MODELING,
    SIMILARITY,
    TASKS,
    Kind,
    Task,
    check_columns,
)
from rfprune.tasks.splits import find_split

USUAL_TEXTS = (("sentence1", "sentence2"), ("sentence",), ("text",))
"""Columns that are taken for the text, or the two texts, where none are named."""

_USUAL_TEXTS_OF: Mapping[Kind, tuple[tuple[str, ...], ...]] = {
    "language-modeling": (("text",),),
    "similarity": (("sentence1", "sentence2"),),
    "token-classification": (("tokens",), ("words",)),
    "multiple-choice": (("sent1", "sent2"), ("question",)),
}
_MOST_TEXTS: Mapping[Kind, int] = {"language-modeling": 1, "token-classification": 1}

USUAL_LABEL = "label"
_USUAL_LABELS: Mapping[Kind, tuple[str, ...]] = {
    "similarity": (USUAL_LABEL, "score", "similarity_score"),
    "token-classification": ("ner_tags", "pos_tags", "tags", "labels", USUAL_LABEL),
    "multi-label": ("labels", USUAL_LABEL),
}
# With more rows than this that reach the default length, somebody should hear of it.
_CUT_SHARE = 0.05
_SINGLE_LABEL = "single_label_classification"
_MULTI_LABEL = "multi_label_classification"

HEADS: Mapping[str, Kind] = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token-classification",
    "ForMultipleChoice": "multiple-choice",
    "ForImageClassification": "image-classification",
}
"""What the class of a checkpoint is called at its end, and what `custom` makes of it."""


def blank_custom_task() -> Task:
    """The task before checkpoint and data are looked at: no columns, no labels yet."""
    return Task(CUSTOM, "classification", "", None, (), "", (), "accuracy")


def language_task() -> Task:
    """Language modelling, on a text of WikiText-2 where there is no other."""
    return Task(
        LANGUAGE_MODELING, "language-modeling", "Salesforce/wikitext", "wikitext-2-raw-v1",
        ("text",), "", (), "perplexity", max_length=BLOCK_TOKENS, higher_is_better=False,
    )  # fmt: skip


def similarity_task() -> Task:
    """Similarity of pairs by their embeddings, on those of STS-B where there are no others."""
    return replace(TASKS["stsb"], name=SIMILARITY, kind="similarity", label_range=None)


def custom_task(labels: Any, problem_type: Any, source: str, kind: Kind = "classification") -> Task:
    """The task of a checkpoint with these labels (`id2label`), as transformers understands them.

    Of a sequence classifier (kind "classification"), one output is a regression, several are
    classes of which one is right, or, by the problem type, any number.

    Raises:
        UserError: several regressions, one class, or gaps in the ids.
    """
    if kind == "multiple-choice":
        return replace(blank_custom_task(), kind=kind)
    names = label_names_by_id(labels)
    if kind == "token-classification":
        metric = "f1" if names_entities(names) else "accuracy"
        return replace(blank_custom_task(), kind=kind, label_names=tuple(names), metric_name=metric)
    if kind == "image-classification":
        return replace(blank_custom_task(), kind=kind, label_names=tuple(names))
    regression = problem_type == "regression" or (not problem_type and len(names) == 1)
    if problem_type not in (None, "", "regression", _SINGLE_LABEL, _MULTI_LABEL):
        raise UserError(
            f"The checkpoint '{source}' is for {str(problem_type).replace('_', ' ')}, but task "
            f"{CUSTOM} takes labels, or one number, an example: choose another checkpoint."
        )
    if regression and len(names) != 1:
        raise UserError(
            f"The checkpoint '{source}' is a regression with {len(names)} outputs, but task "
            f"{CUSTOM} takes one number an example: choose another checkpoint."
        )
    if regression:
        return replace(blank_custom_task(), kind="regression", metric_name="spearmanr")
    if problem_type == _MULTI_LABEL:
        return replace(
            blank_custom_task(),
            kind="multi-label",
            label_names=tuple(names),
            metric_name="f1_micro",
        )
    if len(names) < 2:
        raise UserError(
            f"The checkpoint '{source}' tells apart {len(names)} class, which is nothing to "
            f"score: choose one with two or more, or with problem_type regression."
        )
    return replace(blank_custom_task(), label_names=tuple(names))


def with_columns(
    task: Task,
    data_dir: Path | None,
    text_columns: Sequence[str] | None,
    label_column: str | None,
) -> Task:
    """The task with the columns of its data: those that are named, else the usual ones.

    Texts are needed in both splits, labels only where they are scored, in the validation split.

    Raises:
        UserError: no data, or not these columns in it; the sentence lists those that there are.
    """
    if data_dir is None and task.name != CUSTOM:
        return task  # the hub's, whose columns are known
    if data_dir is None:
        raise UserError(
            f"Task {CUSTOM} needs your own data: give --data-dir DIR, where DIR holds train.csv "
            f"and validation.csv (or .tsv, .jsonl, .parquet)."
        )
    if task.kind == "image-classification":
        return replace(task, text_columns=(IMAGE,), label_column=label_column or USUAL_LABEL)
    train, validation = (_columns(task, split, data_dir) for split in ("train", "validation"))
    texts = tuple(text_columns) if text_columns else _usual_texts(task, validation)
    label = "" if task.kind == "language-modeling" else _label_of(task, validation, label_column)
    check_columns(texts, label or None, most=_MOST_TEXTS.get(task.kind, 2))
    if task.kind == "similarity" and len(texts) != 2:
        raise UserError(
            f"Task {SIMILARITY} compares two texts: name the columns of both with --text-columns "
            f"(there are {_listed(validation)})."
        )
    if task.kind == "multiple-choice":
        texts = (*texts, *_choices_of(validation))
    for table in (train, validation):
        missing = [name for name in texts if name not in table.names]
        if missing and not table.source.endswith(".txt'"):  # which has no columns to name
            raise UserError(
                f"{table.source} has no column {', '.join(map(repr, missing))} for the text: name "
                f"one or two of its columns ({_listed(table)}) with --text-columns."
            )
    if label and label not in validation.names and not _one_each(task, validation):
        raise UserError(
            f"{validation.source} has no column {label!r} for the labels, which a score needs (the "
            f"train split does without): name one of its columns ({_listed(validation)}) with "
            f"--label-column, or add it."
        )
    return replace(task, text_columns=texts, label_column=label)


def _label_of(task: Task, table: Table, named: str | None) -> str:
    usual = _USUAL_LABELS.get(task.kind, (USUAL_LABEL,))
    return named or next((name for name in usual if name in table.names), usual[0])


def _one_each(task: Task, table: Table) -> bool:
    """Whether each of several labels has a column."""
    return task.kind == "multi-label" and set(task.label_names) <= set(table.names)


def _choices_of(table: Table) -> tuple[str, ...]:
    choices = choice_columns(table.names)
    if not choices:
        raise UserError(
            f"{table.source} has no columns for the choices: wanted are ending0, ending1, ... (or "
            f"choice0, option0, ...), or choices with lists, but it has {_listed(table)}."
        )
    return choices


def task_from_training_data(
    data_dir: Path | None,
    text_columns: Sequence[str] | None,
    label_column: str | None,
    *,
    regression: bool = False,
) -> Task:
    """The task that training data makes, where there is no checkpoint yet.

    Labels 0, 1, ... to the last are ids of LABEL_0, LABEL_1, ...; others are the names, in their
    order. `regression`: they are numbers to predict; numbers that are not whole always are.

    Raises:
        UserError: as `with_columns`, or no labels, or one class only, in the training data.
    """
    task = with_columns(blank_custom_task(), data_dir, text_columns, label_column)
    assert data_dir is not None
    table = read_table(find_split(task, "train", data_dir), [task.label_column])
    labels = table.columns.get(task.label_column)
    if labels is None:
        raise UserError(
            f"{table.source} has no column {task.label_column!r} for the labels, and nothing can "
            f"be learned without: name one of its columns ({_listed(table)}) with --label-column."
        )
    names = label_names(labels)
    if regression or names is None:
        return replace(task, kind="regression", metric_name="spearmanr")
    if len(names) < 2:
        raise UserError(
            f"{table.source} has {len(names)} different label in {task.label_column}: there is "
            f"nothing to tell apart with less than two."
        )
    return replace(task, label_names=names)


def warn_about_truncation(batches: Sequence[Mapping[str, Tensor]], max_length: int) -> None:
    """Say so where many rows are as long as the length that nobody has chosen."""
    masks = [batch["attention_mask"] for batch in batches if "attention_mask" in batch]
    lengths = [int(length) for mask in masks for length in mask.sum(dim=-1).flatten()]
    full = sum(length >= max_length for length in lengths)
    if full > _CUT_SHARE * len(lengths):
        warnings.warn(
            f"{full} of {len(lengths)} validation examples fill the {max_length} tokens that are "
            f"read by default, and may be cut: --max-length reads more.",
            RfpruneWarning,
            stacklevel=2,
        )


def _columns(task: Task, split: str, data_dir: Path) -> Table:
    """A split's column names alone."""
    return read_table(find_split(task, split, data_dir), ())


def _usual_texts(task: Task, table: Table) -> tuple[str, ...]:
    known = _USUAL_TEXTS_OF.get(task.kind, USUAL_TEXTS)
    found = [names for names in known if set(names) <= set(table.names)]
    if len(found) != 1:
        usual = ", ".join(" and ".join(names) for names in known)
        problem = "more than one" if found else "none"
        raise UserError(
            f"{table.source} has {problem} of the usual columns for the text ({usual}): name one "
            f"or two of its columns ({_listed(table)}) with --text-columns."
        )
    return found[0]


def _listed(table: Table) -> str:
    return ", ".join(table.names) or "there are none"
