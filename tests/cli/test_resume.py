"""A run that is killed on the spot, wherever it is, goes on with the same command.

Deleting this lets a killed run leave half an output or a hidden folder, repeat hours of finished
work, or end with another model than an undisturbed one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rfprune.main import main
from rfprune.methods import curvature, kwon
from rfprune.model.checkpoint import load_pruned
from rfprune.model.staging import hidden_folder, staged
from rfprune.report.output_folder import check_output, holds
from rfprune.report.report_json import read_report
from rfprune.tasks import evaluation
from tests.conftest import TinyFolder

ROOT = Path(__file__).resolve().parents[2]
MonkeyPatch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]

# One process imports everything and then splits off a run a case: each kills itself at the n-th
# call of a function. Nothing here waits or sleeps, so nothing here depends on time.
KILLER = """
import contextlib, importlib, json, os, signal, sys
import rfprune.cli.run
from rfprune.cli import outputs
from rfprune.main import main

def kill_at(place, call):
    module, _, name = place.rpartition(".")
    owner = sys.modules.get(module)
    if owner is None:
        module, _, part = module.rpartition(".")
        owner = getattr(sys.modules[module], part)
    original, calls = getattr(owner, name), []

    def killing(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, name, killing)

for case in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        os.chdir(case["folder"])
        os.environ["RFPRUNE_CACHE"] = "cache"
        sys.modules["rfprune.latency.speedup"].MAX_ROUNDS = 1
        outputs.write_run_page = outputs.write_family_page = lambda *_: None
        if case["place"]:
            kill_at(case["place"], case["call"])
        code = main(case["flags"])
        with open("modules", "w") as file:
            json.dump([name for name in sys.modules if name[0] != "_"], file)
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    if not case["place"]:  # what it has imported on its way, the others find imported
        for name in json.load(open(os.path.join(case["folder"], "modules"))):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    print(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)
