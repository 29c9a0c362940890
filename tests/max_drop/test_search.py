"""`--max-drop` from end to end on tiny models: the model that is saved is within the limit.

Without these tests, the search could save another model than the one it scored, collect statistics
for every trial, or leave half an output if no size is within the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rfprune import load_pruned
from rfprune.cost.constraint import Constraint
from rfprune.errors import UserError
from rfprune.main import main
from rfprune.pruning import prune_family
from rfprune.report.figures import max_drop_figure
from rfprune.report.report_json import read_report
from rfprune.stages.curvature import collect_curvature
from rfprune.tasks import evaluation
from rfprune.tasks.bootstrap import Drop
from rfprune.tasks.registry import get_task

Tiny = Callable[..., Any]
Batch = dict[str, Tensor]
Flags = Callable[..., list[str]]
ENTRIES = {"points", "drop", "standard_error", "sure", "path", "least_possible", "seconds"}


@pytest.fixture
def flags(
    tiny_folder: Tiny, tiny_data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Flags:
    """`flags(points, task="mrpc", more="")`: the flags of a small search in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RFPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("rfprune.latency.speedup.MAX_ROUNDS", 1)
    # Tiny models are untrained, so they score below the most frequent label.
    monkeypatch.setattr("rfprune.cli.run.below_baseline", lambda *_: None)
    monkeypatch.setattr("rfprune.report.plots.RUN_FIGURES", (max_drop_figure,))

    def make(points: float, task: str = "mrpc", more: str = "") -> list[str]:
        head = "question-answering" if task == "squad" else "sequence-classification"
        model = tiny_folder(head=head, num_labels=1 if task == "stsb" else 2)
        text = f"--model {model} --task {task} --data-dir {tiny_data_dir} --max-drop {points:g}"
        return f"{text} --samples 24 --batch-size 3 {more}".split()

    return make


