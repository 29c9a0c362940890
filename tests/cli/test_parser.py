"""The flags: without these tests a flag could do nothing, or a bad value start a long run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfprune.cli.parser import add_flags, parse
from rfprune.errors import UserError
from rfprune.settings import (
    ALLOCATIONS,
    CRITERIA,
    METHODS,
    METRICS,
    DataSettings,
    Options,
    Settings,
    TargetSettings,
    flag_of,
)
from rfprune.tasks.registry import LANGUAGE_MODELING, default_batch_size, default_samples

NEEDED = ["--model", "demo", "--task", "sst2", "--constraint", "0.5"]
CUSTOM = [*NEEDED[:3], "custom", *NEEDED[4:], "--data-dir", "mine"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# For every field but the required ones: a flag with a value other than the default, and the value.
OTHER_VALUES: dict[str, tuple[str, Any]] = {
    "max_drop": ("1", 1.0),
    "metric": ("params", "params"),
    "latency_table": ("table.json --metric latency", Path("table.json")),
    "data_dir": ("mine", Path("mine")),
    "validation_fraction": ("0.25", 0.25),
    "train_split": ("dev", "dev"),
    "validation_split": ("test.2", "test.2"),
    "text_columns": ("a b", ("a", "b")),
    "label_column": ("c", "c"),
    "samples": ("7", 7),
    "batch_size": ("7", 7),
    "max_length": ("9", 9),
    "eval_limit": ("7", 7),
    "method": ("kwon", "kwon"),
    "importance": ("taylor", "taylor"),
    "allocation": ("uniform", "uniform"),
    "use_labels": ("", True),
    "gradients": ("per-batch --method kwon", "per-batch"),
    "teacher": ("scheduled --method kwon", "scheduled"),
    "rearrange": (" --method kwon", False),
    "tune": ("", False),
    "uniform": ("", True),
    "depth": ("", "layers"),
    "round_to": ("32", 32),
    "rounds": ("2", 2),
    "sparsity": ("2:4", "2:4"),
    "sparsity_criterion": ("wanda --sparsity 2:4", "wanda"),
    "sparsity_scope": ("global --sparsity 0.5", "global"),
    "score": ("bleu", "bleu"),
    "source_prefix": ("summarize:", "summarize:"),
    "max_new_tokens": ("7", 7),
    "num_beams": ("2", 2),
    "seed": ("3", 3),
    "device": ("cuda:1", "cuda:1"),
    "dtype": ("bfloat16", "bfloat16"),
    "offload": ("disk", "disk"),
    "max_memory": ("4GB", "4GB"),
    "cache_dir": ("kept", Path("kept")),
    "cache": ("", False),
    "quiet": ("", True),
    "verbose": ("", True),
    "output_dir": ("out", Path("out")),
    "overwrite": ("", True),
    "export": ("dense", ("dense",)),
    "quantize": (" --export onnx", True),
    "gguf_type": ("q8_0 f16 --export gguf", ("q8_0", "f16")),
    "score_stages": ("", True),
    "protect": ("layer.0 heads", ("layer.0", "heads")),
    "min_heads": ("1", 1),
    "min_neurons": ("8", 8),
    "sizes": ("sizes.json", Path("sizes.json")),
    "vocabulary": (f"{__file__}", (Path(__file__),)),
    "vocabulary_min_count": (f"2 --vocabulary {__file__}", 2),
    "push_to_hub": ("me/model --hub-dry-run", "me/model"),
    "private": (" --push-to-hub me/model --hub-dry-run", True),
    "hub_dry_run": (" --push-to-hub me/model", True),
}
ALIKE = (
    *("constraint", "offload", "max_memory", "cache_dir", "cache", "quiet", "verbose"),
    *("output_dir", "overwrite", "push_to_hub", "private", "hub_dry_run"),
)
"""Fields that do not change the output of one constraint."""


def all_fields() -> Iterator[tuple[str, str, Any]]:
    """Every choice: its subject's name in `Options`, its own, and its default."""
    for subject in fields(Options):
        options = getattr(parse(NEEDED), subject.name)
        for one in fields(type(options)):
            yield subject.name, one.name, one.default


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_every_flag_sets_its_field(name: str) -> None:
    """And only a choice that changes the output makes another run of it."""
    subject = next(subject for subject, field, _ in all_fields() if field == name)
    values, expected = OTHER_VALUES[name]
    flag = flag_of(type(getattr(parse(NEEDED), subject)), name)
    own_data = ("text_columns", "label_column", "validation_fraction")
    needed = CUSTOM if name in own_data else NEEDED
    if subject == "writing":
        needed = [part.replace("custom", "seq2seq") for part in CUSTOM]
    instead_of_a_constraint = name in ("max_drop", "sizes")
    if instead_of_a_constraint:
        needed = NEEDED[:4]
    before = parse(NEEDED if instead_of_a_constraint else needed)
    options = parse([*needed, *f"{flag} {values}".split()])
    assert getattr(getattr(before, subject), name) != expected
    assert getattr(getattr(options, subject), name) == expected
    assert (options.identity(0.5) == before.identity(0.5)) == (name in ALIKE)


def test_absent_flags_leave_the_declared_defaults() -> None:
    required = {"model", "task", "constraint"}
    names = [name for _, name, _ in all_fields()]
    assert len(names) == len(set(names)), "one flag per name"
    assert set(names) == OTHER_VALUES.keys() | required, "no field without a test of its flag"
    options = parse(NEEDED)
    assert options.settings == Settings(), "the command and the API have the same defaults"
    for subject, name, default in all_fields():
        if name not in {*required, "samples", "batch_size", "round_to"}:
            assert default is not MISSING
            assert getattr(getattr(options, subject), name) == default
    for task in ("sst2", LANGUAGE_MODELING):
        data = parse(["--model", "demo", "--task", task, "--constraint", "0.5"]).data
        assert (data.samples, data.batch_size) == (default_samples(task), default_batch_size(task))


