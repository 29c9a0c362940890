"""A local hub, and a folder with the files of a run's output."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rfprune.report.card import write_card
from rfprune.report.report_json import write_report
from tests.hub.stub_hub import TOKEN, StubHub, stub_hub
from tests.report.conftest import make_report


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A folder with the files of a run's output, the weights but a few bytes."""
    folder = tmp_path / "output"
    (folder / "plots").mkdir(parents=True)
    report = make_report(output_dir=str(folder))
    write_report(report, folder)
    write_card(report, folder)
    (folder / "config.json").write_text("{}\n", encoding="utf-8")
    (folder / "modeling_rfprune.py").write_text("# code\n", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "plots" / "kept.png").write_bytes(b"\x89PNG not really")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    """A local hub that this process's hub library talks to, with the token it wants."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    with stub_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running
        close_session()
