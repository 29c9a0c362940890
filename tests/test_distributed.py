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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from rfprune import distributed
from rfprune.cost.constraint import Constraint
from rfprune.errors import UserError
from rfprune.model.layout import layout_of
from rfprune.pruning import prune
from rfprune.report.report_json import read_report
from rfprune.settings import METHODS, Settings
from rfprune.stages.objective import batch_generator

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

NOT_FINITE = """
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

FAILURES = {
    "in the collection": NOT_FINITE.format(module="curvature", function="_add_step", rank=1),
    "in the main one": NOT_FINITE.format(module="curvature", function="_add_step", rank=0),
    "in the reconstruction": NOT_FINITE.format(module="reconstruct", function="_fit_block", rank=1),
    "in writing": "from rfprune.cli import run\nrun.measure = lambda *_, **__: 1 / 0",
    "a full disk": """
def full(*_, **__):
    raise OSError(28, "No space left on device")
from rfprune.cli import outputs
outputs.save_pruned = full
""",
}
NOTHING_WITHIN = """
from rfprune.max_drop import search
from rfprune.tasks.bootstrap import Drop
search.paired_drop = lambda *_: Drop(9.0, 1.0, 0.0)
"""
CASES: dict[str, dict[str, Any]] = {
    **{method: {"method": method, "task": "mrpc"} for method in METHODS},
    "two labels a row": {"method": "curvature", "task": "squad"},
    "two factors": {"method": "curvature", "task": "mnli"},
    "per batch": {"method": "kwon", "task": "mrpc", "more": "--gradients per-batch"},
    "rounds": {"method": "curvature", "task": "mrpc", "more": "--rounds 2"},
    "family": {"method": "curvature", "task": "mrpc", "more": "--constraint 0.7 0.4"},
    "even": {"method": "curvature", "task": "mrpc", "more": "--samples 29"},
    "search": {"method": "curvature", "task": "mrpc", "size": "--max-drop 30"},
}  # fmt: skip


def flags_of(
    folder: Path,
    data_dir: Path,
    method: str,
    task: str,
    more: str = "",
    output: str = "two",
    size: str = "--constraint 0.4",
) -> list[str]:
    options = f"--model {folder} --task {task} --data-dir {data_dir} {size}"
    options += f" --samples 33 --batch-size 3 --eval-limit 8 --output-dir {output}"
    return f"{options} --method {method} --device cpu {more}".split()


@pytest.fixture(scope="module")
def launched(
    tiny_folder: Tiny, tiny_data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, list[int]]]:
    """By the name of a case the folder of a run of two processes, and their exit codes."""
    jobs: list[dict[str, Any]] = []
    names: list[str] = []

    def add(name: str, flags: list[str], before: str = "") -> None:
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        names.append(name)
        first = not jobs
        jobs.append({"folder": str(folder), "flags": flags, "before": before, "first": first})

    for name, case in CASES.items():
        add(name, flags_of(model_of(tiny_folder, case["task"]), tiny_data_dir, **case))
    usual = flags_of(model_of(tiny_folder, "mrpc"), tiny_data_dir, "curvature", "mrpc")
    for name, before in FAILURES.items():
        add(name, usual, before)
    search = flags_of(
        model_of(tiny_folder, "mrpc"), tiny_data_dir, "curvature", "mrpc", size="--max-drop 1"
    )
    add("nothing within the limit", search, NOTHING_WITHIN)
    add("no data", [*usual, "--data-dir", "nowhere"])
    add("a bad flag", [*usual, "--samples", "none"])
    add("a device for two", [*usual, "--device", "cuda:1"])
    add("too few batches", [*usual, "--samples", "3"])
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
    return {
        name: (Path(job["folder"]), code)
        for name, job, code in zip(names, jobs, codes, strict=True)
    }


def model_of(tiny_folder: Tiny, task: str) -> Path:
    head = "question-answering" if task == "squad" else "sequence-classification"
    num_labels = 3 if task == "mnli" else 2
    folder: Path = tiny_folder(head=head, num_hidden_layers=3, num_labels=num_labels)
    return folder


@pytest.fixture
def run_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[str]], None]]:
    """`run_alone(flags)`: run the command in this process, on one thread as the launched ones."""
    from rfprune.main import main

    monkeypatch.setattr("rfprune.latency.speedup.MAX_ROUNDS", 1)
    for page in ("write_run_page", "write_family_page"):
        monkeypatch.setattr(f"rfprune.cli.outputs.{page}", lambda *_: None)

    def run(flags: list[str]) -> None:
        assert main(flags) == 0

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_result_of_one(
    name: str,
    launched: dict[str, tuple[Path, list[int]]],
    run_alone: Callable[[list[str]], None],
    tiny_folder: Tiny,
    tiny_data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, codes = launched[name]
    assert codes == [0, 0], (folder / "err-0").read_text() + (folder / "err-1").read_text()
    assert (folder / "out-1").read_text() == (folder / "err-1").read_text() == ""
    assert "Scoring the original" in (folder / "err-0").read_text()
    num_outputs = 2 if name == "family" else 1
    assert (folder / "out-0").read_text().count("pruned / original") == num_outputs

    monkeypatch.chdir(folder)
    case = CASES[name]
    flags = flags_of(model_of(tiny_folder, case["task"]), tiny_data_dir, **case, output="one")
    run_alone([*flags, "--no-cache"])
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
        masks = load_file(one / "masks.safetensors"), load_file(two / "masks.safetensors")
        weights = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
        for (a, b), exact in ((masks, case["method"] != "kwon"), (weights, False)):
            assert list(a) == list(b)
            for key in a:
                assert a[key].dtype == b[key].dtype == torch.float32
                torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-5)
                assert not exact or torch.equal(a[key], b[key])


@pytest.mark.parametrize("method", METHODS)
def test_the_cache_of_two_processes_serves_one(
    method: str,
    launched: dict[str, tuple[Path, list[int]]],
    run_alone: Callable[[list[str]], None],
    tiny_folder: Tiny,
    tiny_data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(launched[method][0])
    monkeypatch.setenv("RFPRUNE_CACHE", "cache")
    model = model_of(tiny_folder, "mrpc")
    run_alone(flags_of(model, tiny_data_dir, method, "mrpc", output="cached"))
    assert read_report(Path("cached"))["cached"] == ["collect", "evaluate"]


ERRORS = {
    **dict.fromkeys(FAILURES, "Something is wrong in process"),
    "a full disk": "No space left",
    "nothing within the limit": "give a larger --max-drop",
    "no data": "'nowhere' does not exist",
    "a bad flag": "--samples none is not a whole number",
    "a device for two": "--device cuda:1 is one device, but 2 processes were launched",
    "too few batches": "fewer batches (1) than there are processes (2)",
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_ends_both_processes_with_one_message(
    name: str, launched: dict[str, tuple[Path, list[int]]]
) -> None:
    """Whether one process meets it or both."""
    folder, codes = launched[name]
    if name == "in writing":  # a bug, with the traceback of the process that met it
        assert codes == [1, 2]
        return
    progress = ("Loading ", "Scoring ", "Pruning", "Tried ")
    texts = [(folder / f"err-{rank}").read_text() for rank in range(2)]
    errors = [line for text in texts for line in text.splitlines() if not line.startswith(progress)]
    assert codes == [2, 2], texts
    assert len(errors) == 1
    assert "rfprune: error:" in errors[0]
    assert ERRORS[name] in errors[0]
    assert not [path for path in folder.iterdir() if "two" in path.name], "nothing hidden either"


def launch(flags: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The line of the README. Without CUDA accelerate asks for --multi_gpu to start two at all."""
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