def test_a_script_can_reuse_some_flags() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, DataSettings, ["text_columns", "label_column"])
    add_flags(parser, TargetSettings, ["metric"])
    found = vars(parser.parse_args(["--text-columns", "a", "b"]))
    assert found == {"text_columns": ["a", "b"], "label_column": None, "metric": METRICS[0]}


def test_a_criterion_or_an_allocation_implies_its_method() -> None:
    for criterion in CRITERIA:
        settings = parse([*NEEDED, "--importance", criterion]).settings
        assert settings == Settings(method="importance", importance=criterion)
    settings = parse([*NEEDED, "--allocation", "uniform"]).settings
    assert settings == Settings(method="importance", allocation="uniform")
    assert ALLOCATIONS[0] != "uniform"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("", 8), ("--round-to 1", None), ("--method kwon", None), ("--method kwon --round-to 16", 16)],
)
def test_neurons_are_kept_in_multiples(flags: str, expected: int | None) -> None:
    assert parse([*NEEDED, *flags.split()]).settings.round_to == expected


def test_several_constraints_go_to_one_subfolder_each(tmp_path: Path) -> None:
    flags = [*NEEDED, "0.3", "0.5", "--output-dir", str(tmp_path / "out")]
    options = parse(flags)
    assert options.target.constraint == (0.5, 0.3), "duplicates are pruned once"
    assert options.output_folder(0.3) == tmp_path / "out" / "mac-0.3"
    assert options.identity(0.3) != options.identity(0.5)
    assert parse([*NEEDED, *flags[-2:]]).output_folder(0.5) == tmp_path / "out"


@pytest.mark.parametrize(
    ("model", "name"),
    [("demo", "demo"), ("owner/model", "owner--model"), ("here/model", "model"), (".", None)],
)
def test_the_default_folder_tells_runs_apart(model: str, name: str | None, tmp_path: Path) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    options = parse(["--model", model, *NEEDED[2:], "--seed", "3", "--metric", "params"])
    expected = Path("outputs", name or tmp_path.name, "sst2", "params-0.5", "seed-3")
    assert options.output_folder(0.5) == expected


@given(st.floats(min_value=0, max_value=1, exclude_min=True, exclude_max=True))
def test_every_fraction_is_a_constraint(ratio: float) -> None:
    assert parse([*NEEDED[:5], repr(ratio)]).target.constraint == (ratio,)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--task ?", "'?': the tasks are mrpc"),
        ("--samples many", "--samples many is not a whole number of at least 1"),
        ("--rounds 17", "--rounds 17 is not a whole number from 1 to 16"),
        ("--text-columns a", "--text-columns belongs to --task custom .* for sst2"),
        ("--label-column a", "--label-column belongs to --task custom"),
        ("--task custom", "--task custom needs .* --data-dir DIR"),
        ("--task custom --data-dir mine --text-columns a b c", "a b c .* one text or two"),
        ("--task custom --data-dir mine --text-columns a --label-column a", "'a' is named twice"),
        ("--task custom --data-dir mine --label-column=", "column's name is empty"),
        ("--gradients per-batch", "--gradients .*belongs to --method kwon"),
        ("--teacher scheduled", "--teacher .*belongs to --method kwon"),
        *(
            (f"--method {method} {flag}", f"{flag} .*belongs to --method importance")
            for flag in ("--importance fisher", "--allocation global")
            for method in ("curvature", "kwon")
        ),
        ("--importance taylor --skip-rearrange", "belongs to --method kwon"),
        *(
            (f"--use-labels --importance {criterion}", "--use-labels does nothing for")
            for criterion in ("random", "magnitude-l1", "magnitude-l2")
        ),
        ("--latency-table a", "does nothing for --metric mac: .* --metric latency"),
        ("--hub-dry-run", "--hub-dry-run does nothing without --push-to-hub"),
    ],
)
def test_a_bad_flag_is_one_sentence(flags: str, message: str) -> None:
    """More bad flags are in tests/robustness."""
    with pytest.raises(UserError, match=message.replace("?", r"\?")) as caught:
        parse([*NEEDED, *flags.split()])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "method 'magic' is unknown: choose one of curvature, kwon"),
        ({"importance": "magic"}, "importance 'magic' is unknown: choose one of fisher"),
        ({"round_to": 7}, "round_to 7 is unknown: choose one of 1, 8, 16, 32, 64"),
        ({"rounds": 0}, "rounds 0 is not a whole number from 1"),
        ({"seed": -1}, "seed -1 is not a whole number from 0"),
        ({"importance": "taylor"}, "importance='taylor'.* belongs to --method importance"),
        ({"method": "importance", "rearrange": False}, "rearrange=False.* --method kwon"),
        ({"uniform": True, "method": "importance", "allocation": "uniform"}, "leave one of them"),
    ],
    ids=str,
)
def test_the_api_checks_the_same_choices(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Settings(**changes)


def test_the_docstring_of_settings_has_every_choice() -> None:
    documented = str(Settings.__doc__)
    assert all(f"{one.name}: " in documented for one in fields(Settings))
    assert METHODS[1] in documented


def test_a_tilde_is_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Shells do not expand it in --output-dir=~/out, which would make a folder called ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    options = parse([*NEEDED, "--output-dir=~/out", "--data-dir=~/data"])
    folders = (options.output.output_dir, options.data.data_dir)
    assert folders == (tmp_path / "out", tmp_path / "data")
