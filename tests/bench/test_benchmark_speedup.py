"""`scripts/benchmark_speedup.py` and `scripts/speedup_table.py` on tiny models; no time is judged.

Deleting this lets an hour of measurements compare a model with itself, count MACs that were not
run, measure twice what it has, or mix machines in one table.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rfprune.cost.macs import total_macs
from rfprune.model.layout import layout_of
from scripts import speedup_models, speedup_timing
from tests.bench.test_benchmarks import load_script

TinyFolder = Callable[..., Path]
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    yield from load_script("benchmark_speedup")


@pytest.fixture(scope="module")
def table() -> Iterator[ModuleType]:
    yield from load_script("speedup_table")


@pytest.fixture
def flags(tiny_folder: TinyFolder, tmp_path: Path) -> str:
    folder = tiny_folder(intermediate_size=64)
    flags = f"--model {folder} --runtime eager --rounds 2 --seconds 0 --cells 1x5 3x9"
    return f"{flags} --output {tmp_path / 'speedup_test.jsonl'}"


def lines_of(tmp_path: Path) -> list[dict[str, Any]]:
    text = (tmp_path / "speedup_test.jsonl").read_text()
    assert str(tmp_path.parent) not in text
    return [json.loads(line) for line in text.splitlines()]


def test_each_cell_is_a_line_with_its_conditions(
    script: ModuleType, flags: str, tmp_path: Path, tiny_folder: TinyFolder
) -> None:
    assert script.main(f"{flags} --constraint 0.75 0.25 --round-to 1 8".split()) == 0
    lines = lines_of(tmp_path)
    cells = [(line["batch_size"], line["length"], line["constraint"]) for line in lines[::2]]
    assert cells == [(1, 5, 0.75), (1, 5, 0.25), (3, 9, 0.75), (3, 9, 0.25)]
    assert [line["round_to"] for line in lines] == [1, 8] * 4
    for line in lines:
        assert line["model"] == tiny_folder(intermediate_size=64).name
        assert line["quotient"] == pytest.approx(line["speedup"] / line["ideal"], rel=1e-3)
        assert min(line["dense_ms"], line["pruned_ms"]) > 0
        assert line["rounds"] == 2
        assert line["machine"]["threads"] == torch.get_num_threads()
        assert line["machine"]["versions"]["torch"] == torch.__version__
        assert {"device_name", "cores", "tf32"} <= line["machine"].keys()


def test_the_ideal_counts_what_the_pruned_model_runs_at_this_length(
    script: ModuleType, flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = []

    def prune_to(*args: Any) -> Any:
        pruned.append(speedup_models.prune_to(*args))
        return pruned[-1]

    monkeypatch.setattr(speedup_timing, "prune_to", prune_to)
    assert script.main(f"{flags} --constraint 0.5".split()) == 0
    (model,) = pruned
    ideals = []
    for line in lines_of(tmp_path):
        after = total_macs(layout_of(model), line["length"])
        dense = speedup_models.load_dense(None, flags.split()[1])
        before = total_macs(layout_of(dense), line["length"])
        assert line["ideal"] == pytest.approx(before / after, rel=1e-4)
        ideals.append(line["ideal"])
        kept = [(layer["heads"], layer["neurons"]) for layer in line["layers"]]
        units = iter(layout_of(model).blocks)
        assert kept == [(next(units).num_units, next(units).num_units) for _ in kept]
    assert ideals[0] != ideals[1]  # or the length would not matter


def test_a_second_run_measures_what_is_missing_alone(
    script: ModuleType, flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(f"{flags} --constraint 0.5".split()) == 0
    output = tmp_path / "speedup_test.jsonl"
    before = output.read_text()
    output.write_text(before + '{"model": "cut sh')  # killed while it wrote
    capsys.readouterr()
    assert script.main(f"{flags} --constraint 0.5 0.25".split()) == 0
    assert "2 of 4 cells to measure" in capsys.readouterr().err
    assert output.read_text().startswith(before)
    assert [line["constraint"] for line in lines_of(tmp_path)] == [0.5, 0.5, 0.25, 0.25]
    assert script.main(f"{flags} --constraint 0.5 0.25".split()) == 0
    assert "0 of 4 cells" in capsys.readouterr().err


def test_another_machine_needs_another_file(
    script: ModuleType, flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(f"{flags} --constraint 0.5".split()) == 0
    output = tmp_path / "speedup_test.jsonl"
    text = output.read_text().replace('"threads": ', '"threads": 9')
    output.write_text(text)
    assert script.main(f"{flags} --constraint 0.25".split()) == 2
    assert "another machine" in capsys.readouterr().err
    assert output.read_text() == text


def test_processes_prepare_together_and_measure_one_at_a_time(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    path = tmp_path / "turns"
    with speedup_timing.taking_turns(path) as wait, path.open("a") as third:
        wait(False)
        with speedup_timing.taking_turns(path) as other_waits:
            other_waits(False)
            with pytest.raises(BlockingIOError):
                fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
        wait(True)  # the other is done
        with pytest.raises(BlockingIOError):
            fcntl.flock(third, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_taking_turns_measures_the_same(script: ModuleType, flags: str, tmp_path: Path) -> None:
    assert script.main(f"{flags} --constraint 0.5 --turns {tmp_path / 'turns'}".split()) == 0
    assert [line["length"] for line in lines_of(tmp_path)] == [5, 9]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ("--turns missing/file", "--turns missing/file"),
        ("--cells 32by128", "32by128 is no shape"),
        ("--cells 0x5", "0 x 5"),
        ("--cells 1x900", "--length 900"),
        ("--constraint 1.5", "1.5"),
        ("--round-to 0", "--round-to 0"),
        ("--rounds 0", "--rounds 0"),
        ("--seconds nan", "--seconds nan"),
        ("--runtime compile-graphs", "--device cpu"),
        ("--model missing/folder", "missing/folder"),
        ("--output test.json", "must end in .jsonl"),
        ("--runtime compile --profile", "leave --runtime out"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(
    changes: str,
    what: str,
    script: ModuleType,
    flags: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert script.main(f"{flags} {changes}".split()) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "cells to measure" not in line]
    assert what in told[0]
    assert len(told) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not HAS_ONNX, reason="needs the extra rfprune[onnx]")
def test_onnx_runs_in_float32_alone(
    script: ModuleType, flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = f"{flags} --constraint 0.25 --runtime onnx --dtype"
    assert script.main(f"{more} bfloat16".split()) == 2
    assert "float32 alone" in capsys.readouterr().err
    assert script.main(f"{more} float32 bfloat16".split()) == 0
    assert {(line["runtime"], line["dtype"]) for line in lines_of(tmp_path)} == {
        ("onnx", "float32")
    }


@pytest.mark.skipif(not HAS_ONNX, reason="needs the extra rfprune[onnx]")
def test_every_runtime_runs_the_model_it_was_given(tiny_model: Any) -> None:
    one, other = tiny_model(), tiny_model(seed=1)
    batch = speedup_models.make_batch(one, 3, 9)
    with torch.inference_mode():
        expected = one(**batch).logits
        assert not torch.allclose(expected, other(**batch).logits, atol=1e-2)
        for runtime in ("eager", "onnx"):
            found = speedup_models.runner(runtime, one)(batch)
            assert torch.allclose(found["logits"], expected, atol=1e-4)  # type: ignore[index]


def test_each_compiled_model_has_code_of_its_own(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch compiles a code object again for each model, and no more often than eight times."""
    compiled: list[Any] = []

    def note(run: Any, **_: Any) -> Any:
        compiled.append(run)
        return run

    monkeypatch.setattr(torch, "compile", note)
    models = [tiny_model(seed=seed) for seed in (0, 1)]
    batch = speedup_models.make_batch(models[0], 2, 5)
    for model in models:
        logits = speedup_models.runner("compile", model)(batch).logits  # type: ignore[attr-defined]
        assert torch.equal(logits, model(**batch).logits)
    assert compiled[0].__code__ is not compiled[1].__code__


