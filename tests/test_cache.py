"""What is remembered between runs is what would have been computed, or nothing.

Deleting this lets a run be answered with another one's statistics, or fail over a cache it could do
without.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rfprune import cache
from rfprune.cost.constraint import Constraint
from rfprune.errors import RfpruneWarning
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
    """The names of the collections as they happen."""
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
    settings: Settings, batches: list[Batch], collected: list[str], tiny_model: Tiny, tmp_path: Path
) -> None:
    first = prune(tiny_model(), batches, HALF, settings, cache=tmp_path)
    assert len(collected) == 1
    assert first.cached == ()
    second = prune(tiny_model(), batches, THIRD, settings, cache=tmp_path)
    assert len(collected) == 1
    assert second.cached == ("collect",)
    assert second.seconds["collect"] > 0
    assert len(entries(tmp_path)) == 1

    without = prune(tiny_model(), batches, THIRD, settings)
    assert len(collected) == 2
    assert without.cached == ()
    assert first.layers != without.layers, "the constraint matters"
    assert_same(second, without)


def test_a_family_and_later_rounds_are_the_same_with_a_cache(
    settings: Settings, batches: list[Batch], collected: list[str], tiny_model: Tiny, tmp_path: Path
) -> None:
    """What the later rounds look at is a student, which no other run meets again."""
    settings = replace(settings, rounds=2)
    expected = list(prune_family(tiny_model(), batches, [HALF, THIRD], settings))
    assert len(collected) == 3
    for calls in (3, 2):  # nothing, and then the original, is known
        collected.clear()
        results = prune_family(tiny_model(), batches, [HALF, THIRD], settings, cache=tmp_path)
        for result, wanted in zip(results, expected, strict=True):
            assert_same(result, wanted)
        assert len(collected) == calls
    assert len(entries(tmp_path)) == 1


def test_nothing_is_kept_unless_asked_for(
    batches: list[Batch], tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "write", None)
    assert prune(tiny_model(), batches, HALF).cached == ()


def test_curves_take_kilobytes(batches: list[Batch], tiny_model: Tiny, tmp_path: Path) -> None:
    model = tiny_model(intermediate_size=512)  # moments of 2 layers x 512 x 512 x 4 bytes
    prune(model, batches, HALF, cache=tmp_path)
    (entry,) = entries(tmp_path)
    assert entry.stat().st_size < 2**15


def test_labels_are_part_of_the_data_only_where_they_are_used(
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


def test_a_model_with_hooks_is_not_remembered(
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
    "allocation": {"method": "importance", "allocation": "uniform"},
    "use_labels": {"use_labels": True},
    "gradients": {"method": "kwon", "gradients": "per-batch"},
    "seed": {"seed": 1},
}


@pytest.mark.parametrize("name", [field.name for field in fields(Settings)])
def test_every_setting_is_in_the_key_or_comes_after_the_collection(
    name: str, batches: list[Batch], tiny_model: Tiny
) -> None:
    """A new setting is in the key unless somebody says that the collection does not know it."""
    if name in cache._LATER_SETTINGS:
        sizes = ("allocation", "uniform", "round_to", "rounds")
        assert name in (*sizes, "rearrange", "tune", "teacher")
        return
    model = tiny_model()
    changed = OTHER_SETTINGS[name]
    known = cache.statistics_key(model, batches, Settings())
    if len(changed) > 1:
        known = cache.statistics_key(model, batches, Settings(method=changed["method"]))
    assert cache.statistics_key(model, batches, Settings(**changed)) != known


def other_weight(model: Any, batches: list[Batch]) -> None:
    with torch.no_grad():
        model.classifier.bias[0] += 1e-6


def other_head(model: Any, batches: list[Batch]) -> None:
    model.config.problem_type = "multi_label_classification"


def other_attention(model: Any, batches: list[Batch]) -> None:
    model.set_attn_implementation("eager")


def other_precision(model: Any, batches: list[Batch]) -> None:
    model.half()


def other_token(model: Any, batches: list[Batch]) -> None:
    batches[2]["input_ids"][0, 0] += 1


def other_mask(model: Any, batches: list[Batch]) -> None:
    batches[2]["attention_mask"][0, -1] = 0


def other_order(model: Any, batches: list[Batch]) -> None:
    batches.reverse()


def other_division(model: Any, batches: list[Batch]) -> None:
    batches[:1] = [
        {name: value[rows] for name, value in batches[0].items()}
        for rows in (slice(0, 3), slice(3, 6))
    ]


def fewer_batches(model: Any, batches: list[Batch]) -> None:
    batches.pop()


@pytest.mark.parametrize(
    "change",
    [
        *(other_weight, other_head, other_attention, other_precision, other_token, other_mask),
        *(other_order, other_division, fewer_batches),
    ],
)
def test_model_and_data_are_in_the_key(
    change: Callable[[Any, list[Batch]], None], batches: list[Batch], tiny_model: Tiny
) -> None:
    model = tiny_model()
    known = cache.statistics_key(model, batches, Settings())
    assert cache.statistics_key(tiny_model(), batches, Settings()) == known
    change(model, batches)
    assert cache.statistics_key(model, batches, Settings()) != known


def test_where_a_model_lies_is_not_in_the_key(tiny_folder: Tiny, tmp_path: Path) -> None:
    import shutil

    from transformers import AutoModelForSequenceClassification as Model

    shutil.copytree(tiny_folder(), tmp_path / "copy")
    models = [Model.from_pretrained(folder) for folder in (tiny_folder(), tmp_path / "copy")]
    assert models[0].config._name_or_path != models[1].config._name_or_path
    assert cache.model_digest(models[0]) == cache.model_digest(models[1])


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_versions_are_in_the_key(
    name: str, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = cache.environment(tiny_model())
    monkeypatch.setattr(getattr(cache, name), "__version__", "0.0.0")
    assert cache.environment(tiny_model()) != known


def test_the_code_is_in_the_key(tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the statistics: a formula that was mended is not answered with what it gave before."""
    known = cache.environment(tiny_model())
    read_bytes = Path.read_bytes

    def edited(path: Path) -> bytes:
        return read_bytes(path) + (b"# mended" if path.name == "curvature.py" else b"")

    monkeypatch.setattr(Path, "read_bytes", edited)
    cache.code_digest.cache_clear()
    changed = cache.environment(tiny_model())
    monkeypatch.undo()
    cache.code_digest.cache_clear()
    assert changed != known
    assert cache.environment(tiny_model()) == known


