"""`scripts/benchmark_*.py` on tiny models: what they compare, what their files hold, how they fail.

Without these a benchmark of an hour could compare a model with itself, or lose its numbers at the
end. Nothing here depends on how long anything takes.
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
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
STAGES = {"collect", "search", "compact", "tune", "prune_total"}
TinyFolder = Callable[..., Path]


def load_script(name: str) -> Iterator[ModuleType]:
    specification = importlib.util.spec_from_file_location(f"{name}_script", SCRIPTS / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    yield module
    del sys.modules[module.__name__]


@pytest.fixture(scope="module")
def compact_script() -> Iterator[ModuleType]:
    yield from load_script("benchmark_compact")


@pytest.fixture(scope="module")
def pruning_script() -> Iterator[ModuleType]:
    yield from load_script("benchmark_pruning")


@pytest.fixture
def flags(tiny_folder: TinyFolder, tiny_data_dir: Path, tmp_path: Path) -> str:
    """A tiny model on MRPC; `test.json` is the output."""
    flags = f"--model {tiny_folder()} --task mrpc --data-dir {tiny_data_dir} --samples 16"
    return f"{flags} --rounds 2 --output {tmp_path / 'test.json'}"


def written(tmp_path: Path) -> dict[str, Any]:
    """What was written, which must not name a folder of this machine."""
    text = (tmp_path / "test.json").read_text()
    assert str(tmp_path.parent) not in text
    result: dict[str, Any] = json.loads(text)
    return result


@pytest.mark.parametrize(
    ("method", "compared"), [("kwon", "after tuning"), ("curvature", "before the refit")]
)
def test_compact_is_compared_with_masked_and_both_with_dense(
    method: str,
    compared: str,
    compact_script: ModuleType,
    flags: str,
    tiny_folder: TinyFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = f" --constraint 0.7 0.4 --sentences 40 --batch-size 8 --method {method}"
    assert compact_script.main((flags + more).split()) == 0
    result = written(tmp_path)
    assert (result["samples"], result["sentences"], result["task"]) == (16, 40, "mrpc")
    assert result["settings"]["method"] == method
    assert result["model"] == tiny_folder().name
    assert [row["constraint"] for row in result["constraints"]] == [0.7, 0.4]
    printed = capsys.readouterr().out
    for row in result["constraints"]:
        assert f"{row['bytes'] / 1e6:.1f}" in printed
        assert row["compared"] == compared
        assert 0 <= row["max_difference"] <= 1e-5
        assert row["max_difference_masked_dense"] > 0.01
        assert 0 < row["bytes"] < result["original_bytes"]
        assert row["achieved"]["mac"] <= row["constraint"]
    typical, long = result["speed"]
    assert (long["batch_size"], long["tokens"], long["rounds"]) == (8, 128, 2)
    assert typical["tokens"] < 128
    for speed in result["speed"]:
        for row, kept in zip(speed["constraints"], result["constraints"], strict=True):
            spread = row["speedup"]
            assert 0 < spread["quartile_1"] <= spread["median"] <= spread["quartile_3"]
            assert row["ideal_by_constraint"] == pytest.approx(1 / kept["constraint"])
            assert row["ideal_by_macs"] == pytest.approx(1 / kept["achieved"]["mac"], rel=0.2)


def test_a_compact_model_that_differs_is_told(
    compact_script: ModuleType, flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rfprune import pruning

    def spoil(*arguments: Any, **options: Any) -> Iterator[Any]:
        for result in prune_family(*arguments, **options):
            with torch.no_grad():
                result.model.classifier.weight += 1e-3
            yield result

    prune_family = pruning.prune_family
    monkeypatch.setattr(pruning, "prune_family", spoil)
    more = " --constraint 0.5 --sentences 16 --method kwon"
    assert compact_script.main((flags + more).split()) == 1
    assert written(tmp_path)["constraints"][0]["max_difference"] > 1e-5


def test_compact_answers_of_a_question_answering_model(
    compact_script: ModuleType, tiny_folder: TinyFolder, tiny_data_dir: Path, tmp_path: Path
) -> None:
    folder = tiny_folder("distilbert", "question-answering")
    flags = f"--model {folder} --task squad --data-dir {tiny_data_dir} --samples 8 --sentences 12"
    flags += f" --constraint 0.5 --rounds 1 --output {tmp_path / 'test.json'}"
    assert compact_script.main(flags.split()) == 0
    assert written(tmp_path)["constraints"][0]["max_difference_masked_dense"] > 0.01


def test_models_are_timed_in_turn(compact_script: ModuleType) -> None:
    calls: list[str] = []
    models = [lambda input_ids, name=name: calls.append(name) for name in "abc"]
    times = compact_script._time_in_turn(models, {"input_ids": torch.zeros(1)}, 4)
    assert [len(own) for own in times] == [4, 4, 4]
    timed = "".join(calls[3 * compact_script.WARM_UP_ROUNDS :])
    assert timed == "abcbcacababc"


def test_pruning_is_timed_by_stage_and_its_memory_measured(
    pruning_script: ModuleType,
    flags: str,
    tiny_folder: TinyFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert pruning_script.main(f"{flags} --samples 8 16 --method curvature".split()) == 0
    result = written(tmp_path)
    assert (result["model"], result["task"]) == (tiny_folder().name, "mrpc")
    assert [run["samples"] for run in result["runs"]] == [8, 16]
    assert [run["layers"] for run in result["runs"]] == [2, 2]
    for run in result["runs"]:
        yardsticks = run["yardsticks"]
        assert 0 < yardsticks["forward_backward"] < yardsticks["floor"]
        row = run["methods"]["curvature"]
        assert set(row) >= STAGES
        assert len(row["all_seconds"]) == 2
        assert min(row["all_seconds"]) <= row["prune_total"] <= max(row["all_seconds"])
        assert 0 < row["times_floor"] < row["times_forward_backward"]
    peaks = result["peak_bytes"]
    assert set(peaks) == {"load", "curvature"}
    assert min(peaks.values()) > result["model_bytes"]
    assert result["allowed_bytes"] == 2 * result["model_bytes"] + 10**9
    assert "curvature" in capsys.readouterr().out


def test_a_training_step_is_the_yardstick(
    pruning_script: ModuleType, tiny_folder: TinyFolder, flags: str
) -> None:
    """With a gradient for every parameter; and nothing is left behind."""
    options = pruning_script._parser().parse_args(flags.split())
    loaded = pruning_script._load(options)
    batches = pruning_script._batches(options, loaded, 8)
    reached: set[str] = set()
    for name, parameter in loaded.model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: reached.add(name))
    pruning_script._yardsticks(loaded.model, batches)
    assert reached == {name for name, _ in loaded.model.named_parameters()}
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


def test_random_models_grow_in_width_and_depth(
    pruning_script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"--synthetic --samples 8 --rounds 1 --output {tmp_path / 'test.json'} --method kwon"
    flags += " --widths 64 128 --depths 1 2 --curves 64 2"
    assert pruning_script.main(flags.split()) == 0
    result = written(tmp_path)
    sizes = [(run["hidden_size"], run["layers"]) for run in result["runs"]]
    assert sizes == [(64, 1), (128, 1), (64, 2)]
    assert result["runs"][0]["tokens"] == 8 * 64
    curves = result["curves"]
    assert (curves["hidden_size"], curves["layers"]) == (64, 2)
    assert curves["seconds"] > 0
    assert curves["peak_bytes"] >= curves["collected_peak_bytes"] > curves["model_bytes"]
    assert "error curves of 2 layers" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["compact", "pruning"])
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ("--task mprc", "Unknown task 'mprc'"),
        ("--model missing/folder", "missing/folder"),
        ("--rounds 0", "--rounds 0"),
        ("--constraint 1.5", "1.5"),
        ("--output missing/file.json", "there is no folder"),
        ("--output .", "exists already"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(
    name: str,
    changes: str,
    what: str,
    request: pytest.FixtureRequest,
    flags: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    script = request.getfixturevalue(f"{name}_script")
    assert script.main(f"{flags} --constraint 0.5 {changes}".split()) == 2
    told = capsys.readouterr()
    assert what in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert list(tmp_path.iterdir()) == []