@pytest.fixture
def collections(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per collection of statistics."""
    made: list[int] = []
    original = collect_curvature

    def counting(*arguments: Any, **options: Any) -> Any:
        made.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr("rfprune.methods.curvature.collect_curvature", counting)
    return made


@pytest.mark.parametrize(
    ("task", "points", "more"),
    [
        ("mrpc", 5, "--push-to-hub someone/small --hub-dry-run"),
        ("mrpc", 0.5, "--metric params"),
        ("stsb", 30, "--metric memory"),
        ("squad", 5, "--method importance"),
    ],
)
def test_the_saved_model_is_within_the_limit(
    task: str, points: float, more: str, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(points, task, f"{more} --output-dir out")) == 0
    shown = capsys.readouterr()
    report = read_report(Path("out"))
    found = report["max_drop"]
    assert set(found) == ENTRIES
    assert found["points"] == points
    drop = report["original"]["score"] - report["pruned"]["score"]
    assert found["drop"] == pytest.approx(drop)
    assert drop <= points + 1e-9
    assert report["achieved"][report["metric"]] <= report["constraint"] + 1e-4
    tried = {trial["ratio"]: trial for trial in found["path"]}
    assert len(tried) == len(found["path"]) > 1
    assert tried[report["constraint"]]["score"] == pytest.approx(report["pruned"]["score"])
    for trial in tried.values():
        assert trial["drop"] == pytest.approx(report["original"]["score"] - trial["score"])
        assert trial["divergence"] > 0
    assert shown.err.count("Tried ") == len(tried)
    assert "of the resampled validation sets" in " ".join(shown.out.split())
    assert load_pruned("out")
    assert ("someone/small" in shown.err) == ("someone/small" in more), "as for one constraint"


def test_statistics_are_collected_once_and_a_complete_search_is_skipped(
    flags: Flags, collections: list[int]
) -> None:
    assert main(flags(5)) == 0
    (output,) = Path("outputs").rglob("report.json")
    assert output.parent.parts[-2:] == ("mac-drop-5", "seed-0")
    assert len(read_report(output.parent)["max_drop"]["path"]) > 1
    assert len(collections) == 1
    before = output.stat().st_mtime_ns
    assert main(flags(5.0)) == 0
    assert output.stat().st_mtime_ns == before
    assert main(flags(5, more=f"--seed 1 --output-dir {output.parent}")) == 2
    assert main(flags(6)) == 0, "another limit has another output"
    assert len(collections) == 1, "read from the cache"


def test_if_nothing_is_lost_the_smallest_possible_model_is_saved(
    flags: Flags, tiny_folder: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(99, more="--output-dir out --metric params")) == 0
    report = read_report(Path("out"))
    assert report["constraint"] == report["max_drop"]["least_possible"]
    kept = sum(layer["heads"] + layer["neurons"] for layer in report["layers"])
    assert kept < 10, "of 32"
    assert report["max_drop"]["sure"] == 1.0
    pages = [Path("out", name).read_text() for name in ("report.html", "README.md")]
    for text in (capsys.readouterr().out, *pages):
        assert "No smaller model is possible" in text
    assert Path("out/plots/search.png").is_file()


def test_if_every_size_exceeds_the_limit_one_line_says_so_and_no_output_is_left(
    flags: Flags, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rfprune.max_drop.search.paired_drop", lambda *_: Drop(2.5, 0.7, 0.0))
    assert main(flags(1)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    last = shown.err.splitlines()[-1]
    for part in ("--max-drop 1 ", "0.95 of the MACs", "2.50", "0.70", "larger --max-drop"):
        assert part in last
    assert not Path("outputs").exists()


def batches_of(tiny_batch: Tiny) -> list[Batch]:
    return [tiny_batch(6, 7 + seed, seed=seed) for seed in range(3)]


def test_a_family_takes_the_next_constraint_after_it_has_yielded_a_result(
    tiny_model: Tiny, tiny_batch: Tiny, collections: list[int]
) -> None:
    order: list[str] = []

    def constraints() -> Iterator[Constraint]:
        for ratio in (0.7, 0.4):
            order.append(f"take {ratio}")
            yield Constraint("mac", ratio)

    family = prune_family(tiny_model(), batches_of(tiny_batch), constraints())
    order.extend(f"yield {result.ratio}" for result in family)
    assert order == ["take 0.7", "yield 0.7", "take 0.4", "yield 0.4"]
    assert len(collections) == 1


def test_an_impossible_constraint_of_a_list_is_refused_at_once_and_of_an_iterator_in_turn(
    tiny_model: Tiny, tiny_batch: Tiny, collections: list[int]
) -> None:
    given = [Constraint("mac", 0.5), Constraint("mac", 1e-9)]
    with pytest.raises(UserError, match="cannot be met"):
        next(prune_family(tiny_model(), batches_of(tiny_batch), given))
    assert not collections
    family = prune_family(tiny_model(), batches_of(tiny_batch), iter(given))
    assert next(family).constraint == given[0]
    with pytest.raises(UserError, match="cannot be met"):
        next(family)


@pytest.mark.parametrize("task", ["sst2", "stsb", "squad"])
def test_calibration_batches_have_logits_and_a_divergence(
    task: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    """Rows are in the order of the batches, and padding has no logits."""
    head = "question-answering" if task == "squad" else "sequence-classification"
    models = [
        tiny_model("bert", head, seed=s, num_labels=1 if task == "stsb" else 2) for s in (0, 1)
    ]
    batches = batches_of(tiny_batch)
    first, second = (
        evaluation.logits_of_batches(model, get_task(task), batches) for model in models
    )
    with torch.no_grad():
        expected = models[0](**batches[1])[0].numpy()
    rows = first[0][6:12]
    if task == "squad":
        tokens = batches[1]["attention_mask"].bool().numpy()
        for row, whole, kept in zip(rows, expected, tokens, strict=True):
            assert row[: kept.sum()] == pytest.approx(whole[kept], abs=1e-5)
            assert (row[kept.sum() :] == -float("inf")).all()
    else:
        assert rows == pytest.approx(expected, abs=1e-5)
    assert evaluation.divergence_of_logits(first, first) == 0.0
    assert evaluation.divergence_of_logits(first, second) > 0.01
