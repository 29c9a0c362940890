"""Aliases such as bert-base: the public fine-tuned checkpoint for each task.

Only checkpoints with labels in the task's order are listed. textattack's MNLI models are left out:
their order differs, and their names LABEL_0 to LABEL_2 hide it from every check. textattack's STS-B
models predict a fifth of the score. Correlations do not change with scale, but `--use-labels`
compares values: choose another checkpoint there.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from rfprune.errors import UserError
from rfprune.tasks.registry import Task

_BERT_BASE = {
    "mrpc": "textattack/bert-base-uncased-MRPC",
    "sst2": "textattack/bert-base-uncased-SST-2",
    "stsb": "yoshitomo-matsubara/bert-base-uncased-stsb",
    "cola": "textattack/bert-base-uncased-CoLA",
    "rte": "textattack/bert-base-uncased-RTE",
    "qnli": "textattack/bert-base-uncased-QNLI",
    "qqp": "textattack/bert-base-uncased-QQP",
    "mnli": "yoshitomo-matsubara/bert-base-uncased-mnli",
    "wnli": "textattack/bert-base-uncased-WNLI",
    "squad": "csarron/bert-base-uncased-squad-v1",
    "squad_v2": "deepset/bert-base-uncased-squad2",
}
_BERT_LARGE = {
    "mrpc": "yoshitomo-matsubara/bert-large-uncased-mrpc",
    "sst2": "yoshitomo-matsubara/bert-large-uncased-sst2",
    "stsb": "yoshitomo-matsubara/bert-large-uncased-stsb",
    "cola": "yoshitomo-matsubara/bert-large-uncased-cola",
    "rte": "yoshitomo-matsubara/bert-large-uncased-rte",
    "qnli": "yoshitomo-matsubara/bert-large-uncased-qnli",
    "qqp": "yoshitomo-matsubara/bert-large-uncased-qqp",
    "mnli": "yoshitomo-matsubara/bert-large-uncased-mnli",
    "wnli": "yoshitomo-matsubara/bert-large-uncased-wnli",
    "squad": "google-bert/bert-large-uncased-whole-word-masking-finetuned-squad",
    "squad_v2": "deepset/bert-large-uncased-whole-word-masking-squad2",
}
_DISTILBERT = {
    "mrpc": "textattack/distilbert-base-uncased-MRPC",
    "sst2": "distilbert/distilbert-base-uncased-finetuned-sst-2-english",
    "stsb": "textattack/distilbert-base-uncased-STS-B",
    "cola": "textattack/distilbert-base-uncased-CoLA",
    "rte": "textattack/distilbert-base-uncased-RTE",
    "qnli": "textattack/distilbert-base-uncased-QNLI",
    "qqp": "textattack/distilbert-base-uncased-QQP",
    "mnli": "typeform/distilbert-base-uncased-mnli",
    "wnli": "textattack/distilbert-base-uncased-WNLI",
    "squad": "distilbert/distilbert-base-uncased-distilled-squad",
    "squad_v2": "twmkn9/distilbert-base-uncased-squad2",
}
_ROBERTA_BASE = {
    "mrpc": "JeremiahZ/roberta-base-mrpc",
    "sst2": "JeremiahZ/roberta-base-sst2",
    "stsb": "JeremiahZ/roberta-base-stsb",
    "cola": "JeremiahZ/roberta-base-cola",
    "rte": "JeremiahZ/roberta-base-rte",
    "qnli": "JeremiahZ/roberta-base-qnli",
    "qqp": "JeremiahZ/roberta-base-qqp",
    "mnli": "JeremiahZ/roberta-base-mnli",
    "wnli": "textattack/roberta-base-WNLI",
    "squad": "csarron/roberta-base-squad-v1",
    "squad_v2": "deepset/roberta-base-squad2",
}
CHECKPOINTS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "bert-base": _BERT_BASE,
        "bert-base-uncased": _BERT_BASE,
        "bert-large": _BERT_LARGE,
        "bert-large-uncased": _BERT_LARGE,
        "distilbert": _DISTILBERT,
        "distilbert-base": _DISTILBERT,
        "distilbert-base-uncased": _DISTILBERT,
        "roberta": _ROBERTA_BASE,
        "roberta-base": _ROBERTA_BASE,
    }
)
# The hub's rule for names, with or without an owner.
_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)


def is_alias(model: str) -> bool:
    """Whether this is an alias and not a folder."""
    return model in CHECKPOINTS and not _is_folder(model)


def resolve_checkpoint(model: str, task: Task) -> str:
    """The folder or hub id to load: an alias's checkpoint for the task, any other name unchanged.

    Raises:
        UserError: the alias has no checkpoint for the task, or the folder does not exist.
    """
    if is_alias(model):
        known = CHECKPOINTS[model]
        if task.name not in known:
            raise UserError(
                f"No public checkpoint of {model} is known for task {task.name} (there are for "
                f"{', '.join(known)}): give a folder or a hub id with --model, or make a "
                f"checkpoint with scripts/finetune.py."
            )
        return known[task.name]
    if _is_folder(model):
        return model
    if model.startswith((".", "~")) or not _HUB_ID.fullmatch(model):
        raise UserError(
            f"The model folder '{model}' does not exist: give a folder with a fine-tuned "
            f"checkpoint, a hub id (owner/name), demo, or one of {', '.join(CHECKPOINTS)}."
        )
    return model


def _is_folder(name: str) -> bool:
    """Whether a folder has this name; False also for names that the file system rejects."""
    try:
        return name != "" and Path(name).is_dir()
    except (OSError, ValueError):
        return False