def test_a_launcher_starts_a_run(tiny_folder: Tiny, tiny_data_dir: Path, tmp_path: Path) -> None:
    flags = flags_of(model_of(tiny_folder, "mrpc"), tiny_data_dir, "curvature", "mrpc")
    done = launch(flags, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pruned / original") == 1
    assert (tmp_path / "two" / "model.safetensors").is_file()


@pytest.mark.parametrize("flag", ["--samples none", "--data-dir nowhere"])
def test_under_a_launcher_an_error_is_printed_once(
    flag: str, tiny_folder: Tiny, tiny_data_dir: Path, tmp_path: Path
) -> None:
    """Before torch is imported, and after. The launcher stops all processes when one has ended."""
    flags = flags_of(model_of(tiny_folder, "mrpc"), tiny_data_dir, "curvature", "mrpc")
    done = launch([*flags, *flag.split()], tmp_path)
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


def test_labels_are_drawn_by_batch() -> None:
    """The labels of a batch depend on no other batch, so every process may draw them."""

    def draw(seed: int, batch: int) -> Tensor:
        return torch.randint(0, 1 << 30, (4,), generator=batch_generator(seed, batch))

    assert torch.equal(draw(1, 2), draw(1, 2))
    drawn = {tuple(draw(seed, batch).tolist()) for seed in range(3) for batch in range(3)}
    assert len(drawn) == 9
    draw(2**63 - 1, 10**6)


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


def test_an_offloaded_model_is_refused(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    from accelerate import cpu_offload

    model = cpu_offload(tiny_model(), execution_device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"'bert\..*weight' is offloaded.*load the model"):
        prune(model, [tiny_batch()], Constraint("mac", 0.5))
