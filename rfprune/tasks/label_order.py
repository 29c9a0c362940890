"""Check that a checkpoint's label names are those of its task, in the task's order."""

import re
import warnings
from collections.abc import Mapping
from typing import Any

from rfprune.errors import RfpruneWarning, UserError
from rfprune.tasks.registry import CUSTOM, TASKS, Task

# Other names that checkpoints give to a class, in the form of _normal_form.
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


def check_labels(config: Any, task: Task) -> None:
    """Check a checkpoint's number of outputs, and its label names against the task's.

    `LABEL_0` and `0` count as the task's order. Unknown names are taken in the task's order, with
    a RfpruneWarning.

    Raises:
        UserError: the number of outputs differs, or the names are in another order or those of
            another task.
    """
    names = label_names_by_id(config)
    if len(names) != task.num_labels:
        raise UserError(
            f"Task {task.name} needs a head with {_outputs(task)}, but the checkpoint's has "
            f"{len(names)} ({', '.join(names)}): choose a checkpoint fine-tuned on {task.name}."
        )
    if task.kind != "classification" or task.name == CUSTOM:
        return  # task custom takes its labels from the checkpoint
    ids = _label_ids(task)
    found = [ids.get(_normal_form(name)) for name in names]
    if any(label not in (None, position) for position, label in enumerate(found)):
        raise UserError(
            f"The checkpoint's label order is ({', '.join(names)}) but task {task.name} has "
            f"({', '.join(task.label_names)}): reorder its head, in weights and id2label, or "
            f"choose another checkpoint."
        )
    if any(label is None for label in found):
        _unknown_names(names, task)


def _unknown_names(names: list[str], task: Task) -> None:
    """Refuse the label names of another task; warn about names of no task."""
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
        f"they are taken as ({', '.join(task.label_names)}), in this order.",
        RfpruneWarning,
        stacklevel=3,
    )


def label_names_by_id(config: Any) -> list[str]:
    """The checkpoint's label names by label id; UserError if the ids have gaps."""
    named = {int(key): str(name) for key, name in dict(config.id2label).items()}
    if sorted(named) != list(range(len(named))):
        raise UserError(
            f"The checkpoint's id2label has the ids {sorted(named)}, but they must run from 0 "
            f"without gaps: correct its config.json."
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
    """The label id of every known name of the task's classes, in normal form."""
    ids: dict[str, int] = {}
    for label, name in enumerate(task.label_names):
        synonyms = _SYNONYMS[_SAME_AS.get(name, name)]
        official = (_normal_form(name), _normal_form(_SAME_AS.get(name, name)))
        ids |= dict.fromkeys((*official, *synonyms, f"label{label}", str(label)), label)
    return ids


def is_plural(one: str, other: str) -> bool:
    """Whether two names have the same letters and digits but for a final s."""
    first, second = (_normal_form(name).removesuffix("s") for name in (one, other))
    return bool(first) and first == second


def same_class(one: str, other: str) -> bool:
    """Whether two names are known synonyms."""
    return any(
        all(_normal_form(name) in (_normal_form(official), *synonyms) for name in (one, other))
        for official, synonyms in _SYNONYMS.items()
    )


def _normal_form(name: str) -> str:
    """Lower-case letters and digits only: NOT_ENTAILMENT and not-entailment are one name."""
    return re.sub(r"[^0-9a-z]", "", name.lower())