"""

# Where a run is killed, at which call, and what the next one finds: whether the original had been
# scored and its statistics collected, and how many of the two outputs were finished.
CASES: dict[str, tuple[str, str, int, bool, bool, int]] = {
    name: (method, f"rfprune.{place}", call, scored, collected, finished)
    for name, method, place, call, scored, collected, finished in (
        ("loading", "curvature", "cli.run.load", 1, False, False, 0),
        ("scoring", "curvature", "tasks.evaluation._scores", 1, True, False, 0),
        ("collection", "curvature", "stages.curvature._add_step", 2, True, False, 0),
        ("curves", "curvature", "methods.curvature.error_curve", 1, True, False, 0),
        ("allocation", "curvature", "methods.allocation.allocate", 1, True, True, 0),
        ("compaction", "curvature", "pruning.compact", 1, True, True, 0),
        ("reconstruction", "curvature", "stages.reconstruct._fit_block", 3, True, True, 0),
        ("measurement", "curvature", "cli.run.measure", 1, True, True, 0),
        ("saving", "curvature", "cli.outputs.save_pruned", 1, True, True, 0),
        ("masks", "curvature", "model.checkpoint.save_file", 1, True, True, 0),
        ("report", "curvature", "cli.outputs.write_report", 1, True, True, 0),
        ("log", "curvature", "cli.outputs.write_log", 1, True, True, 0),
        ("renaming", "curvature", "model.staging._put_in_place", 1, True, True, 0),
        ("table", "curvature", "cli.run.print_report", 1, True, True, 1),
        ("second", "curvature", "methods.allocation.allocate", 2, True, True, 1),
        ("second report", "curvature", "cli.outputs.write_report", 2, True, True, 1),
        ("end", "curvature", "cli.run.print_report", 2, True, True, 2),
        ("cache before", "curvature", "cache.save", 2, True, False, 0),
        ("cache after", "curvature", "cache._make_room", 2, True, True, 0),
        ("kwon's collection", "kwon", "stages.fisher._Masks", 2, True, False, 0),
        ("kwon's search", "kwon", "methods.allocation.search", 1, True, True, 0),
        ("kwon's rearrangement", "kwon", "methods.kwon.rearrange", 2, True, True, 0),
        ("kwon's tuning", "kwon", "stages.reconstruct._fit_block", 2, True, True, 0),
    )
}


def flags_of(method: str, model: Path, data_dir: Path) -> list[str]:
    options = f"--model {model} --task mrpc --data-dir {data_dir} --constraint 0.7 0.4"
    return f"{options} --samples 16 --batch-size 4 --method {method} --output-dir out".split()


@pytest.fixture(scope="module")
def killed(
    tiny_folder: TinyFolder, tiny_data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """By the name of a case the folder in which a run was killed; "curvature" and "kwon": in which
    one was not."""
    cases = {"curvature": ("curvature", "", 0), "kwon": ("kwon", "", 0)}
    cases |= {name: case[:3] for name, case in CASES.items()}
    folders = {name: tmp_path_factory.mktemp(name.replace(" ", "-")) for name in cases}
    jobs = [
        {
            "folder": str(folders[name]),
            "place": place,
            "call": call,
            "flags": flags_of(method, tiny_folder(), tiny_data_dir),
        }
        for name, (method, place, call) in cases.items()
    ]
    done = subprocess.run(
        [sys.executable, "-c", KILLER],
        check=False,
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    codes = [int(line) for line in done.stdout.split("\n") if line.lstrip("-").isdigit()]
    assert codes == [0, 0, *[-signal.SIGKILL] * len(CASES)], done.stderr
    return folders


def spy(function: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def spied(*arguments: Any, **options: Any) -> Any:
        calls.append(function.__name__)
        return function(*arguments, **options)

    return spied


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_goes_on(
    name: str,
    killed: dict[str, Path],
    tiny_folder: TinyFolder,
    tiny_data_dir: Path,
    monkeypatch: MonkeyPatch,
    capsys: Capture,
) -> None:
    method, _, _, scored, collected, finished = CASES[name]
    folder = killed[name]
    visible = sorted(path.name for path in folder.glob("out/[!.]*"))
    assert visible == ["mac-0.4", "mac-0.7"][-finished:] * bool(finished), "whole or not at all"
    for output in visible:
        load_pruned(folder / "out" / output)

    collections: list[str] = []
    for module, collector in ((curvature, "collect_curvature"), (kwon, "collect_gradients")):
        spied = spy(getattr(module, collector), collections)
        monkeypatch.setattr(module, collector, spied)
    scorings: list[str] = []
    monkeypatch.setattr(evaluation, "_logits", spy(evaluation._logits, scorings))
    monkeypatch.setattr("rfprune.latency.speedup.MAX_ROUNDS", 1)
    monkeypatch.setattr("rfprune.cli.outputs.write_run_page", lambda *_: None)
    monkeypatch.setattr("rfprune.cli.outputs.write_family_page", lambda *_: None)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RFPRUNE_CACHE", "cache")
    assert main(flags_of(method, tiny_folder(), tiny_data_dir)) == 0

    left = 2 - finished
    assert len(collections) == (0 if collected else 1)
    assert len(scorings) == left + (0 if scored else 1)
    assert capsys.readouterr().err.count("already complete, skipping") == finished

    found = {path.name for path in Path("out").iterdir() if path.is_dir()}
    assert found == {"mac-0.7", "mac-0.4"}, "nothing hidden is left"
    assert {path.suffix for path in Path("cache").iterdir() if path.name[0] != "."} == {".rfprune"}
    for output in sorted(found):
        ours, theirs = Path("out", output), killed[method] / "out" / output
        assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
        for file in ("model.safetensors", "pruning/masks.safetensors", "config.json"):
            assert (ours / file).read_bytes() == (theirs / file).read_bytes()
        reports = read_report(ours), read_report(theirs)
        for entry in ("scores", "divergence", "layers", "identity", "warnings"):
            assert reports[0][entry] == reports[1][entry]


@pytest.fixture
def flags(
    tiny_folder: TinyFolder,
    tiny_data_dir: Path,
    tmp_path: Path,
    monkeypatch: MonkeyPatch,
) -> list[str]:
    """Of a run of two constraints; the current folder is an empty one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RFPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("rfprune.latency.speedup.MAX_ROUNDS", 1)
    # Tiny models are untrained, so they score below the most frequent label.
    monkeypatch.setattr("rfprune.cli.run.below_baseline", lambda *_: None)
    monkeypatch.setattr("rfprune.cli.outputs.write_run_page", lambda *_: None)
    monkeypatch.setattr("rfprune.cli.outputs.write_family_page", lambda *_: None)
    shutil.copytree(tiny_folder(), "model")
    shutil.copytree(tiny_data_dir / "mrpc", "data/mrpc")
    return flags_of("curvature", Path("model"), Path("data"))


def written_at() -> dict[Path, int]:
    """When each file of each model was written."""
    return {path: path.stat().st_mtime_ns for path in Path("out").glob("mac-*/**/*")}


def test_the_same_command_again_shows_what_is_there(
    flags: list[str], capsys: Capture, monkeypatch: MonkeyPatch
) -> None:
    assert main(flags) == 0
    first = capsys.readouterr()
    times = written_at()
    monkeypatch.setattr("rfprune.cli.run.evaluate_original", None)
    monkeypatch.setattr("rfprune.cli.run.prune_to_each", None)
    assert main(flags) == 0
    again = capsys.readouterr()
    assert again.out == first.out
    assert again.err.count("already complete, skipping") == 2
    assert written_at() == times


