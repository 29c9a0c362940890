"""Tasks on your own data: custom, language-modeling, similarity and seq2seq.

For `custom`, kind, labels and scores come from the checkpoint's configuration. The columns come
from the data.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rfprune.errors import RfpruneWarning, UserError, check_installed
from rfprune.settings import WritingSettings
from rfprune.tasks.class_names import are_ids
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
    SEQ2SEQ,
    SIMILARITY,
    TASKS,
    Kind,
    Task,
    check_columns,
)
from rfprune.tasks.splits import find_split

USUAL_TEXTS = (("sentence1", "sentence2"), ("sentence",), ("text",))
"""Columns of the text or of a pair of texts, if none are named."""

_USUAL_TEXTS_OF: Mapping[Kind, tuple[tuple[str, ...], ...]] = {
    "language-modeling": (("text",),),
    "similarity": (("sentence1", "sentence2"),),
    "token-classification": (("tokens",), ("words",)),
    "multiple-choice": (("sent1", "sent2"), ("question",)),
    "seq2seq": (("source",), ("document",), ("article",), ("dialogue",), ("text",)),
}
_MOST_TEXTS: Mapping[Kind, int] = {
    **dict.fromkeys(("language-modeling", "token-classification", "seq2seq"), 1)
}

USUAL_LABEL = "label"
_USUAL_LABELS: Mapping[Kind, tuple[str, ...]] = {
    "similarity": (USUAL_LABEL, "score", "similarity_score"),
    "token-classification": ("ner_tags", "pos_tags", "tags", "labels", USUAL_LABEL),
    "multi-label": ("labels", USUAL_LABEL),
    "seq2seq": ("target", "summary", "highlights"),
}
_TRUNCATED_FRACTION = 0.05  # with more rows of the default length, there is a warning
_SINGLE_LABEL = "single_label_classification"
_MULTI_LABEL = "multi_label_classification"

HEADS: Mapping[str, Kind] = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token-classification",
    "ForMultipleChoice": "multiple-choice",
    "ForImageClassification": "image-classification",
}
"""The kind of task `custom` by the end of the checkpoint's class name."""


def blank_custom_task() -> Task:
    """Task custom before checkpoint and data are read: without columns and labels."""
    return Task(CUSTOM, "classification", "", None, (), "", (), "accuracy")


def language_task() -> Task:
    """Task language-modeling; its data is WikiText-2 unless there is other data."""
    return Task(
        LANGUAGE_MODELING, "language-modeling", "Salesforce/wikitext", "wikitext-2-raw-v1",
        ("text",), "", (), "perplexity", max_length=BLOCK_TOKENS, higher_is_better=False,
    )  # fmt: skip


def similarity_task() -> Task:
    """Task similarity; its data is STS-B unless there is other data."""
    return replace(TASKS["stsb"], name=SIMILARITY, kind="similarity", label_range=None)


_SCORE_PACKAGES = {"chrf": "sacrebleu", "bleu": "sacrebleu", "rougeL": "rouge-score"}


def seq2seq_task(writing: WritingSettings) -> Task:
    """Task seq2seq with its main score.

    Raises:
        UserError: the package that computes the score is not installed.
    """
    score = writing.score
    check_installed(f"--score {score}", [_SCORE_PACKAGES[score]], extra=SEQ2SEQ)
    return Task(
        SEQ2SEQ, "seq2seq", "", None, ("source",), "target", (), score, max_length=BLOCK_TOKENS,
        writing=writing,
    )  # fmt: skip


