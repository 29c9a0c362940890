"""`scripts/sweep.py` on tiny models: what a line holds, and that no measurement is lost or doubled.

Without these a sweep of hours could measure other settings than its lines say, or start over.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rfprune.cost.constraint import Constraint
from rfprune.errors import UserError
from rfprune.model.masks import num_kept
from rfprune.pruning import prune
from rfprune.settings import Settings
from rfprune.tasks.calibration import calibration_batches
from rfprune.tasks.evaluation import divergence, evaluate_model, prepare_evaluation
from rfprune.tasks.registry import get_task

SCRIPT = Path(__file__).parents[2] / "scripts" / "sweep.py"
TinyFolder = Callable[..., Path]
TinyModel = Callable[..., Any]
TinyTokenizer = Callable[..., Any]
Sweep = Callable[..., int]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script as a module."""
    specification = importlib.util.spec_from_file_location("sweep_script", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    yield module
    del sys.modules[module.__name__]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "new" / "quality_tiny.jsonl"


@pytest.fixture
def sweep(script: ModuleType, tiny_folder: TinyFolder, tiny_data_dir: Path, output: Path) -> Sweep:
    """`sweep("--seed 0 1 ...")`: main on a tiny model, MRPC, 16 samples; later flags win."""

    def run(flags: str = "") -> int:
        always = f"--model {tiny_folder()} --task mrpc --data-dir {tiny_data_dir} --device cpu "
        always += f"--samples 16 --batch-size 8 --constraint 0.5 --output {output} "
        code: int = script.main((always + flags).split())
        return code

    return run


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_a_line_is_what_the_package_measures(
    sweep: Sweep,
    output: Path,
    tiny_folder: TinyFolder,
    tiny_model: TinyModel,
    tiny_tokenizer: TinyTokenizer,
    tiny_data_dir: Path,
) -> None:
    assert (
        sweep("--variant kwon-rearrange --seed 3 --eval-limit 20 --metric params --constraint 0.9")
        == 0
    )
    (line,) = lines_of(output)
    model, tokenizer, task = tiny_model(), tiny_tokenizer(), get_task("mrpc")
    batches = calibration_batches(
        task,
        tokenizer,
        tiny_data_dir,
        num_samples=16,
        batch_size=8,
        max_length=None,
        seed=3,
        with_labels=False,
    )
    settings = Settings(method="kwon", tune=False, seed=3)
    result = prune(model, batches, Constraint("params", 0.9), settings)
    evaluation_set = prepare_evaluation(task, tokenizer, tiny_data_dir, limit=20)
    original = evaluate_model(model, evaluation_set)
    pruned = evaluate_model(result.model, evaluation_set)
    assert line["divergence"] == pytest.approx(divergence(original, pruned), rel=1e-4)
    assert line["divergence"] > 1e-3
    assert line["score"] == pruned.score
    assert line["original_score"] == original.score
    assert line["scores"] == {"original": original.scores, "pruned": pruned.scores}
    assert line["achieved"] == pytest.approx(result.achieved)
    assert line["layers"] == list(result.layers)
    assert sum(layer["heads"] + layer["neurons"] for layer in line["layers"]) == sum(
        num_kept(result.masks)
    )
    assert line["seconds"]["prune_total"] > 0
    assert line["seconds"]["evaluate"] > 0
    assert (line["samples"], line["requested_samples"], line["evaluated_examples"]) == (16, 16, 20)
    assert (line["variant"], line["seed"], line["constraint"]) == ("kwon-rearrange", 3, 0.9)
    assert (line["metric"], line["metric_name"], line["dtype"]) == ("params", "accuracy", "float32")
    assert line["model"] == tiny_folder().name
    assert str(tiny_folder().parent) not in output.read_text(), "no path of this machine"
    assert "torch" in line["versions"]


def test_every_variant_runs_as_its_settings_say(
    script: ModuleType, sweep: Sweep, output: Path
) -> None:
    assert sweep("--constraint 0.7 0.5") == 0
    lines = lines_of(output)
    assert [(line["variant"], line["constraint"]) for line in lines] == [
        (variant, constraint) for variant in script.VARIANTS for constraint in (0.7, 0.5)
    ]
    for line in lines:
        asked = script.VARIANTS[line["variant"]]
        assert asked.items() <= line["settings"].items()
        assert ("tune" in line["seconds"]) == asked.get("tune", True)
        assert line["achieved"]["mac"] <= line["constraint"]
    outcomes = {line["divergence"] for line in lines if line["constraint"] == 0.5}
    assert len(outcomes) == len(script.VARIANTS), "no two variants are the same thing"


def test_labels_in_the_batches_change_nothing_for_who_needs_none(
    sweep: Sweep, output: Path
) -> None:
    assert sweep("--variant kwon-search") == 0
    alone = lines_of(output)[0]
    output.unlink()
    assert sweep("--variant kwon-authors kwon-search") == 0
    beside = lines_of(output)[1]
    assert beside["variant"] == "kwon-search"
    assert (beside["layers"], beside["divergence"]) == (alone["layers"], alone["divergence"])


def test_only_what_is_missing_is_measured(
    sweep: Sweep, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep("--variant kwon-search --seed 0") == 0
    first = output.read_text()
    assert sweep("--variant kwon-search --seed 0 1 0 --constraint 0.5 0.3") == 0
    assert "3 of 4 measurements to make" in capsys.readouterr().err
    assert output.read_text().startswith(first)
    found = [(line["seed"], line["constraint"]) for line in lines_of(output)]
    assert found == [(0, 0.5), (0, 0.3), (1, 0.5), (1, 0.3)]
    before = output.read_bytes()
    assert sweep("--variant kwon-search --seed 1 --constraint 0.3") == 0
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    "flags",
    [
        "--samples 8",
        "--eval-limit 9",
        "--batch-size 4",
        "--max-length 8",
        "--metric params",
        "--dtype bfloat16",
    ],
)
def test_another_condition_is_another_measurement(
    script: ModuleType, sweep: Sweep, output: Path, flags: str
) -> None:
    assert sweep("--variant kwon-search --constraint 0.9") == 0
    assert sweep(f"--variant kwon-search --constraint 0.9 {flags}") == 0
    first, second = lines_of(output)
    assert sum(first[name] != second[name] for name in script.CONDITIONS) == 1


def test_it_goes_on_after_a_kill(
    script: ModuleType, sweep: Sweep, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between two measurements, and again in the middle of writing a line."""
    flags = "--variant kwon-search --constraint 0.7 0.5 0.3"
    append = script.append_line

    def stopped(path: Path, line: Any) -> None:
        if line is not None and line["constraint"] == 0.5:
            raise KeyboardInterrupt
        append(path, line)

    with monkeypatch.context() as patch:
        patch.setattr(script, "append_line", stopped)
        assert sweep(flags) == 130
    assert [line["constraint"] for line in lines_of(output)] == [0.7]
    with output.open("a") as file:
        file.write('{"model": "cut sho')
    assert sweep(flags) == 0
    assert [line["constraint"] for line in lines_of(output)] == [0.7, 0.5, 0.3]


def test_one_variant_that_fails_leaves_the_others(
    sweep: Sweep,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise UserError("no gradients today")

    monkeypatch.setattr("rfprune.methods.kwon.collect_gradients", fail)
    assert sweep("--variant kwon-search curvature-select") == 1
    assert [line["variant"] for line in lines_of(output)] == ["curvature-select"]
    assert "kwon-search: not measured: no gradients today" in capsys.readouterr().err


def test_a_constraint_below_what_is_never_pruned_is_named(
    sweep: Sweep, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep("--variant kwon-search --metric params --constraint 0.01") == 1
    assert "cannot be met" in capsys.readouterr().err
    assert lines_of(output) == []


def test_warnings_of_the_run_are_in_the_line(sweep: Sweep, output: Path) -> None:
    assert sweep("--variant kwon-search --samples 60") == 0
    (line,) = lines_of(output)
    assert (line["samples"], line["requested_samples"]) == (48, 60)
    assert "only 48" in line["warnings"][0]


def test_the_file_name_tells_the_conditions(script: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    folder.mkdir()
    flags = "--task rte --constraint 0.5 --metric params --samples 512 --eval-limit 100".split()
    options = script._parser().parse_args(["--model", str(folder), *flags])
    path = script.default_output(options)
    assert path.name == "quality_my--model_rte_params_512samples_100evaluated.jsonl"
    assert path.parent == SCRIPT.parents[1] / "results"
    options = script._parser().parse_args(["--model", "user/name", *flags])
    assert path.with_name(script.default_output(options).name).name.startswith(
        "quality_user--name_"
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--task mrcp", "mrcp"),
        ("--model no/such/folder", "no/such/folder"),
        ("--output scores.json", ".jsonl"),
    ],
)
def test_user_errors_are_one_sentence(
    sweep: Sweep, output: Path, flags: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(flags) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("sweep: error: ")
    assert said in message
    assert not output.exists()


@pytest.mark.parametrize("flag", ["--constraint 1", "--constraint x", "--samples 0", "--seed -1"])
def test_impossible_numbers_are_refused(sweep: Sweep, flag: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        sweep(flag)


def test_a_file_of_something_else_is_left_alone(
    sweep: Sweep, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output.parent.mkdir()
    output.write_text("my notes\nand more")
    assert sweep() == 2
    assert "something else than measurements" in capsys.readouterr().err
    assert output.read_text() == "my notes\nand more"


def test_a_place_that_cannot_be_written_is_named(
    sweep: Sweep, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output.parent.write_text("a file where the folder should be")
    assert sweep() == 2
    assert "cannot be written" in capsys.readouterr().err
