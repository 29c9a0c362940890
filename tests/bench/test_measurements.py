"""Every measurement of time, memory and bytes once, end to end, at tiny size; no time is judged.

Without these tests an hour of measuring could compare a model with itself, count MACs that were not
run, or lose its numbers at the end.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rfprune.cost.macs import total_macs
from rfprune.errors import UserError
from rfprune.latency.timing import TimingBudget
from rfprune.model.layout import layout_of
from rfprune.result import StageTimer
from scripts.bench import (
    collection,
    depth_speed,
    exports,
    first_model,
    gguf,
    large_models,
    max_drop,
    models,
    promise,
    pruning_time,
    scale,
    speedup,
    time_tables,
    timed_models,
)
from scripts.profile_latency import load_model
from tests.bench.conftest import ReadLines
from tests.export.byte_level import byte_level_tokenizer

TinyFolder = Callable[..., Path]
STAGES = {"collect", "search", "compact", "tune", "prune_total"}
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))
HAS_OPENVINO = all(importlib.util.find_spec(name) for name in ("openvino", "nncf"))
FORMATS = ("onnx", "openvino")[: 1 + HAS_OPENVINO]
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="needs the extra rfprune[onnx]")


@needs_onnx
def test_exports_are_scored_and_timed_beside_the_original(flags: str, lines: ReadLines) -> None:
    more = f"--rounds 1 --eval-limit 12 --constraint 0.5 --formats {' '.join(FORMATS)}"
    assert exports.main(f"{flags} {more}".split()) == 0
    (line,) = lines()
    rows = line["models"]
    suffixes = [f"-{name}{kind}" for name in FORMATS for kind in ("", "-int8")]
    assert list(rows) == [f"{name}{one}" for name in ("original", "0.5") for one in ("", *suffixes)]
    assert rows["original"]["divergence"] == 0
    pruned = rows["0.5"]
    for name in FORMATS:
        assert rows[f"original-{name}"]["divergence"] < 1e-6 < pruned["divergence"]
        divergence = rows[f"0.5-{name}"]["divergence"]
        assert divergence == pytest.approx(pruned["divergence"], 1e-3)
        assert rows[f"0.5-{name}-int8"]["bytes"] < rows[f"0.5-{name}"]["bytes"]
    assert pruned["bytes"] < rows["original"]["bytes"]
    shapes = [(one["batch_size"], one["sequence_length"]) for one in line["speed"]]
    assert shapes[0] == (1, shapes[1][1])
    assert shapes[2] == (8, 128)
    assert all(set(one["ms"]) == set(rows) for one in line["speed"])


@pytest.fixture
def text_flags(tiny_model: Callable[..., Any], tmp_path: Path, output: Path) -> str:
    """A tiny LLaMA and running text, 8 blocks of 32 tokens."""
    folder, data = tmp_path / "model", tmp_path / "data"
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 320}
    tiny_model("llama", "causal-lm", **sizes).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    data.mkdir()
    for split in ("train", "validation"):
        (data / f"{split}.txt").write_text("the cat sat on that hat. " * 100)
    given = f"--model {folder} --data-dir {data} --output {output} --max-length 32"
    return f"{given} --samples 8 --eval-limit 8"


@pytest.mark.llamacpp
def test_gguf_files_are_scored_and_timed_by_llama_cpp(text_flags: str, lines: ReadLines) -> None:
    more = "--task language-modeling --constraint 0.5 --formats gguf --rounds 1"
    assert exports.main(f"{text_flags} {more}".split()) == 0
    (line,) = lines()
    rows = line["models"]
    suffixes = ("", "-gguf-f16", "-gguf-q8_0", "-gguf-q4_0")
    assert list(rows) == [f"{name}{one}" for name in ("original", "0.5") for one in suffixes]
    assert rows["0.5-gguf-f16"]["score"] == pytest.approx(rows["0.5"]["score"], rel=0.01)
    assert rows["original-gguf-f16"]["divergence"] < 1e-3 < rows["0.5"]["divergence"]
    assert all(row["bytes"] > 0 for row in rows.values())
    assert all(set(one["ms"]) == set(rows) for one in line["speed"])


@pytest.mark.llamacpp
def test_llama_cpp_is_compared_with_pytorch(text_flags: str, lines: ReadLines) -> None:
    assert gguf.main(f"{text_flags} --constraint 0.5 0.7".split()) == 0
    found = lines()
    assert [(line["constraint"], line["emptied"]) for line in found] == [
        *((0.5, None), (0.7, None), (0.7, "head"), (0.7, "neuron"))
    ]
    assert found[2]["emptied_block"] == "layer.2.heads"
    for line in found:
        ours, theirs = line["perplexity"]["pytorch"], line["perplexity"]["llama_cpp"]
        assert theirs == pytest.approx(ours, rel=0.01)
        assert len(line["agreed_tokens"]) == 8
        assert min(line["agreed_tokens"]) >= 1
    assert len({line["perplexity"]["pytorch"] for line in found}) == 4


def test_pruning_is_timed_by_one_process_and_by_two(flags: str, lines: ReadLines) -> None:
    more = "--method kwon --rounds 1 --processes 1 2"
    assert pruning_time.main(f"{flags} {more}".split()) == 0
    found = lines()
    assert [(line["method"], line["processes"]) for line in found] == [("kwon", 1), ("kwon", 2)]
    for line in found:
        assert line["same_masks"]
        assert line["samples"] == 16
        assert line["seconds"].keys() >= STAGES
        assert line["all_seconds"] == [line["seconds"]["prune_total"]]
        assert line["settings"]["method"] == "kwon"
        assert 0 < line["yardsticks"]["forward_backward"] < line["yardsticks"]["floor"]
        assert 0 < line["times_floor"] < line["times_forward_backward"]
        assert min(line["peak_bytes"], line["load_peak_bytes"]) > line["model_bytes"]


def test_a_training_step_is_the_yardstick(tiny_model: Callable[..., Any]) -> None:
    """With a gradient for every parameter, and no gradients left behind."""
    model = tiny_model()
    batch = models.random_batch(model, 2, 5) | {"labels": torch.tensor([0, 1])}
    reached: set[str] = set()
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda _, name=name: reached.add(name))
    pruning_time.yardsticks_of(model, [batch])
    assert reached == {name for name, _ in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_max_drop_is_searched_and_its_report_kept(
    flags: str,
    lines: ReadLines,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rfprune.cli.run.below_baseline", lambda *_: None)  # it is untrained
    assert max_drop.main(f"{flags} --points 99 --eval-limit 12".split()) == 0
    (line,) = lines()
    assert (line["points"], line["evaluated_examples"]) == (99, 12)
    assert line["probes"] == len(line["path"]) > 0
    assert line["drop"] == pytest.approx(line["original_score"] - line["score"])
    assert min(line["seconds"], line["single_seconds"]) > 0
    assert line["settings"]["method"] == "curvature"
    assert max_drop.main(f"{flags} --points 0 --task stsb".split()) == 1
    assert "not measured" in capsys.readouterr().err


@pytest.fixture
def shape_flags(tiny_folder: TinyFolder, output: Path) -> str:
    return f"--model {tiny_folder(intermediate_size=64)} --seconds 0 --output {output}"


def test_promised_latencies_are_measured_again(
    tiny_folder: TinyFolder, output: Path, lines: ReadLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With FFNs so wide that their time dominates on any machine."""
    monkeypatch.setattr("rfprune.latency.speedup.RATIO_BUDGET", TimingBudget(0.0, 2, 2))
    flags = f"--model {tiny_folder(intermediate_size=2048)} --output {output} --seconds 0"
    more = "--batch-size 16 --length 32 --constraint 0.95 0.9 --profile-seconds 0"
    assert promise.main(f"{flags} {more}".split()) == 0
    found = lines()
    assert [line["constraint"] for line in found] == [0.95, 0.9]
    for line in found:
        assert line["attempts"][0]["predicted"] <= line["constraint"] + 1e-6
        assert line["measured"] > 0
        assert line["rounds"] >= promise.MIN_ROUNDS
        assert 0 < line["by_mac"]["mac"] <= line["mac"] + 1e-9
        assert line["by_mac"]["measured"] > 0
        assert line["table"]["total_ms"] > 0
        assert line["threads"] == torch.get_num_threads()


