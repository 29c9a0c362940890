"""A run of the command leaves page, plots and card, and uploads its output on request.

Without these tests a failed upload could remove the pruned model, and a wrong name or a missing
token be reported only after minutes of work.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rfprune import load_pruned
from rfprune.hub.upload import list_files
from rfprune.main import main
from rfprune.report.card import UNKNOWN_REPOSITORY
from rfprune.report.figures import error_curves, kept_per_layer, scores_by_stage
from rfprune.report.report_json import read_report
from tests.cli.test_main import SAVED, everything_here, flags, logits_of, refused
from tests.hub.stub_hub import StubHub

__all__ = ["flags", "refused"]  # fixtures

Flags = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def regular_files(request: pytest.FixtureRequest) -> None:
    """The storage of large files is beyond the stub."""
    if "hub" in request.fixturenames:
        request.getfixturevalue("hub").large = "no such ending"


@pytest.mark.parametrize("method", ["kwon", "curvature"])
def test_the_page_of_a_run_shows_its_curves_and_stages(
    method: str, flags: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = (kept_per_layer, error_curves, scores_by_stage)
    monkeypatch.setattr("rfprune.report.plots.RUN_FIGURES", drawn)
    assert main(flags(method=method, score_stages=True)) == 0
    report = read_report(Path("out"))
    assert [stage["stage"] for stage in report["stages"]] == ["original", "selected", "fitted"]
    assert report["stages"][0]["score"] == report["original"]["score"]
    assert report["stages"][2]["score"] == report["pruned"]["score"]
    assert report["stages"][2]["divergence"] == report["divergence"]
    assert report["original_layers"] == [{"heads": 4, "neurons": 12}] * 2
    assert len(report["curves"]) == 4
    names = {path.stem for path in Path("out/plots").iterdir()}
    assert names == {"kept", "curves", "stages"}
    page = Path("out/report.html").read_text(encoding="utf-8")
    assert page.count("<svg ") == len(names)
    assert "pruned to 50% of its MACs" in page


def test_report_and_card_of_a_run(flags: Flags) -> None:
    from huggingface_hub import ModelCard

    assert main(flags(method="kwon")) == 0
    report = read_report(Path("out"))
    assert report["stages"] == [], "only with --score-stages"
    assert all(len(curve["units"]) <= 64 for curve in report["curves"])
    assert Path("out/report.json").stat().st_size < 20_000, "people read it too"
    card = ModelCard.load("out/README.md")
    data: Any = card.data
    assert "base_model" not in data.to_dict(), "the base model is a local folder"
    (result, *_) = data.eval_results
    assert result.dataset_name == "mrpc (data from a local folder)"
    assert result.metric_type == "accuracy"
    assert result.metric_value == pytest.approx(report["pruned"]["score"] / 100)
    assert UNKNOWN_REPOSITORY in str(card)


def test_a_family_has_one_page(flags: Flags, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(constraint="0.7 0.4")) == 0
    page = Path("out/family-mac-seed-0.html")
    assert f"'{page}'" in capsys.readouterr().err
    text = page.read_text(encoding="utf-8")
    assert 'href="mac-0.7/report.html">70%</a>' in text
    assert 'href="mac-0.4/report.html">40%</a>' in text
    assert {path.name for path in Path("out").iterdir()} == {
        *("mac-0.7", "mac-0.4", page.name, "family-mac-seed-0-frontier-mrpc.png")
    }


def test_a_run_is_pushed_whole(flags: Flags, hub: StubHub, tmp_path: Path) -> None:
    assert main(flags(push_to_hub="someone/small", private=True)) == 0
    assert hub.commits == ["Pruned by rfprune"]
    assert hub.repositories == {"someone/small": True}
    assert {name.split("/")[0] for name in hub.files} == SAVED - {"plots"}
    assert hub.files == {
        name: (Path("out") / name).read_bytes() for name, _ in list_files(Path("out"))
    }
    assert 'name = "someone/small"' in hub.files["README.md"].decode()
    # What was uploaded is a model that works.
    for name, content in hub.files.items():
        path = tmp_path / "downloaded" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    there, here = load_pruned(tmp_path / "downloaded"), load_pruned("out")
    assert torch.equal(logits_of(there), logits_of(here))


def test_a_finished_run_is_pushed_by_the_same_command(
    flags: Flags, hub: StubHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(flags()) == 0
    monkeypatch.setattr("rfprune.cli.run.prune_to_each", None)  # there is nothing left to prune
    assert main(flags(push_to_hub="someone/small")) == 0
    assert 'name = "someone/small"' in hub.files["README.md"].decode()


def test_a_push_that_fails_keeps_the_model(
    flags: Flags,
    hub: StubHub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.answers = {"commit": 500, "info": 404}
    assert main(flags(push_to_hub="someone/small")) == 2
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    assert "error of its own (500)" in output.err.splitlines()[-1]
    assert "python scripts/push_to_hub.py out someone/small" in output.err
    assert "pruned / original" in output.out
    assert {path.name for path in Path("out").iterdir()} == SAVED
    load_pruned("out")


def test_a_dry_run_uploads_nothing(
    flags: Flags, hub: StubHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")  # none is needed
    assert main(flags(push_to_hub="someone/small", hub_dry_run=True)) == 0
    assert not hub.steps
    output = capsys.readouterr().err
    assert "Nothing was uploaded" in output
    assert "model.safetensors" in output
    assert 'name = "someone/small"' in Path("out/README.md").read_text(encoding="utf-8")


def test_a_card_that_fails_leaves_nothing(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no page")

    before = everything_here()
    monkeypatch.setattr("rfprune.cli.outputs.write_card", fail)
    with pytest.raises(RuntimeError, match="no page"):
        main(flags())
    assert everything_here() == before