def custom_task(labels: Any, problem_type: Any, source: str, kind: Kind = "classification") -> Task:
    """Task custom for a checkpoint.

    A sequence classifier with one output is a regression. With several outputs it predicts one
    class, or any number of labels if its problem type says so.

    Args:
        labels: an object with `id2label`.
        problem_type: of the configuration; None if there is none.
        source: folder or hub id, for errors.
        kind: by the checkpoint's head.

    Raises:
        UserError: a regression with several outputs, one class, or gaps in the label ids.
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
            f"The checkpoint '{source}' has the problem type {problem_type}, but task {CUSTOM} "
            f"takes labels, or one number per example: choose another checkpoint."
        )
    if regression and len(names) != 1:
        raise UserError(
            f"The checkpoint '{source}' is a regression with {len(names)} outputs, but task "
            f"{CUSTOM} takes one number per example: choose another checkpoint."
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
            f"The checkpoint '{source}' has {len(names)} class, and a score needs two or more: "
            f"choose another checkpoint, or set problem_type to regression."
        )
    return replace(blank_custom_task(), label_names=tuple(names))


def with_columns(
    task: Task,
    data_dir: Path | None,
    text_columns: Sequence[str] | None,
    label_column: str | None,
) -> Task:
    """The task with the columns of its data: the named ones, else the usual ones.

    Both splits need the text; the labels are needed in the validation split alone.

    Raises:
        UserError: data or columns are missing; the error lists the existing columns.
    """
    if data_dir is None and task.hub_path:
        return task  # the columns of the hub's data are known
    if data_dir is None:
        raise UserError(
            f"Task {task.name} needs your own data: give --data-dir DIR, where DIR holds train.csv "
            f"and validation.csv (or .tsv, .jsonl, .parquet)."
        )
    if task.kind == "image-classification":
        return replace(task, text_columns=(IMAGE,), label_column=label_column or USUAL_LABEL)
    splits = (task.train_split, task.validation_splits[0])
    train, validation = (_columns(task, split, data_dir) for split in splits)
    texts = tuple(text_columns) if text_columns else _usual_texts(task, validation)
    label = "" if task.kind == "language-modeling" else _label_of(task, validation, label_column)
    check_columns(texts, label or None, most=_MOST_TEXTS.get(task.kind, 2))
    if task.kind == "similarity" and len(texts) != 2:
        raise UserError(
            f"Task {SIMILARITY} compares two texts, and {len(texts)} is named: name the columns of "
            f"both with --text-columns ({_listed(validation)})."
        )
    if task.kind == "multiple-choice":
        texts = (*texts, *_choices_of(validation))
    for table in (train, validation):
        missing = [name for name in texts if name not in table.names]
        if missing and not table.source.endswith(".txt'"):  # a text file has no columns
            raise UserError(
                f"{table.source} has no column {', '.join(map(repr, missing))} for the text: name "
                f"one or two of its columns ({_listed(table)}) with --text-columns."
            )
    if label and label not in validation.names and not _has_column_per_label(task, validation):
        labels = "target texts" if task.kind == "seq2seq" else "labels"
        raise UserError(
            f"{validation.source} has no column {label!r} for the {labels}, which scores need (the "
            f"train split needs none): name one of its columns ({_listed(validation)}) with "
            f"--label-column, or add it."
        )
    return replace(task, text_columns=texts, label_column=label)


def _label_of(task: Task, table: Table, named: str | None) -> str:
    usual = _USUAL_LABELS.get(task.kind, (USUAL_LABEL,))
    return named or next((name for name in usual if name in table.names), usual[0])


def _has_column_per_label(task: Task, table: Table) -> bool:
    """Whether each of several labels has a column of its own."""
    return task.kind == "multi-label" and set(task.label_names) <= set(table.names)


def _choices_of(table: Table) -> tuple[str, ...]:
    choices = choice_columns(table.names)
    if not choices:
        raise UserError(
            f"{table.source} has no columns for the choices ({_listed(table)}): give ending0, "
            f"ending1, ... (or choice0, option0, ...), or a column choices with lists."
        )
    return choices


def task_from_training_data(
    data_dir: Path | None,
    text_columns: Sequence[str] | None,
    label_column: str | None,
    *,
    regression: bool = False,
    task: Task | None = None,
) -> Task:
    """Task custom from training data, before there is a checkpoint.

    Labels that are exactly 0, 1, ... are ids of LABEL_0, LABEL_1, ...; other labels are names, in
    sorted order. Numbers that are not whole make a regression.

    Args:
        data_dir: see `rfprune.tasks.splits.find_split`.
        text_columns: None: the usual names.
        label_column: None: the usual name.
        regression: whether whole numbers are values to predict, too.
        task: names the splits; None: train and validation.

    Raises:
        UserError: as for `with_columns`, or the training data has no labels or one class only.
    """
    task = with_columns(task or blank_custom_task(), data_dir, text_columns, label_column)
    assert data_dir is not None
    table = read_table(find_split(task, task.train_split, data_dir), [task.label_column])
    labels = table.columns.get(task.label_column)
    if labels is None:
        raise UserError(
            f"{table.source} has no column {task.label_column!r} for the labels, which training "
            f"needs: name one of its columns ({_listed(table)}) with --label-column."
        )
    names = table.class_names.get(task.label_column)
    if names is None or are_ids(names):
        names = label_names(labels)
    if regression or names is None:
        return replace(task, kind="regression", metric_name="spearmanr")
    if len(names) < 2:
        raise UserError(
            f"{table.source} has {len(names)} different label in {task.label_column}, and a "
            f"classifier needs two or more: add rows of other classes, or give --regression."
        )
    return replace(task, label_names=names)


def warn_about_truncation(
    batches: Sequence[Mapping[str, Tensor]],
    max_length: int,
    *,
    examples: str = "validation",
    is_default: bool = True,
    is_longest: bool = False,
) -> None:
    """Warn if many rows are as long as is read, and may have been cut.

    Args:
        examples: what the batches hold, for the message.
        is_default: whether the length is the default: some cut rows are then enough. A length that
            the user chose gives a warning only if all rows may be cut.
        is_longest: whether model or tokenizer take no more.
    """
    masks = [batch["attention_mask"] for batch in batches if "attention_mask" in batch]
    lengths = [int(length) for mask in masks for length in mask.sum(dim=-1).flatten()]
    full = sum(length >= max_length for length in lengths)
    enough = full > _TRUNCATED_FRACTION * len(lengths) if is_default else full == len(lengths)
    if not lengths or not enough:
        return
    length, way_out = "default length", "choose a larger --max-length to read them whole"
    if is_longest:
        length, way_out = "length limit of model or tokenizer", "shorten or split the texts"
    elif not is_default:
        length = "--max-length"
    warnings.warn(
        f"{full} of {len(lengths)} {examples} examples fill the {length} of {max_length} tokens "
        f"and may be cut: {way_out}.",
        RfpruneWarning,
        stacklevel=2,
    )


def _columns(task: Task, split: str, data_dir: Path) -> Table:
    """The column names of a split, without its values."""
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