def test_the_ideal_speedup_counts_what_the_pruned_model_runs(
    shape_flags: str, lines: ReadLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = []

    def pruned_to(*args: Any) -> Any:
        pruned.append(models.pruned_to(*args))
        return pruned[-1]

    monkeypatch.setattr(timed_models, "pruned_to", pruned_to)
    more = "--runtime eager --rounds 2 --cells 1x5 3x9 --constraint 0.75 0.25 --round-to 1 8"
    assert speedup.main(f"{shape_flags} {more}".split()) == 0
    found = lines()
    cells = [(line["batch_size"], line["length"], line["constraint"]) for line in found[::2]]
    assert cells == [(1, 5, 0.75), (1, 5, 0.25), (3, 9, 0.75), (3, 9, 0.25)]
    assert [line["round_to"] for line in found] == [1, 8] * 4
    dense = load_model(shape_flags.split()[1], None, torch.float32)
    for line, model in zip(found, pruned * 2, strict=True):
        before, after = (total_macs(layout_of(one), line["length"]) for one in (dense, model))
        assert line["ideal"] == pytest.approx(before / after, rel=1e-4)
        assert line["quotient"] == pytest.approx(line["speedup"] / line["ideal"], abs=1e-4)
        assert (line["rounds"], line["machine"]["threads"]) == (2, torch.get_num_threads())
        sizes = [block.num_units for block in layout_of(model).blocks]
        kept = [size for layer in line["layers"] for size in layer.values()]
        assert [size for size in kept if size] == [size for size in sizes if size]
    assert found[0]["ideal"] != found[4]["ideal"], "the length matters"


def test_narrower_and_fewer_layers_are_compared_at_equal_macs(
    shape_flags: str, lines: ReadLines
) -> None:
    flags = f"{shape_flags} --rounds 2 --cells 1x5 3x9 --constraint 0.5"
    assert depth_speed.main(flags.split()) == 0
    for line in lines():
        assert line["ways"]["layers"]["ideal"] == pytest.approx(2), "one of two layers"
        assert line["ways"]["widths"]["ideal"] == pytest.approx(2, rel=0.2)
    assert "narrower layers" in time_tables.depth_speed(lines())


def test_processes_prepare_side_by_side_and_measure_one_at_a_time(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    path = tmp_path / "turns"
    with speedup.taking_turns(path) as wait, path.open("a") as third:
        wait(False)
        with speedup.taking_turns(path) as other_waits:
            other_waits(False)
            with pytest.raises(BlockingIOError):
                fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
        wait(True)  # the other is done
        with pytest.raises(BlockingIOError):
            fcntl.flock(third, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_every_runtime_runs_the_model_that_it_was_given(tiny_model: Callable[..., Any]) -> None:
    one, other = tiny_model(), tiny_model(seed=1)
    batch = models.random_batch(one, 3, 9)
    with torch.inference_mode():
        expected = one(**batch).logits
        assert not torch.allclose(expected, other(**batch).logits, atol=1e-2)
        for runtime in ("eager", *["onnx"] * HAS_ONNX):
            found: Any = timed_models.runner(runtime, one)(batch)
            assert torch.allclose(found["logits"], expected, atol=1e-4)


def test_each_compiled_model_has_code_of_its_own(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch compiles a code object again for each model, at most eight times."""
    compiled: list[Any] = []

    def note(run: Any, **_: Any) -> Any:
        compiled.append(run)
        return run

    monkeypatch.setattr(torch, "compile", note)
    batch = models.random_batch(tiny_model(), 2, 5)
    for model in (tiny_model(), tiny_model(seed=1)):
        found: Any = timed_models.runner("compile", model)(batch)
        assert torch.equal(found.logits, model(**batch).logits)
    assert compiled[0].__code__ is not compiled[1].__code__


def test_drawn_structures_are_uneven_nested_and_emptied_when_little_is_left(
    tiny_model: Callable[..., Any],
) -> None:
    layout = layout_of(tiny_model(num_hidden_layers=4, intermediate_size=64))
    draw = models.draw_structure
    large, small = (draw(layout, ratio, seed=0) for ratio in (0.75, 0.25))
    assert all(few <= many for few, many in zip(small, large, strict=True))
    assert len(set(large[1::2])) > 1
    assert small[::2].count(0) >= 1
    assert small[1::2].count(0) >= 1
    assert draw(layout, 0.75, seed=1) != large
    rounded = draw(layout, 0.75, seed=0, round_to=16)
    assert all(count % 16 == 0 for count in rounded[1::2])
    assert rounded[::2] == large[::2]


def test_a_profile_adds_up(shape_flags: str, lines: ReadLines) -> None:
    more = "--profile --rounds 2 --cells 1x5 3x9 --constraint 0.25"
    assert speedup.main(f"{shape_flags} {more}".split()) == 0
    (line,) = lines()
    (row,) = line["pruned"]
    assert (line["batch_size"], line["length"], row["constraint"]) == (1, 5, 0.25)
    for own in (line["dense"]["ms"], row["ms"], row["lost_ms"]):
        parts = [value for name, value in own.items() if name != "all"]
        assert sum(parts) == pytest.approx(own["all"], abs=1e-3)
    assert min(line["dense"]["ms"][kind] for kind in ("matrix products", "norms")) > 0
    products = {(one["inputs"], one["outputs"]) for one in line["dense"]["products"]}
    assert {(16, 64), (64, 16), (16, 16)} <= products
    neurons = {layer["neurons"] for layer in row["layers"]} - {0}
    assert neurons <= {one["outputs"] for one in row["products"] if one["inputs"] == 16}


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_the_gpu_runs_every_runtime(shape_flags: str, output: Path, lines: ReadLines) -> None:
    cells = f"{shape_flags} --rounds 2 --cells 1x5 3x9 --device cuda --constraint 0.5"
    runtimes = "--runtime eager compile compile-graphs --dtype float32 bfloat16"
    assert speedup.main(f"{cells} {runtimes}".split()) == 0
    assert len(lines()) == 12
    assert {line["device"] for line in lines()} == {"cuda"}
    output.unlink()
    assert speedup.main(f"{cells} --profile".split()) == 0
    assert lines()[0]["dense"]["ms"]["matrix products"] > 0


def test_a_scale_line_holds_seconds_and_memory_by_stage(output: Path, lines: ReadLines) -> None:
    flags = f"--size tiny --samples 2 --length 8 --offload none disk --output {output}"
    assert scale.main(flags.split()) == 0
    assert [line["offload"] for line in lines()] == ["none", "disk"]
    for line in lines():
        stages = set(line["seconds"]) - {"prune_total", "wall"}
        assert {"collect", "search", "compact", "tune", "save"} <= stages
        assert set(line["peak_bytes"]) == stages | {"start"}
        assert min(line["peak_bytes"].values()) > line["weight_bytes"]
        assert line["peak_resident_bytes"] > 0.9 * max(line["peak_bytes"].values())
        assert 0 < line["achieved"]["mac"] <= 0.7
    in_memory, offloaded = lines()
    for name in ("params", "weight_bytes"):
        assert in_memory[name] == offloaded[name]


def test_a_plan_of_larger_models_is_checked_against_measured_ones(
    tmp_path: Path, lines: ReadLines, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2048}
    models = {"less": {**sizes, "num_hidden_layers": 1}, "more": {**sizes, "num_hidden_layers": 8}}
    monkeypatch.setattr(large_models, "MODELS", models)
    measured = {
        "size": "tiny",
        "device": "cuda",
        "device_name": "a card",
        "dtype": "float32",
        "samples": 8,
        "length": 16,
        "batch_size": 2,
        "constraint": 0.7,
        "params": 10**6,
        "seconds": dict.fromkeys(STAGES, 2.0),
        "peak_bytes": {"tune": 10**9},
        "threads": 1,
    }
    smaller = {**measured, "params": 10**5, "seconds": dict.fromkeys(STAGES, 1.0)}
    text = "\n".join(map(json.dumps, [smaller, measured]))
    (tmp_path / "scale_a.jsonl").write_text(text + "\n", encoding="utf-8")
    for _ in range(2):  # a second plan replaces the first
        flags = ["--results", str(tmp_path), "--output", str(output)]
        assert large_models.main(flags) == 0
    *plans, half, whole = lines()
    assert [(line["model"], line["cards"]) for line in plans] == [
        (model, cards) for model in models for cards in (1, 8)
    ]
    seconds = [sum(line["predicted_seconds"].values()) for line in plans]
    assert seconds[1] < seconds[0] < seconds[2]
    assert plans[1]["bytes"]["layers"] == 4 * plans[0]["bytes"]["layers"]
    assert whole["is_reference"]
    assert half["predicted_seconds"] == dict.fromkeys(("collect", "search", "tune"), 2.0)
    assert "| more | 8 |" in time_tables.large_models(lines())


def test_a_collection_is_measured_as_a_whole_and_layer_by_layer(
    output: Path, lines: ReadLines
) -> None:
    flags = f"--size tiny --samples 2 --length 8 --batch-size 1 --output {output}"
    assert collection.main(flags.split()) == 0
    assert [line["way"] for line in lines()] == ["whole", "layers"]
    for line in lines():
        assert line["peak_bytes"] >= line["bytes_before"] > line["weight_bytes"]
        assert line["seconds"] > 0


def test_memory_is_attributed_to_the_stage_that_uses_it() -> None:
    own, size = StageTimer.stage, 256 * 2**20
    deadline = time.monotonic() + 60
    with scale.sampled_memory("cpu") as peaks:
        enough = peaks["start"] + size // 2  # imports may free some meanwhile
        with StageTimer().stage("collect"):
            block = bytearray(size)
            block[:: 2**12] = b"x" * len(block[:: 2**12])
            while peaks.get("collect", 0) < enough and time.monotonic() < deadline:
                time.sleep(scale.SECONDS_BETWEEN)
            del block  # else the stages after it have it too
    assert peaks["collect"] >= enough
    assert peaks["start"] < peaks["collect"], peaks
    assert StageTimer.stage is own


REPORT = '{"command": "x", "seconds": {"tune": 1}, "achieved": {"mac": 0.5}, "versions": {}}'


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a script that writes the output of a run."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "prune.sh").write_text(
        f"mkdir -p outputs/a; echo '{REPORT}' > outputs/a/report.json; "
        "printf 12345 > outputs/a/model.safetensors\n"
    )
    git = ["git", "-C", str(source), "-c", "user.name=n", "-c", "user.email=e@x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    return source


def test_the_first_model_is_timed_from_the_clone(
    repository: Path, output: Path, lines: ReadLines
) -> None:
    flags = ["--source", str(repository), "--output", str(output)]
    flags += ["--install-command", "mkdir .venv", "--command", "sh prune.sh"]
    assert first_model.main(flags) == 0
    (line,) = lines()
    assert line["seconds"].keys() == {"clone", "install", "prune", "total"}
    assert line["bytes"]["weights"] == 5
    assert line["run"]["achieved"] == {"mac": 0.5}
    assert len(line["cloned_commit"]) == 40
    assert first_model.main(flags) == 0
    assert len(lines()) == 1


@pytest.mark.parametrize(
    ("install", "prune", "words"),
    [
        ("sh -c 'exit 3'", "sh prune.sh", "ended with 3"),
        ("true", "true", "left no model"),
        ("no-such-program", "true", "cannot be run"),
    ],
)
def test_a_step_that_fails_is_named(
    install: str, prune: str, words: str, repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "new").mkdir()
    with pytest.raises(UserError, match=words):
        first_model.measure(str(repository), tmp_path / "new", install, prune)
