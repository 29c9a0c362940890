"""The README of the tasks: its snippet runs, its command parses, its tables are those of the code.

Without these it would describe data formats of an earlier version.
"""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path

import pytest

import rfprune.tasks
from rfprune.cli.parser import parse
from rfprune.tasks.metrics import metric_module
from rfprune.tasks.registry import OWN_DATA, TASK_NAMES, TASKS

FOLDER = Path(rfprune.tasks.__path__[0])
TEXT = (FOLDER / "README.md").read_text()


def test_its_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # evaluate imports deprecated names
        import evaluate
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(snippet, {})


def test_its_command_parses() -> None:
    (command,) = re.findall(r"^    rfprune (.*)$", TEXT, re.MULTILINE)
    data = parse(shlex.split(command)).data
    assert data.validation_fraction == 0.2
    assert data.data_dir == Path("mine.csv")


def test_it_lists_every_task_module_and_file() -> None:
    for name in TASK_NAMES:
        assert f"`{name}`" in TEXT
    names = {path.stem for path in metric_module("glue").parent.glob("*.py")} - {"__init__"}
    assert all(f"`{name}`" in TEXT for name in names)
    links = [link.partition("#")[0] for link in re.findall(r"\]\((?!http|#)([^)]+)\)", TEXT)]
    assert [link for link in links if not (FOLDER / link).exists()] == []
    assert {path.name for path in FOLDER.glob("*.py")} <= {*links, "__init__.py"}


def test_its_labels_and_lengths_are_those_of_the_tasks() -> None:
    section = TEXT[TEXT.index("| task | labels by id |") : TEXT.index("## Length")]
    rows = re.findall(r"^\| ([\w, -]+) \| ([\w, ]+) \|$", section, re.MULTILINE)
    told = {
        name.lower().replace("-", ""): tuple(labels.split(", "))
        for names, labels in rows
        for name in names.split(", ")
        if "_" in labels or "," in labels
    }
    assert told == {name: task.label_names for name, task in TASKS.items() if task.label_names}
    lengths = {name: task.max_length for name, task in TASKS.items()}
    assert {name for name in lengths if lengths[name] == 64} == {"sst2", "cola"}
    assert {name for name in lengths if lengths[name] == 384} == {"squad", "squad_v2"}
    assert {*lengths.values()} == {64, 128, 384}
    assert set(OWN_DATA) == {"custom", "language-modeling", "similarity", "seq2seq"}
