"""Two processes give the result of one, and end together.

Deleting this lets a launch on several devices prune other units than a single process, write its
output twice, or hang when one process fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from rfprune import distributed
from rfprune.cost.constraint import Constraint
from rfprune.errors import UserError
from rfprune.model.layout import layout_of
from rfprune.pruning import prune
from rfprune.report.report_json import read_report
from rfprune.settings import METHODS, Settings

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow
Tiny = Callable[..., Any]

# What torchrun does, for many runs with one import: a process imports everything, and forks two
# processes for each run. No thread is running yet when it forks.
LAUNCHER = """
import contextlib, importlib, json, os, signal, socket, sys
import accelerate, torch
import rfprune.cli.exit_codes, rfprune.cli.outputs, rfprune.main, rfprune.cli.run
from rfprune.main import main

for case in json.load(sys.stdin):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            signal.alarm(300)  # a run that hangs is a failure, not a wait
            os.chdir(case["folder"])
            os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank),
                           "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": str(port), "RFPRUNE_CACHE": "cache"}
            sys.modules["rfprune.latency.speedup"].MAX_ROUNDS = 1
            rfprune.cli.exit_codes.GRACE_SECONDS = 0  # no launcher stops the others here
            for page in ("write_run_page", "write_family_page"):
                setattr(rfprune.cli.outputs, page, lambda *_: None)
            for number, stream in ((1, "out"), (2, "err")):
                file = os.open(f"{stream}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(file, number)
            exec(case["before"])
            code = 1
            with contextlib.suppress(Exception):
                code = main(case["flags"])
                sys.stdout.flush()
                sys.stderr.flush()
            with open(f"modules-{rank}", "w") as file:
                json.dump([name for name in sys.modules if name[0] != "_"], file)
            os._exit(code)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    if case["first"]:  # import what the first run has imported, for the forks of the others
        for name in json.load(open(os.path.join(case["folder"], "modules-0"))):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    print(json.dumps([os.waitstatus_to_exitcode(code) for code in codes]), flush=True)
"""

FAIL_AT_THE_SECOND_CALL = """
import rfprune.stages.{module} as stage
original, calls = stage.{function}, []
def failing(*arguments, **options):
    calls.append(1)
    if rank == {rank} and len(calls) == 2:
        from rfprune.errors import UserError
        raise UserError("something is wrong in process {rank}")
    return original(*arguments, **options)
stage.{function} = failing
"""
LAYER_BY_LAYER = """
from rfprune.stages import collection
collection.available_bytes = lambda _: 2
"""
FULL_DISK = """
def full(*_, **__):
    raise OSError(28, "No space left on device")
from rfprune.cli import outputs
outputs.save_pruned = full
"""
LARGE_DROP = """
from rfprune.max_drop import search
from rfprune.tasks.bootstrap import Drop
search.paired_drop = lambda *_: Drop(9.0, 1.0, 0.0)
"""
UNTRAINED = "from rfprune.cli import run\nrun.below_baseline = lambda *_: None\n"
"""Tiny models score below the most frequent label, which --max-drop refuses."""

BUG = "from rfprune.cli import run\nrun.measure = lambda *_, **__: 1 / 0"


def failing(module: str, function: str, rank: int) -> tuple[str, str, str]:
    code = FAIL_AT_THE_SECOND_CALL.format(module=module, function=function, rank=rank)
    return "", code, f"Something is wrong in process {rank}"


# By name: more flags of a run.
CASES = {
    **{method: f"--method {method}" for method in METHODS},
    "two labels a row": "--task squad",
    "two factors": "--task mnli",
    "per batch": "--method kwon --gradients per-batch",
    "rounds": "--rounds 2",
    "family": "--constraint 0.7 0.4",
    "even": "--samples 29",
    "search": "--max-drop 30",
    "layer by layer": "--samples 32",
    "kwon layer by layer": "--method kwon",
    "depth": "--constraint 0.7 --depth",
    "depth on few batches": "--constraint 0.7 --depth --samples 4 --batch-size 1",
}
# By name: more flags, code that makes a process fail, and a part of the message.
ERRORS = {
    "in the collection": failing("curvature", "_add_step", 1),
    "in the main one": failing("curvature", "_add_step", 0),
    "in the reconstruction": failing("reconstruct", "_fit_block", 1),
    "a bug": ("", BUG, ""),
    "a full disk": ("", FULL_DISK, "No space left"),
    "nothing within the limit": ("--max-drop 1", LARGE_DROP, "give a larger --max-drop"),
    "no data": ("--data-dir nowhere", "", "'nowhere' does not exist"),
    "a bad flag": ("--samples none", "", "--samples none is not a whole number"),
    "one device": ("--device cuda:1", "", "--device cuda:1 is one device, but 2 processes"),
    "too few batches": ("--samples 3", "", "fewer batches (1) than there are processes (2)"),
}
Flags = Callable[..., list[str]]
Launched = dict[str, tuple[Path, list[int]]]


@pytest.fixture(scope="module")
def flags_of(tiny_folder: Tiny, tiny_data_dir: Path) -> Flags:
    """`flags_of(more="", output="two")`: the flags of a run."""

    def make(more: str = "", output: str = "two") -> list[str]:
        head = "question-answering" if "squad" in more else "sequence-classification"
        num_labels = 3 if "mnli" in more else 2
        model = tiny_folder(head=head, num_hidden_layers=3, num_labels=num_labels)
        size = "" if "--max-drop" in more else "--constraint 0.4"
        flags = f"--model {model} --task mrpc --data-dir {tiny_data_dir} {size} --device cpu"
        flags += f" --samples 33 --batch-size 3 --eval-limit 8 --output-dir {output} {more}"
        return flags.split()

    return make


@pytest.fixture(scope="module")
def launched(flags_of: Flags, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """By name the folder of a run of two processes, and their exit codes."""
    runs = {
        name: (more, LAYER_BY_LAYER if "layer by layer" in name else "")
        for name, more in CASES.items()
    }
    runs |= {name: (more, code) for name, (more, code, _) in ERRORS.items()}
    folders = [tmp_path_factory.mktemp(name.replace(" ", "-")) for name in runs]
    jobs = [
        {
            "folder": str(folder),
            "flags": flags_of(more),
            "before": UNTRAINED + code,
            "first": number == 0,
        }
        for number, (folder, (more, code)) in enumerate(zip(folders, runs.values(), strict=True))
    ]
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER],
        check=False,
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
    )
    codes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(codes) == len(jobs), done.stderr
    return dict(zip(runs, zip(folders, codes, strict=True), strict=True))


@pytest.fixture
def run_alone(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Callable[[list[str]], None]:
    """`run_alone(flags)`: run the command in this process, on one thread as the launched ones."""
    from rfprune.main import main

    monkeypatch.setattr("rfprune.latency.speedup.MAX_ROUNDS", 1)
    monkeypatch.setattr("rfprune.cli.run.below_baseline", lambda *_: None)
    for page in ("write_run_page", "write_family_page"):
        monkeypatch.setattr(f"rfprune.cli.outputs.{page}", lambda *_: None)

    def run(flags: list[str]) -> None:
        assert main(flags) == 0

    return run


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_result_of_one(
    name: str,
    launched: Launched,
    run_alone: Callable[[list[str]], None],
    flags_of: Flags,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, codes = launched[name]
    assert codes == [0, 0], (folder / "err-0").read_text() + (folder / "err-1").read_text()
    assert (folder / "out-1").read_text() == (folder / "err-1").read_text() == ""
    assert "Scoring the original" in (folder / "err-0").read_text()
    num_outputs = 2 if name == "family" else 1
    assert (folder / "out-0").read_text().count("pruned / original") == num_outputs

    monkeypatch.chdir(folder)
    run_alone(flags_of(CASES[name] + " --no-cache", output="one"))
    outputs = [path.parent.relative_to("one") for path in Path("one").rglob("model.safetensors")]
    assert len(outputs) == num_outputs
    for output in outputs:
        one, two = "one" / output, "two" / output
        reports = read_report(one), read_report(two)
        ratios = [
            [trial["ratio"] for trial in report.get("max_drop", {}).get("path", [])]
            for report in reports
        ]
        assert ratios[0] == ratios[1]
        assert len(ratios[0]) > 1 or name != "search"
        for entry in ("layers", "samples"):
            assert reports[0][entry] == reports[1][entry]
        masks, weights = (
            (load_file(one / file), load_file(two / file))
            for file in ("pruning/masks.safetensors", "model.safetensors")
        )
        for (a, b), exact in ((masks, "kwon" not in CASES[name]), (weights, False)):
            assert list(a) == list(b)
            for key in a:
                assert a[key].dtype == b[key].dtype == torch.float32
                torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-5)
                assert not exact or torch.equal(a[key], b[key])


@pytest.mark.parametrize("method", METHODS)
def test_the_cache_of_two_processes_serves_one(
    method: str,
    launched: Launched,
    run_alone: Callable[[list[str]], None],
    flags_of: Flags,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(launched[method][0])
    monkeypatch.setenv("RFPRUNE_CACHE", "cache")
    run_alone(flags_of(CASES[method], output="cached"))
    assert read_report(Path("cached"))["cached"] == ["collect", "evaluate"]


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_ends_both_processes_with_one_message(name: str, launched: Launched) -> None:
    """Whether one process meets it or both."""
    folder, codes = launched[name]
    if name == "a bug":  # with the traceback of the process that met it
        assert codes == [1, 2]
        return
    progress = ("Loading ", "Scoring ", "Pruning", "Tried ")
    texts = [(folder / f"err-{rank}").read_text() for rank in range(2)]
    errors = [line for text in texts for line in text.splitlines() if not line.startswith(progress)]
    assert codes == [2, 2], texts
    assert len(errors) == 1
    assert "rfprune: error:" in errors[0]
    assert ERRORS[name][2] in errors[0]
    assert not [path for path in folder.iterdir() if "two" in path.name], "nothing hidden either"


def launch(flags: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The command of the README. Without CUDA accelerate starts two processes with --multi_gpu."""
    launch = "-m accelerate.commands.accelerate_cli launch --multi_gpu --num_processes 2"
    usual = "--num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    return subprocess.run(
        [sys.executable, *launch.split(), *usual.split(), "-m", "rfprune.main", *flags],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def test_a_launcher_starts_a_run(flags_of: Flags, tmp_path: Path) -> None:
    done = launch(flags_of(), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pruned / original") == 1
    assert (tmp_path / "two" / "model.safetensors").is_file()


@pytest.mark.parametrize("flag", ["--samples none", "--data-dir nowhere"])
def test_under_a_launcher_an_error_is_printed_once(
    flag: str, flags_of: Flags, tmp_path: Path
) -> None:
    """Before torch is imported, and after. The launcher stops all processes when one has ended."""
    done = launch(flags_of(flag), tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("rfprune: error:") == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`three(rank)`: be one of three processes that do not exist."""

    def be(rank: int) -> None:
        monkeypatch.setattr(distributed, "_is_active", True)
        monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
        monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)

    return be


def test_every_batch_belongs_to_one_process(three: Callable[[int], None]) -> None:
    for num_batches in (3, 4, 5, 6, 100):
        dealt = []
        for rank in range(3):
            three(rank)
            assert len(distributed.steps(num_batches)) == -(-num_batches // 3)
            dealt += distributed.own_batches(num_batches)
        assert sorted(dealt) == list(range(num_batches))
    three(1)
    assert distributed.shard(["a", "b", "c", "d", "e"]) == ["b", "e"]
    assert not distributed.is_main()
    with pytest.raises(UserError, match=r"fewer batches \(2\) than there are processes \(3\)"):
        distributed.steps(2)


def test_a_process_alone_has_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    rows = torch.ones(2, 3)
    with distributed.process_group(torch.device("cpu")):
        assert (distributed.world_size(), distributed.rank(), distributed.is_main()) == (1, 0, True)
        assert distributed.steps(2) == [[0], [1]]
        assert distributed.shard("ab") == "ab"
        assert distributed.gather_rows(rows, [2], 0) == [rows]
        assert distributed.all_gather({1: "b", 0: "a"}) == ["a", "b"]
        assert distributed.broadcast_from_main(lambda: 3) == 3
        distributed.all_reduce(rows)
        distributed.barrier()
    assert torch.equal(rows, torch.ones(2, 3))
    for name in (None, "cpu", "cuda:1", "mps"):
        assert distributed.local_device(name) == name


@pytest.mark.parametrize("error", [None, UserError("no data")])
def test_a_process_group_of_the_caller_outlives_a_run(
    error: UserError | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script under `accelerate launch` goes on with its own collective calls."""
    monkeypatch.setenv("WORLD_SIZE", "2")  # as launched; the caller's group is of this process
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for _ in range(2):  # a second run in the same group reports its own error, too
            with contextlib.suppress(UserError), distributed.process_group(torch.device("cpu")):
                assert distributed.world_size() == 1
                if error:
                    raise error
            assert dist.is_initialized()
            assert error is None or error.on_one_process
        dist.all_reduce(torch.ones(1))
    finally:
        dist.destroy_process_group()


def test_each_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert distributed.local_device(None) == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert distributed.local_device(None) == distributed.local_device("cuda") == "cuda:1"
    assert distributed.local_device("cpu") == "cpu"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes were launched, but torch finds 1 CUDA"):
        distributed.local_device(None)


@pytest.mark.parametrize("method", METHODS)
def test_a_dispatched_model_can_be_collected_from(
    method: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    """accelerate's hooks move what enters a module to where its weights are."""
    from accelerate import dispatch_model

    batches = [tiny_batch(6, 7 + seed, seed=seed) for seed in range(3)]
    expected = prune(tiny_model(), batches, Constraint("mac", 0.5), Settings(method=method))
    model = tiny_model()
    places = {name: "cpu" for name, _ in model.bert.named_children() if name != "encoder"}
    places = {f"bert.{name}": place for name, place in places.items()}
    places |= dict.fromkeys(layout_of(model).layers, "cpu")
    places |= {"classifier": "cpu", "dropout": "cpu"}
    model = dispatch_model(model, device_map=places, force_hooks=True)
    assert hasattr(model.classifier, "_hf_hook")
    result = prune(model, batches, Constraint("mac", 0.5), Settings(method=method))
    assert result.layers == expected.layers
    for a, b in zip(result.masks, expected.masks, strict=True):
        assert torch.equal(a, b)
    weights = expected.model.state_dict()
    for name, weight in result.model.state_dict().items():
        assert torch.equal(weight, weights[name])