def test_structures_are_uneven_nested_and_emptied_where_little_is_left(tiny_model: Any) -> None:
    layout = layout_of(tiny_model(num_hidden_layers=4, intermediate_size=64))
    draw = speedup_models.draw_structure
    large, small = (draw(layout, ratio, seed=0) for ratio in (0.75, 0.25))
    assert all(few <= many for few, many in zip(small, large, strict=True))
    assert len(set(large[1::2])) > 1
    assert small[::2].count(0) >= 1
    assert small[1::2].count(0) >= 1
    assert draw(layout, 0.75, seed=1) != large
    rounded = draw(layout, 0.75, seed=0, round_to=16)
    assert all(count % 16 == 0 for count in rounded[1::2])
    assert rounded[::2] == large[::2]


def test_a_profile_adds_up(script: ModuleType, flags: str, tmp_path: Path) -> None:
    output = tmp_path / "speedup_profile_test.json"
    assert script.main(f"{flags} --constraint 0.25 --profile --output {output}".split()) == 0
    result = json.loads(output.read_text())
    (row,) = result["pruned"]
    assert (result["batch_size"], result["length"], row["constraint"]) == (1, 5, 0.25)
    for own in (result["dense"]["ms"], row["ms"], row["lost_ms"]):
        parts = [value for name, value in own.items() if name != "all"]
        assert sum(parts) == pytest.approx(own["all"], abs=1e-3)
    assert result["dense"]["ms"]["matrix products"] > 0
    assert result["dense"]["ms"]["norms"] > 0
    products = {(one["inputs"], one["outputs"]) for one in result["dense"]["products"]}
    assert {(16, 64), (64, 16), (16, 16)} <= products
    neurons = {layer["neurons"] for layer in row["layers"]} - {0}
    inner = {one["outputs"] for one in row["products"] if one["inputs"] == 16}
    assert neurons <= inner
    assert script.main(f"{flags} --profile --output {output}".split()) == 2


