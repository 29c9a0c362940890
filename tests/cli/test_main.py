"""The command from end to end on tiny models: its files, and its one line when it fails.

Deleting this lets a bad input end in a traceback, or an interrupted run leave half a model.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from rfprune import load_pruned
from rfprune.cli import run
from rfprune.errors import RfpruneWarning
from rfprune.latency.profile import profile_latency
from rfprune.latency.table import LatencyTable
from rfprune.latency.timing import TimingBudget
from rfprune.main import main
from rfprune.model.checkpoint import load_masks
from rfprune.model.layout import layout_of
from rfprune.report.report_json import STAGES, read_report
from rfprune.settings import METHODS
from rfprune.tasks import evaluation
from tests.conftest import MODEL_TYPES, TinyFolder, write_parquet

Flags = Callable[..., list[str]]
Refused = Callable[[list[str]], str]
MonkeyPatch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]
SAVED = {
    *("config.json", "model.safetensors", "modeling_rfprune.py", "pruning"),
    *("tokenizer.json", "tokenizer_config.json", "report.json", "log.txt"),
    *("report.html", "README.md", "plots"),
}


@pytest.fixture
def flags(
    tiny_folder: TinyFolder,
    tiny_data_dir: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: MonkeyPatch,
) -> Flags:
    """`flags(task="mrpc", **changes)`: the flags of a small run; None takes a flag away.

    The current folder is an empty one, where the output goes to `out`.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RFPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    # Timing is tested elsewhere; here it would only take time.
    monkeypatch.setattr("rfprune.latency.speedup.MAX_ROUNDS", 1)
    # Tiny models are untrained, so they score below the most frequent label.
    monkeypatch.setattr("rfprune.cli.run.below_baseline", lambda *_: None)
    monkeypatch.setattr("rfprune.report.plots.RUN_FIGURES", ())

    def make(task: str = "mrpc", **changes: Any) -> list[str]:
        values: dict[str, Any] = {
            "model": tiny_folder(),
            "task": task,
            "data_dir": tiny_data_dir,
            "constraint": 0.5,
            "samples": 16,
            "batch_size": 8,
            "output_dir": "out",
        }
        values |= changes
        made = []
        for name, value in values.items():
            if value is not None:
                made.append("--" + name.replace("_", "-"))
                made += [] if value is True else str(value).split(" ")
        return made

    return make


@pytest.fixture
def refused(capsys: Capture) -> Refused:
    """`refused(flags)`: runs into exit code 2, one sentence and nothing written; the sentence."""

    def run_into_error(arguments: list[str]) -> str:
        before = everything_here()
        capsys.readouterr()
        assert main(arguments) == 2
        assert everything_here() == before
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "Traceback" not in printed.err
        *progress, last = printed.err.splitlines()
        assert last.startswith("rfprune: error: ")
        assert not any("error" in line for line in progress)
        return last.removeprefix("rfprune: error: ")

    return run_into_error


