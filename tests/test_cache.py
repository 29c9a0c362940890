"""The cache gives what would have been computed, or nothing.

Deleting this lets a run reuse the statistics of another model, other data or other code, or fail
because of its cache.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rfprune import cache
from rfprune.cost.constraint import Constraint
from rfprune.errors import RfpruneWarning
from rfprune.methods.problem import prepare_problem
from rfprune.methods.statistics import collect_statistics
from rfprune.pruning import prune, prune_family
from rfprune.result import PruneResult
from rfprune.settings import METHODS, Settings

Tiny = Callable[..., Any]
Batch = dict[str, Tensor]
HALF, THIRD = Constraint("mac", 0.5), Constraint("mac", 0.3)
COLLECTORS = {
    "kwon": "collect_gradients",
    "curvature": "collect_curvature",
    "criteria": "compute_importance",
}
KEY: cache.Key = {"entry": "of a test"}
TENSORS = (torch.arange(3), torch.tensor([[1.5, -2.0]], dtype=torch.float64), torch.ones(0, 2))


@pytest.fixture(params=METHODS)
def settings(request: pytest.FixtureRequest) -> Settings:
    return Settings(method=request.param)


@pytest.fixture
def batches(tiny_batch: Tiny) -> list[Batch]:
    return [tiny_batch(6, 7 + seed, seed=seed) for seed in range(3)]


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One name for each collection of statistics."""
    seen: list[str] = []

    def spied(original: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*arguments: Any, **options: Any) -> Any:
            seen.append(original.__name__)
            return original(*arguments, **options)

        return spy

    for module, name in COLLECTORS.items():
        path = f"rfprune.methods.{module}"
        monkeypatch.setattr(f"{path}.{name}", spied(getattr(import_module(path), name)))
    return seen


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def assert_same(one: PruneResult, other: PruneResult) -> None:
    """To the last bit."""
    assert one.layers == other.layers
    weights = one.model.state_dict(), other.model.state_dict()
    assert list(weights[0]) == list(weights[1])
    pairs = [*zip(weights[0].values(), weights[1].values(), strict=True)]
    pairs += zip(one.masks, other.masks, strict=True)
    pairs += zip(one.importance or (), other.importance or (), strict=True)
    for a, b in zip(one.curves or (), other.curves or (), strict=True):
        pairs += [(a.order, b.order), (a.errors, b.errors)]
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_another_constraint_collects_nothing_and_changes_nothing(
    settings: Settings,
    batches: list[Batch],
    collected: list[str],
    tiny_model: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = prune(tiny_model(), batches, HALF, settings, cache=tmp_path)
    assert (len(collected), first.cached) == (1, ())
    second = prune(tiny_model(), batches, THIRD, settings, cache=tmp_path)
    assert (len(collected), second.cached) == (1, ("collect",))
    assert second.seconds["collect"] > 0
    assert len(entries(tmp_path)) == 1

    monkeypatch.setenv("RFPRUNE_CACHE", str(tmp_path / "default"))  # which only the command uses
    without = prune(tiny_model(), batches, THIRD, settings)
    assert (len(collected), without.cached) == (2, ())
    assert len(entries(tmp_path)) == 1
    assert first.layers != without.layers, "the constraint matters"
    assert_same(second, without)


def test_a_family_and_later_rounds_are_the_same_with_a_cache(
    settings: Settings, batches: list[Batch], collected: list[str], tiny_model: Tiny, tmp_path: Path
) -> None:
    """Later rounds collect from a student, whose statistics no other run can use."""
    settings = replace(settings, rounds=2)
    expected = list(prune_family(tiny_model(), batches, [HALF, THIRD], settings))
    assert len(collected) == 3
    for calls in (3, 2):  # the second time the original's statistics are cached
        collected.clear()
        results = prune_family(tiny_model(), batches, [HALF, THIRD], settings, cache=tmp_path)
        for result, other in zip(results, expected, strict=True):
            assert_same(result, other)
        assert len(collected) == calls
    assert len(entries(tmp_path)) == 1


def test_curves_take_kilobytes(batches: list[Batch], tiny_model: Tiny, tmp_path: Path) -> None:
    model = tiny_model(intermediate_size=512)  # moments of 2 layers x 512 x 512 x 4 bytes
    prune(model, batches, HALF, cache=tmp_path)
    (entry,) = entries(tmp_path)
    assert entry.stat().st_size < 2**15


def test_labels_are_part_of_the_data_only_if_they_are_used(
    batches: list[Batch], collected: list[str], tiny_model: Tiny, tmp_path: Path
) -> None:
    labelled = [{**batch, "labels": torch.tensor([0, 1] * 3)} for batch in batches]
    for data in (batches, labelled):
        prune(tiny_model(), data, HALF, cache=tmp_path)
    assert len(collected) == 1
    others = [{**batch, "labels": torch.tensor([1, 0] * 3)} for batch in batches]
    for data in (labelled, others):
        prune(tiny_model(), data, HALF, Settings(use_labels=True), cache=tmp_path)
    assert len(collected) == 3


def test_a_model_with_hooks_is_not_cached(
    batches: list[Batch], collected: list[str], tiny_model: Tiny, tmp_path: Path
) -> None:
    prune(tiny_model(), batches, HALF, cache=tmp_path)
    model = tiny_model()
    model.get_submodule("bert.encoder.layer.0").register_forward_hook(lambda *_: None)
    prune(model, batches, HALF, cache=tmp_path)
    assert len(collected) == 2
    assert len(entries(tmp_path)) == 1


OTHER_SETTINGS: dict[str, dict[str, Any]] = {
    "method": {"method": "kwon"},
    "importance": {"method": "importance", "importance": "random"},
    "use_labels": {"use_labels": True},
    "gradients": {"method": "kwon", "gradients": "per-batch"},
    "seed": {"seed": 1},
}


@pytest.mark.parametrize("name", [field.name for field in fields(Settings)])
def test_every_setting_is_in_the_key_or_concerns_a_later_stage(
    name: str, batches: list[Batch], tiny_model: Tiny
) -> None:
    """A new setting fails here until someone decides whether statistics depend on it."""
    later = {
        *("allocation", "uniform", "depth", "round_to", "rounds", "rearrange", "tune", "teacher"),
        *("protect", "min_heads", "min_neurons"),
        *("sparsity", "sparsity_criterion", "sparsity_scope"),
    }
    if name in cache.LATER_SETTINGS:
        assert name in later
        return
    changed = OTHER_SETTINGS[name]
    usual = {"method": changed["method"]} if len(changed) > 1 else {}
    model = tiny_model()
    known = cache.statistics_key(model, batches, Settings(**usual))
    assert cache.statistics_key(model, batches, Settings(**changed)) != known


CHANGES: dict[str, Callable[[Any, list[Batch]], Any]] = {
    "weight": lambda model, _: model.classifier.bias.data[0].add_(1e-6),
    "head": lambda model, _: setattr(model.config, "problem_type", "multi_label_classification"),
    "attention": lambda model, _: model.set_attn_implementation("eager"),
    "precision": lambda model, _: model.half(),
    "token": lambda _, batches: batches[2]["input_ids"][0, 0].add_(1),
    "mask": lambda _, batches: batches[2]["attention_mask"][0, -1].zero_(),
    "order": lambda _, batches: batches.reverse(),
    "division": lambda _, batches: batches.extend(halves(batches.pop())),
    "fewer": lambda _, batches: batches.pop(),
}


def halves(batch: Batch) -> list[Batch]:
    return [
        {name: value[part] for name, value in batch.items()} for part in (slice(3), slice(3, 6))
    ]


@pytest.mark.parametrize("change", CHANGES)
def test_model_and_data_are_in_the_key(change: str, batches: list[Batch], tiny_model: Tiny) -> None:
    model = tiny_model()
    known = cache.statistics_key(model, batches, Settings())
    assert cache.statistics_key(tiny_model(), batches, Settings()) == known
    CHANGES[change](model, batches)
    assert cache.statistics_key(model, batches, Settings()) != known


def test_the_folder_of_a_model_is_not_in_the_key(tiny_folder: Tiny, tmp_path: Path) -> None:
    import shutil

    from transformers import AutoModelForSequenceClassification as Model

    shutil.copytree(tiny_folder(), tmp_path / "copy")
    models = [Model.from_pretrained(folder) for folder in (tiny_folder(), tmp_path / "copy")]
    assert models[0].config._name_or_path != models[1].config._name_or_path
    assert cache.model_digest(models[0]) == cache.model_digest(models[1])


@pytest.mark.parametrize("changed", ["torch", "transformers", "code"])
def test_versions_and_code_are_in_the_key(
    changed: str, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A corrected formula is not answered with the statistics of the wrong one."""
    known = cache.environment(tiny_model())
    read_bytes = Path.read_bytes
    if changed == "code":
        monkeypatch.setattr(
            Path,
            "read_bytes",
            lambda path: read_bytes(path) + b"# corrected" * (path.name == "float64.py"),
        )
    else:
        monkeypatch.setattr(getattr(cache, changed), "__version__", "0.0.0")
    cache.code_digest.cache_clear()
    other = cache.environment(tiny_model())
    monkeypatch.undo()
    cache.code_digest.cache_clear()
    assert other != known
    assert cache.environment(tiny_model()) == known


def modules_that_run(work: Callable[[], Any]) -> set[str]:
    """Names of the modules of rfprune whose functions are called."""
    seen: set[str] = set()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            seen.add(frame.f_globals.get("__name__", ""))

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return {name for name in seen if name.startswith("rfprune.")}


def test_all_code_that_computes_cached_tensors_is_in_the_key(
    batches: list[Batch], tiny_model: Tiny
) -> None:
    from rfprune.tasks.evaluation import logits_of_batches
    from rfprune.tasks.registry import get_task

    def compute() -> None:
        for method in METHODS:
            collect_statistics(prepare_problem(tiny_model(), batches, Settings(method=method)))
        logits_of_batches(tiny_model(), get_task("mrpc"), batches)

    running = modules_that_run(compute)
    assert {"rfprune.stages.float64", "rfprune.tasks.inference"} <= running
    assert running <= cache.code_modules()


def stored(folder: Path) -> Path:
    """A new folder with one entry; gives its file."""
    cache.write(folder, KEY, TENSORS)
    (path,) = entries(folder)
    return path


def test_tensors_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert cache.read(tmp_path, KEY) is None
    assert cache.read(tmp_path / "nowhere", KEY) is None
    stored(tmp_path)
    many = tuple(torch.full((1,), i) for i in range(12))  # 10 comes after 9, not after 1
    cache.write(tmp_path, {"entry": "of many"}, many)
    for key, tensors in ((KEY, TENSORS), ({"entry": "of many"}, many)):
        found = cache.read(tmp_path, key)
        assert found is not None
        assert all(
            a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, tensors, strict=True)
        )
    assert cache.read(tmp_path, {"entry": "another"}) is None


@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_flipped_bit_or_a_cut_is_noticed_anywhere(
    position: float, bit: int, cut: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = stored(tmp_path_factory.mktemp("cache"))
    content = bytearray(path.read_bytes())
    place = int(position * len(content))
    content[place] ^= 1 << bit
    path.write_bytes(content[:place] if cut else content)
    with pytest.warns(RfpruneWarning, match="damaged or out of date"):
        assert cache.read(path.parent, KEY) is None
    cache.write(path.parent, KEY, TENSORS)
    assert cache.read(path.parent, KEY) is not None


def test_another_entry_under_the_same_name_is_noticed(tmp_path: Path) -> None:
    path = stored(tmp_path)
    cache.write(tmp_path, {"entry": "another"}, TENSORS[:1])
    (foreign,) = set(entries(tmp_path)) - {path}
    foreign.replace(path)
    with pytest.warns(RfpruneWarning, match="out of date"):
        assert cache.read(tmp_path, KEY) is None


def test_a_damaged_entry_is_collected_again_with_one_warning(
    settings: Settings, batches: list[Batch], collected: list[str], tiny_model: Tiny, tmp_path: Path
) -> None:
    expected = prune(tiny_model(), batches, HALF, settings, cache=tmp_path)
    (entry,) = entries(tmp_path)
    entry.write_bytes(entry.read_bytes()[:-1])
    with pytest.warns(RfpruneWarning) as warnings:
        result = prune(tiny_model(), batches, HALF, settings, cache=tmp_path)
    assert (len(warnings), len(collected), result.cached) == (1, 2, ())
    assert_same(result, expected)
    assert prune(tiny_model(), batches, HALF, settings, cache=tmp_path).cached == ("collect",)


@pytest.mark.parametrize("cause", ["a file", "a full disk"])
def test_a_folder_that_cannot_be_written_is_a_warning(
    cause: str,
    batches: list[Batch],
    tiny_model: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = prune(tiny_model(), batches, HALF)
    folder = tmp_path / "cache"
    if cause == "a file":
        folder.touch()
    else:

        def fail(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "replace", fail)
    with pytest.warns(RfpruneWarning, match="--cache-dir") as warnings:
        assert_same(prune(tiny_model(), batches, HALF, cache=folder), expected)
    assert len(warnings) == 1
    assert folder.is_file() or entries(folder) == []


def test_a_file_that_cannot_be_read_is_a_warning(tmp_path: Path) -> None:
    path = stored(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.warns(RfpruneWarning, match="cannot be read"):
        assert cache.read(tmp_path, KEY) is None


def test_writers_at_the_same_time_are_harmless(tmp_path: Path) -> None:
    def write_and_read(_: int) -> bool:
        cache.write(tmp_path, KEY, TENSORS)
        found = cache.read(tmp_path, KEY)
        return found is not None and torch.equal(found[1], TENSORS[1])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write_and_read, range(64)))
    assert len(entries(tmp_path)) == 1


def test_the_least_recently_used_entries_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [{"entry": number} for number in range(4)]
    for age, key in enumerate(keys[:3]):
        before = set(tmp_path.iterdir())
        cache.write(tmp_path, key, TENSORS)
        (path,) = set(tmp_path.iterdir()) - before
        os.utime(path, (time.time() - 100 + age,) * 2)
    size = path.stat().st_size
    assert cache.read(tmp_path, keys[0]) is not None  # the oldest one is in use again
    monkeypatch.setattr(cache, "MAX_BYTES", 3 * size)
    cache.write(tmp_path, keys[3], TENSORS)
    known = [cache.read(tmp_path, key) is not None for key in keys]
    assert known == [True, False, True, True]
    monkeypatch.setattr(cache, "MAX_BYTES", 1)
    cache.write(tmp_path, keys[1], TENSORS)
    known = [cache.read(tmp_path, key) is not None for key in keys]
    assert known == [False, True, False, False], "the newest entry stays"


def test_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    for name, age in (("old", 7200), ("new", 0)):
        path = tmp_path / f".{name}.partial"
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    (tmp_path / "not ours").touch()
    cache.write(tmp_path, KEY, TENSORS)
    names = {path.name for path in entries(tmp_path) if path.suffix != cache.SUFFIX}
    assert names == {".new.partial", "not ours"}
    assert cache.read(tmp_path, KEY) is not None


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, "/home/someone/.cache/rfprune"),
        ({"XDG_CACHE_HOME": "/var/caches"}, "/var/caches/rfprune"),
        ({"XDG_CACHE_HOME": "/var/caches", "RFPRUNE_CACHE": "~/mine"}, "/home/someone/mine"),
    ],
)
def test_the_default_folder(
    variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RFPRUNE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/someone", **variables}.items():
        monkeypatch.setenv(name, value)
    assert cache.default_folder() == Path(folder)


@pytest.fixture
def run_command(
    tiny_folder: Tiny, tiny_data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """`run_command(*flags, output=..., constraint=...)`: run it; gives its report."""
    from rfprune.main import main
    from rfprune.report.report_json import read_report

    monkeypatch.setattr("rfprune.latency.speedup.MAX_ROUNDS", 1)
    monkeypatch.setenv("RFPRUNE_CACHE", str(tmp_path / "cache"))

    def run(*flags: str, output: str, constraint: float, task: str = "mrpc") -> dict[str, Any]:
        head = "question-answering" if task == "squad_v2" else "sequence-classification"
        options: dict[str, Any] = {
            "--model": tiny_folder(head=head),
            "--task": task,
            "--data-dir": tiny_data_dir,
            "--constraint": constraint,
            "--samples": 16,
            "--batch-size": 8,
            "--output-dir": tmp_path / output,
        }
        arguments = [str(item) for pair in options.items() for item in pair]
        assert main([*arguments, *flags]) == 0
        return read_report(tmp_path / output)

    return run


@pytest.mark.parametrize("task", ["mrpc", "squad_v2"])
def test_the_command_collects_and_scores_the_original_once(
    task: str,
    run_command: Callable[..., dict[str, Any]],
    collected: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = run_command(output="first", constraint=0.5, task=task)
    assert first["cached"] == []
    assert "cached" not in capsys.readouterr().out
    again = run_command(output="again", constraint=0.3, task=task)
    assert again["cached"] == ["collect", "evaluate"]
    assert "cached" in capsys.readouterr().out
    assert len(collected) == 1
    assert len(entries(tmp_path / "cache")) == 2

    run_command("--cache-dir", str(tmp_path / "other"), output="b", constraint=0.5, task=task)
    assert len(entries(tmp_path / "other")) == 2
    collected.pop()
    without = run_command("--no-cache", output="without", constraint=0.3, task=task)
    assert len(collected) == 2
    assert without["cached"] == []
    assert len(entries(tmp_path / "cache")) == 2
    for name in ("scores", "divergence", "layers"):
        assert again[name] == without[name]
    assert again["divergence"] != first["divergence"], "the constraint matters"
    weights = [
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "without")
    ]
    assert weights[0] == weights[1]


def test_other_validation_data_is_scored_again(run_command: Callable[..., dict[str, Any]]) -> None:
    run_command(output="a", constraint=0.5)
    report = run_command("--eval-limit", "20", output="b", constraint=0.5)
    assert report["cached"] == ["collect"]
    report = run_command(output="c", constraint=0.5, task="sst2")
    assert report["cached"] == []