def test_the_tables_show_every_cell_and_know_when_they_are_stale(
    script: ModuleType,
    table: ModuleType,
    flags: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    places = ["--results", str(tmp_path), "--readme", str(readme)]
    assert table.main(places) == 2
    assert "run scripts/benchmark_speedup.py first" in capsys.readouterr().err
    assert script.main(f"{flags} --constraint 0.5 --round-to 8".split()) == 0
    assert table.main(places) == 2
    assert "32 x 128" in capsys.readouterr().err
    more = flags.replace("1x5 3x9", "32x128 3x9")
    assert script.main(f"{more} --constraint 0.75 0.25".split()) == 0
    profile = tmp_path / "speedup_profile_test.json"
    assert script.main(f"{flags} --constraint 0.5 --profile --output {profile}".split()) == 0
    assert table.main([*places, "--check"]) == 1
    assert table.main(places) == 0
    assert table.main([*places, "--check"]) == 0
    full = (tmp_path / "speedup.md").read_text()
    for line in lines_of(tmp_path):
        entry = f"{line['speedup']:.2f} of {line['ideal']:.2f} ({line['quotient']:.2f})"
        assert entry in full
    assert "| 0.75 of MACs | 0.5 of MACs, by 8 | 0.25 of MACs |" in full
    assert "Where the rest goes" in full
    short = readme.read_text()
    assert short.startswith("before\n")
    assert "0.75 of MACs" in short
    assert "by 8" not in short
    profile.write_text("{}")
    assert table.main([*places, "--check"]) == 2
    assert "speedup_profile_test.json" in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_the_gpu_runs_every_runtime(script: ModuleType, flags: str, tmp_path: Path) -> None:
    runtimes = "--runtime eager compile compile-graphs --dtype float32 bfloat16"
    assert script.main(f"{flags} --device cuda --constraint 0.5 {runtimes}".split()) == 0
    lines = lines_of(tmp_path)
    assert len(lines) == 12
    assert {line["device"] for line in lines} == {"cuda"}
    profile = f"{flags} --device cuda --profile --output {tmp_path / 'profile.json'}"
    assert script.main(profile.split()) == 0
    result = json.loads((tmp_path / "profile.json").read_text())
    assert result["dense"]["ms"]["matrix products"] > 0