def test_another_constraint_joins_those_that_are_there(flags: list[str]) -> None:
    assert main(flags) == 0
    times = written_at()
    place = flags.index("0.4")
    assert main([*flags[:place], "0.3", *flags[place:]]) == 0
    assert {path.name for path in Path("out").glob("mac-*")} == {"mac-0.7", "mac-0.4", "mac-0.3"}
    assert {path: path.stat().st_mtime_ns for path in times} == times


def weights_taken() -> None:
    Path("out/mac-0.7/model.safetensors").unlink()


def model_trained_on() -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file("model/model.safetensors")
    weights["classifier.bias"] += 1
    save_file(weights, "model/model.safetensors", metadata={"format": "pt"})


def labels_corrected() -> None:
    shutil.copy("data/mrpc/train.parquet", "data/mrpc/validation.parquet")


def report_of_an_older_version() -> None:
    path = Path("out/mac-0.7/report.json")
    report = json.loads(path.read_text())
    del report["identity"]
    path.write_text(json.dumps(report))


def report_damaged() -> None:
    Path("out/mac-0.7/report.json").write_text("{")


@pytest.mark.parametrize(
    "change",
    [
        *(weights_taken, model_trained_on, labels_corrected, report_of_an_older_version),
        report_damaged,
    ],
)
def test_an_output_of_another_run_is_refused(
    change: Callable[[], None], flags: list[str], capsys: Capture
) -> None:
    assert main(flags) == 0
    change()
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    assert main(flags) == 2
    assert "already exists" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")} == before
    assert main([*flags, "--overwrite", "--seed", "1"]) == 0
    assert read_report(Path("out/mac-0.7"))["seed"] == 1


def test_the_log_has_what_was_printed(flags: list[str], capsys: Capture) -> None:
    assert main([*flags, "--samples", "100"]) == 0
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 6
    assert "warning: 100 calibration samples" in printed[1]
    log = Path("out/mac-0.4/log.txt").read_text().splitlines()
    assert log[0].startswith("$ rfprune --model")
    assert log[1 : len(printed) + 1] == printed
    assert main([*flags, "--samples", "100", "--quiet", "--overwrite"]) == 0
    assert capsys.readouterr().err == ""
    assert Path("out/mac-0.4/log.txt").read_text().splitlines()[1 : len(printed) + 1] == printed


def ended_process() -> int:
    """The number of a process that is gone."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def left_behind(folder: Path, purpose: str, monkeypatch: MonkeyPatch) -> Path:
    """What a process that was killed has left of a folder."""
    with monkeypatch.context() as patch:
        process = ended_process()
        patch.setattr("os.getpid", lambda: process)
        path = hidden_folder(folder, purpose)
    path.mkdir(parents=True)
    (path / "file").write_text(purpose)
    return path


def test_what_a_killed_process_left_is_removed_or_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    left_behind(folder, "partial", monkeypatch)
    hidden_folder(folder, "partial").mkdir()  # in a container a number is often used again
    check_output(folder, overwrite=False)
    assert list(tmp_path.iterdir()) == []
    with staged(folder, overwrite=False) as temporary:
        (temporary / "new").touch()
    assert [path.name for path in folder.iterdir()] == ["new"]
    shutil.rmtree(folder)

    # Killed between two renames, with the earlier output already out of the way.
    old = left_behind(folder, "old", monkeypatch)
    (old / "report.json").write_text("{}")
    left_behind(folder, "partial", monkeypatch)
    check_output(folder, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (folder / "file").read_text() == "old"
    left_behind(folder, "old", monkeypatch)
    check_output(folder, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "the new one was in its place"


def test_hidden_folders_of_running_processes_stay(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    folder = tmp_path / "out"
    names = []
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as running:
        with monkeypatch.context() as patch:
            patch.setattr("os.getpid", lambda: running.pid)
            names.append(hidden_folder(folder, "partial"))
        with monkeypatch.context() as patch:
            patch.setattr("socket.gethostname", lambda: "elsewhere")
            names.append(hidden_folder(folder, "partial"))
        others = [tmp_path / ".out-of-somebody-else", hidden_folder(tmp_path / "other", "partial")]
        for path in (*names, *others):
            path.mkdir()
        check_output(folder, overwrite=False)
        assert set(tmp_path.iterdir()) == {*names, *others}
        running.communicate(b"\n")
    os.utime(names[1], (time.time() - 2 * 86400,) * 2)
    check_output(folder, overwrite=False)
    assert set(tmp_path.iterdir()) == set(others), "now one has ended, and one is days old"


@pytest.mark.parametrize("content", [b"", b"[]", b'{"identity": 1}', b"\xff"])
def test_a_damaged_report_is_no_output(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(content)
    assert not holds(tmp_path, {"flags": "a"})