def raising(error: BaseException) -> Callable[..., None]:
    """A function that raises an error, to be put in the place of another."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def everything_here() -> set[str]:
    return {str(path) for path in Path().rglob("*")}


def logits_of(model: Any) -> torch.Tensor:
    batch = {"input_ids": torch.arange(5, 45).reshape(2, 20)}
    with torch.inference_mode():
        logits: torch.Tensor = model(**batch).logits
    return logits


def test_a_run_leaves_a_smaller_model_that_reloads(flags: Flags, capsys: Capture) -> None:
    assert main(flags()) == 0
    assert {path.name for path in Path("out").iterdir()} == SAVED
    assert {path.name for path in Path().iterdir()} == {"out"}
    report = read_report(Path("out"))
    with_code = AutoModelForSequenceClassification.from_pretrained("out", trust_remote_code=True)
    without = load_pruned("out")
    assert torch.equal(logits_of(with_code), logits_of(without))
    size = sum(parameter.numel() for parameter in without.parameters())
    assert size == report["pruned"]["params"] < report["original"]["params"]
    assert Path("out/model.safetensors").stat().st_size == report["pruned"]["bytes"]
    kept = [int((mask != 0).sum()) for mask in load_masks(Path("out")).values()]
    assert sum(kept) == sum(layer["heads"] + layer["neurons"] for layer in report["layers"])
    out = capsys.readouterr().out
    assert "pruned / original" in out
    assert 'from_pretrained("out", trust_remote_code=True)' in out


def test_the_report_has_its_schema(flags: Flags) -> None:
    arguments = [*flags(seed=3), "--method", "kwon"]
    assert main(arguments) == 0
    report = json.loads(Path("out/report.json").read_text(encoding="utf-8"))
    columns = {"score", "macs", "params", "bytes", "latency_ms"}
    assert set(report["original"]) == set(report["pruned"]) == columns
    assert set(report["achieved"]) == {"mac", "params", "memory", "latency"}
    assert set(report["seconds"]) == {"load", *STAGES, "evaluate", "prune_total"}
    for unused in ("depth", "verify", "sparsify"):  # stages that other flags need
        assert report["seconds"].pop(unused) == 0
    assert not [stage for stage, seconds in report["seconds"].items() if seconds <= 0]
    assert report["seconds"]["prune_total"] == pytest.approx(
        sum(report["seconds"].get(stage, 0) for stage in STAGES)
    )
    expected = {
        "schema": 1,
        "task": "mrpc",
        "method": "kwon",
        "metric": "mac",
        "constraint": 0.5,
        "seed": 3,
        "samples": 16,
        "device": "cpu",
        "dtype": "float32",
        "warnings": [],
        "metric_name": "accuracy",
        "output_dir": "out",
        "evaluated_examples": 24,
    }
    assert {name: report[name] for name in expected} == expected
    assert report["command"].startswith("rfprune --model ")
    assert report["divergence"] > 0
    assert 0 < report["achieved"]["mac"] <= 0.5
    assert all(set(layer) == {"heads", "neurons"} for layer in report["layers"])


@pytest.fixture
def quickly(monkeypatch: MonkeyPatch) -> None:
    """Time little: these tests check no latencies."""
    monkeypatch.setattr("rfprune.latency.profile.BUDGET", TimingBudget(0.5, 3))
    monkeypatch.setattr("rfprune.latency.speedup.RATIO_BUDGET", TimingBudget(0.0, 2))


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("method", METHODS)
def test_a_constraint_on_latency_is_promised_predicted_and_measured(
    flags: Flags, method: str
) -> None:
    arguments = flags(metric="latency", constraint=0.9, method=method)
    assert main(arguments) == 0
    report = read_report(Path("out"))
    promise, original = report["promise"], report["original"]["latency_ms"]
    assert promise["promised_ms"] == pytest.approx(0.9 * original)
    assert promise["measured_ms"] == report["pruned"]["latency_ms"]
    assert 1 <= len(promise["attempts"]) <= 4
    predictions = [attempt["predicted"] * original for attempt in promise["attempts"]]
    assert promise["predicted_ms"] in [pytest.approx(value) for value in predictions]
    assert all(attempt["predicted"] <= 0.9 * 1.001 for attempt in promise["attempts"])
    assert report["seconds"]["verify"] > 0
    table = LatencyTable.load(Path("out/latency_table.json"))
    assert table.conditions.batch_size == report["latency"]["batch_size"]


@pytest.mark.usefixtures("quickly")
def test_a_latency_table_is_used_at_its_own_shape(
    flags: Flags, tiny_folder: TinyFolder, capsys: Capture
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_folder())
    batch = {name: torch.ones(3, 11, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    profile_latency(model, layout_of(model), batch).save(Path("table.json"))
    arguments = flags(metric="latency", constraint=0.9, latency_table="table.json")
    assert main(arguments) == 0
    latency = read_report(Path("out"))["latency"]
    assert (latency["batch_size"], latency["sequence_length"]) == (3, 11)
    assert "Measuring" not in capsys.readouterr().err
    other = profile_latency(model.bfloat16(), layout_of(model), batch)
    other.save(Path("table.json"))
    assert main([*arguments, "--overwrite"]) == 2
    assert "dtype bfloat16, not float32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model_type", "method"), [*zip(MODEL_TYPES, itertools.cycle(METHODS), strict=False)]
)
def test_every_model_type_runs(
    method: str, model_type: str, flags: Flags, tiny_folder: TinyFolder
) -> None:
    assert main(flags(model=tiny_folder(model_type), method=method)) == 0
    report = read_report(Path("out"))
    assert report["method"] == method
    assert report["achieved"]["mac"] <= 0.5


@pytest.mark.parametrize(
    ("task", "head", "num_labels"),
    [
        ("sst2", "sequence-classification", 2),
        ("stsb", "sequence-classification", 1),
        ("mnli", "sequence-classification", 3),
        ("squad", "question-answering", 2),
        ("squad_v2", "question-answering", 2),
    ],
)
@pytest.mark.parametrize("use_labels", [None, True])
def test_every_kind_of_task_runs(
    task: str,
    head: str,
    num_labels: int,
    use_labels: bool | None,
    flags: Flags,
    tiny_folder: TinyFolder,
) -> None:
    model = tiny_folder("bert", head, num_labels=num_labels)
    assert main(flags(task, model=model, use_labels=use_labels)) == 0
    report = read_report(Path("out"))
    assert report["settings"]["use_labels"] is bool(use_labels)
    assert report["metric_name"] in report["scores"]["pruned"]


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("use_labels", [None, True])
def test_custom_data_runs(
    num_labels: int,
    use_labels: bool | None,
    flags: Flags,
    tiny_folder: TinyFolder,
    refused: Refused,
) -> None:
    """With its own columns and label names; the card names no dataset of the hub."""
    mine = Path("mine")
    mine.mkdir()
    for split in ("train", "validation"):
        labels = [row / 2 if num_labels == 1 else f"label {row % 3}" for row in range(16)]
        lines = [f"good film {row},a plot {row},{label}\n" for row, label in enumerate(labels)]
        (mine / f"{split}.csv").write_text("".join(["one,two,verdict\n", *lines]))
    changes: dict[str, Any] = {
        "data_dir": "mine",
        "text_columns": "one two",
        "label_column": "verdict",
    }
    changes["model"] = tiny_folder(num_labels=num_labels)
    assert main(flags("custom", **changes, use_labels=use_labels)) == 0
    report = read_report(Path("out"))
    expected = {"spearmanr", "pearson"} if num_labels == 1 else {"accuracy", "f1_macro"}
    assert set(report["scores"]["pruned"]) == expected
    assert report["task"] == "custom"
    assert report["evaluated_examples"] == 16
    card = Path("out/README.md").read_text()
    assert "datasets:" not in card
    assert "model-index" not in card
    assert "--text-columns one two --label-column verdict" in card
    again = changes | {"text_columns": "three", "overwrite": True}
    assert "'three'" in refused(flags("custom", **again))
    (mine / "validation.csv").unlink()
    again["text_columns"] = "one two"
    assert "labelled examples" in refused(flags("custom", **again))


def test_a_checkpoint_in_half_precision_stays_in_it(
    flags: Flags,
    tiny_folder: TinyFolder,
    monkeypatch: MonkeyPatch,
) -> None:
    """As the demo's: config.json says float32, the file is float16. Else it would come out larger.

    What was scored is what is stored.
    """
    shutil.copytree(tiny_folder(), "half")
    weights = load_file("half/model.safetensors")
    halves = {name: weight.half() for name, weight in weights.items()}
    save_file(halves, "half/model.safetensors", metadata={"format": "pt"})
    assert main(flags(model="half")) == 0
    report = read_report(Path("out"))
    stored = load_file("out/model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float16}
    assert (report["dtype"], report["stored_dtype"]) == ("float32", "float16")
    assert report["pruned"]["bytes"] == Path("out/model.safetensors").stat().st_size
    assert report["original"]["bytes"] == 2 * report["original"]["params"]
    assert load_pruned("out").dtype == torch.float32

    assert main(flags(model="out", output_dir="again", constraint=0.9)) == 0
    again = read_report(Path("again"))
    assert again["original"]["score"] == report["pruned"]["score"]
    assert again["original"]["macs"] == pytest.approx(report["pruned"]["macs"])
    assert again["pruned"]["macs"] <= 0.9 * report["pruned"]["macs"]
    assert again["stored_dtype"] == "float16"
    load_pruned("again")

    with monkeypatch.context() as patch:
        patch.setattr("rfprune.checkpoints.precision.round_weights", lambda *_: False)
        assert main(flags(model="half", output_dir="large")) == 0
    report = read_report(Path("large"))
    assert "exceed the range of float16" in report["warnings"][0]
    assert report["stored_dtype"] == "float32"

    assert main(flags(model="half", output_dir="whole", dtype="float32")) == 0
    stored = load_file("whole/model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float32}


@pytest.mark.parametrize("constraint", [None, 0.6])
def test_zeros_are_set_and_reported(constraint: float | None, flags: Flags) -> None:
    """Without a constraint the output is an ordinary model, without code of its own."""
    assert main([*flags(constraint=constraint, sparsity="2:4", quiet=True)]) == 0
    report = read_report(Path("out"))
    assert report["constraint"] == constraint
    assert report["sparsity"]["density"] == pytest.approx(0.5)
    assert report["seconds"]["sparsify"] > 0
    assert Path("out", "modeling_rfprune.py").exists() == (constraint is not None)
    model = load_pruned("out")
    weights = [model.get_parameter(f"{one['path']}.weight") for one in report["sparsity"]["maps"]]
    assert sum(int((weight == 0).sum()) for weight in weights) == report["sparsity"]["zeros"] > 0


def test_two_rows_are_enough_to_run(flags: Flags) -> None:
    for split in ("train", "validation"):
        row = {"sentence1": "a good film", "sentence2": "a bad film", "label": 1}
        write_parquet(Path("data/mrpc") / f"{split}.parquet", [row, row])
    assert main(flags(data_dir="data")) == 0
    assert read_report(Path("out"))["samples"] == 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("metric", "small"), [("mac", 1e-9), ("params", 0.01)])
def test_a_constraint_that_cannot_be_met_is_found_before_any_work(
    metric: str,
    small: float,
    method: str,
    flags: Flags,
    refused: Refused,
    monkeypatch: MonkeyPatch,
) -> None:
    """Else the models of the other constraints would be written first."""
    arguments = flags(constraint=f"0.9 {small}", metric=metric, method=method)
    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate_original", None)
        sentence = refused(arguments)
    assert f"Constraint {small:g} on {metric} cannot be met" in sentence
    least = sentence.split("choose ")[1].split()[0]
    assert main(flags(constraint=least, metric=metric, method=method)) == 0
    layers = read_report(Path("out"))["layers"]
    assert sum(layer["heads"] + layer["neurons"] for layer in layers) >= 1


STEPS = {
    "curvature": (
        *("cli.run.load", "cli.run.calibration_batches", "cli.run.prepare_evaluation"),
        *("cli.run.evaluate_original", "stages.curvature._add_step", "methods.curvature.refit"),
        *("methods.allocation.allocate", "pruning.compact", "cli.run.measure"),
        *("cli.outputs.save_pruned", "cli.outputs.write_report", "cli.outputs.write_log"),
    ),
    "kwon": (
        *("methods.kwon.collect_gradients", "methods.kwon.rearrange", "methods.kwon.tune_scales"),
    ),
}


@pytest.mark.parametrize(
    ("method", "step"), [(method, step) for method, steps in STEPS.items() for step in steps]
)
def test_ctrl_c_leaves_no_partial_output(
    method: str,
    step: str,
    flags: Flags,
    monkeypatch: MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.setattr(f"rfprune.{step}", raising(KeyboardInterrupt()))
    assert main(flags(method=method)) == 130
    assert everything_here() == set()
    printed = capsys.readouterr().err
    assert "interrupted" in printed
    assert "Traceback" not in printed


def test_ctrl_c_while_libraries_are_imported_is_not_swallowed(tmp_path: Path) -> None:
    """A library that catches whatever happens in its imports, as several do."""
    (tmp_path / "datasets.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass\n"
    )
    flags = f"--model demo --task sst2 --constraint 0.5 --output-dir {tmp_path / 'out'}"
    done = subprocess.run(
        [sys.executable, "-m", "rfprune.main", *flags.split()],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 130
    assert done.stderr == "rfprune: interrupted; no partial output was left behind.\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), MemoryError()]
)
def test_too_little_memory_is_one_sentence(
    error: BaseException,
    flags: Flags,
    refused: Refused,
    monkeypatch: MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "evaluate_original", raising(error))
    assert "give a smaller --batch-size" in refused(flags())


def test_a_warning_is_printed_once(flags: Flags, monkeypatch: MonkeyPatch, capsys: Capture) -> None:
    prepare = evaluation.prepare_evaluation

    def warn_twice(*arguments: Any, **options: Any) -> Any:
        for _ in range(2):
            warnings.warn("[bold]odd[/bold] data", RfpruneWarning, stacklevel=1)
        return prepare(*arguments, **options)

    monkeypatch.setattr(run, "prepare_evaluation", warn_twice)
    assert main(flags()) == 0
    assert capsys.readouterr().err.count("warning: [bold]odd[/bold] data") == 1
    assert read_report(Path("out"))["warnings"] == ["[bold]odd[/bold] data"]


def test_a_bug_keeps_its_traceback(flags: Flags, monkeypatch: MonkeyPatch) -> None:
    """Only user errors are shortened to one sentence."""
    monkeypatch.setattr(run, "evaluate_original", raising(RuntimeError("bug")))
    with pytest.raises(RuntimeError, match="bug"):
        main(flags())
    assert everything_here() == set()


@pytest.mark.slow
def test_the_demo_runs_with_nothing_but_the_package(flags: Flags) -> None:
    arguments = flags("sst2", model="demo", data_dir=None, samples=64, eval_limit=200)
    assert main([*arguments, "--skip-tune"]) == 0
    report = read_report(Path("out"))
    assert report["original"]["score"] > 80
    assert report["achieved"]["mac"] <= 0.5


@pytest.mark.network
def test_an_alias_runs_from_the_hub(flags: Flags) -> None:
    """Needs the hub: RoBERTa and BERT have public checkpoints for MRPC."""
    arguments = flags(model="distilbert", task="sst2", data_dir=None, samples=64, eval_limit=200)
    assert main(arguments) == 0
    assert read_report(Path("out"))["original"]["score"] > 85
