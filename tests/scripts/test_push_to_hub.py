"""`scripts/push_to_hub.py`: a folder of an earlier run on the hub, or one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import push_to_hub as script
from tests.hub.conftest import hub, run_folder
from tests.hub.stub_hub import StubHub

__all__ = ["hub", "run_folder"]  # fixtures


def test_a_folder_is_pushed(
    hub: StubHub, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.large = "no such ending"
    assert script.main([str(run_folder), "someone/small", "--private"]) == 0
    assert hub.repositories == {"someone/small": True}
    assert "model.safetensors" in hub.files
    assert f"{hub.endpoint}/someone/small" in capsys.readouterr().out


def test_a_dry_run_asks_nobody(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    # No stub: the tests keep the real hub out, so that a request would fail.
    assert script.main([str(run_folder), "someone/small", "--private", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "Nothing was uploaded" in printed
    assert "private repository 'someone/small'" in printed
    assert "model.safetensors (0.01 MB)" in printed
    assert {path: path.read_bytes() for path in before} == before


def test_a_hub_that_refuses_is_one_sentence(
    hub: StubHub,
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.answers = {"create": 403, "info": 404}
    assert script.main([str(run_folder), "someone/small"]) == 2
    printed = capsys.readouterr().err
    assert "may not write there (403)" in printed
    assert printed.count("\n") == 1
    hub.steps.clear()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert script.main([str(run_folder), "someone/small"]) == 2
    assert "no token for the hub" in capsys.readouterr().err
    assert not hub.steps, "the hub is not asked without one"