def stored(folder: Path) -> Path:
    """A new folder with one entry; gives its file."""
    cache.write(folder, KEY, TENSORS)
    (path,) = entries(folder)
    return path


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    assert cache.read(tmp_path, KEY) is None
    assert cache.read(tmp_path / "nowhere", KEY) is None
    stored(tmp_path)
    many = tuple(torch.full((1,), i) for i in range(12))  # 10 comes after 9, not after 1
    cache.write(tmp_path, {"entry": "of many"}, many)
    for key, wanted in ((KEY, TENSORS), ({"entry": "of many"}, many)):
        found = cache.read(tmp_path, key)
        assert found is not None
        assert all(
            a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, wanted, strict=True)
        )
    assert cache.read(tmp_path, {"entry": "another"}) is None


@given(data=st.data())
def test_a_flipped_bit_is_noticed_wherever_it_is(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = stored(tmp_path_factory.mktemp("cache"))
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.warns(RfpruneWarning, match="damaged or out of date"):
        assert cache.read(path.parent, KEY) is None
    cache.write(path.parent, KEY, TENSORS)
    assert cache.read(path.parent, KEY) is not None


@given(length=st.integers(0, 10_000))
def test_an_entry_cut_short_or_grown_is_noticed(
    length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = stored(tmp_path_factory.mktemp("cache"))
    content = path.read_bytes()
    changed = (content + bytes(10_000))[:length]
    if changed == content:
        return
    path.write_bytes(changed)
    with pytest.warns(RfpruneWarning, match="damaged or out of date"):
        assert cache.read(path.parent, KEY) is None


def test_an_entry_under_another_name_is_noticed(tmp_path: Path) -> None:
    path = stored(tmp_path)
    other: cache.Key = {"entry": "another"}
    cache.write(tmp_path, other, TENSORS[:1])
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
    with pytest.warns(RfpruneWarning) as heard:
        result = prune(tiny_model(), batches, HALF, settings, cache=tmp_path)
    assert len(heard) == 1
    assert len(collected) == 2
    assert result.cached == ()
    assert_same(result, expected)
    assert prune(tiny_model(), batches, HALF, settings, cache=tmp_path).cached == ("collect",)


def test_a_folder_that_cannot_be_written_is_a_warning(
    batches: list[Batch], tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    full = OSError(errno.ENOSPC, "No space left on device")
    expected = prune(tiny_model(), batches, HALF)
    for folder, error in ((tmp_path / "file", None), (tmp_path / "full", full)):
        if error is not None:

            def fail(*_: Any, error: OSError = error) -> None:
                raise error

            monkeypatch.setattr(Path, "replace", fail)
        with pytest.warns(RfpruneWarning, match="the next run collects again") as heard:
            assert_same(prune(tiny_model(), batches, HALF, cache=folder), expected)
        assert len(heard) == 1
    assert entries(tmp_path / "full") == []


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


def test_what_was_used_the_longest_ago_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [{"entry": number} for number in range(4)]
    for age, key in enumerate(keys[:3]):
        cache.write(tmp_path, key, TENSORS)
        path = cache._path(tmp_path, key)
        os.utime(path, (time.time() - 100 + age,) * 2)
    size = entries(tmp_path)[0].stat().st_size
    assert cache.read(tmp_path, keys[0]) is not None  # the oldest one is in use again
    monkeypatch.setattr(cache, "MOST_BYTES", 3 * size)
    cache.write(tmp_path, keys[3], TENSORS)
    known = [cache.read(tmp_path, key) is not None for key in keys]
    assert known == [True, False, True, True]
    monkeypatch.setattr(cache, "MOST_BYTES", 1)
    cache.write(tmp_path, keys[1], TENSORS)
    assert entries(tmp_path) == [cache._path(tmp_path, keys[1])], "the newest stays"


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    for name, age in (("old", 7200), ("new", 0)):
        path = tmp_path / f".{name}{cache._PARTIAL}"
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    (tmp_path / "not ours").touch()
    stored_name = cache._path(tmp_path, KEY).name
    cache.write(tmp_path, KEY, TENSORS)
    assert {path.name for path in entries(tmp_path)} == {".new.partial", "not ours", stored_name}


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    for name, value, folder in (
        (None, None, "/home/someone/.cache/rfprune"),
        ("XDG_CACHE_HOME", "/var/caches", "/var/caches/rfprune"),
        ("RFPRUNE_CACHE", "~/mine", "/home/someone/mine"),
    ):
        if name is None:
            monkeypatch.delenv("RFPRUNE_CACHE", raising=False)
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        else:
            monkeypatch.setenv(name, str(value))
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
    said = capsys.readouterr().out.replace("\n", " ")
    assert "(cached)" in said
    assert "scoring (the original's: cached)." in said
    assert len(collected) == 1
    assert len(entries(tmp_path / "cache")) == 2

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


def test_the_command_can_be_told_where(
    run_command: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rfprune.main import main

    run_command("--cache-dir", str(tmp_path / "other"), output="out", constraint=0.5)
    assert len(entries(tmp_path / "other")) == 2
    assert not (tmp_path / "cache").exists()
    flags = "--model demo --task sst2 --constraint 0.5 --no-cache --cache-dir".split()
    assert main([*flags, "x"]) == 2
    assert "not allowed with" in capsys.readouterr().err


def test_another_task_s_data_is_scored_again(
    run_command: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run_command(output="a", constraint=0.5)
    report = run_command("--eval-limit", "20", output="b", constraint=0.5)
    assert report["cached"] == ["collect"]
    report = run_command(output="c", constraint=0.5, task="sst2")
    assert report["cached"] == []


def test_a_cache_that_cannot_be_written_fails_no_run(
    run_command: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "cache").touch()
    report = run_command(output="out", constraint=0.5)
    assert len(report["warnings"]) == 1
    assert "Nothing can be kept in the cache folder" in report["warnings"][0]
