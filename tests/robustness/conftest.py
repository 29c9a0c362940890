"""Good inputs and an empty working directory for the robustness tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rfprune.main import main
from tests.conftest import make_tiny_model, make_tiny_tokenizer, write_parquet
from tests.robustness.harness import Material, Place


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Models, data and a finished output."""
    material = Material(tmp_path_factory.mktemp("robustness") / "material")
    make_tiny_model().save_pretrained(material.model)
    make_tiny_model(head="none").save_pretrained(material.headless)
    for folder in (material.model, material.headless):
        make_tiny_tokenizer().save_pretrained(folder)
    for split, size in (("train", 24), ("validation", 12)):
        pairs = [
            {"sentence1": f"good film {i}", "sentence2": f"bad film {i % 5}", "label": i % 2}
            for i in range(size)
        ]
        questions = [
            {
                "id": str(i),
                "question": "what city ?",
                "context": f"the city of {i}",
                "answers": {"text": ["city"], "answer_start": [4]},
            }
            for i in range(size)
        ]
        write_parquet(material.data / "mrpc" / f"{split}.parquet", pairs)
        write_parquet(material.data / "squad" / f"{split}.parquet", questions)
    place = Place(material, material.root, material.root)
    with pytest.MonkeyPatch.context() as patch:
        _skip_slow_parts(patch)
        patch.setenv("RFPRUNE_CACHE", str(material.cache))
        assert main(place.flags(output_dir=material.finished)) == 0
    return material


def _skip_slow_parts(patch: pytest.MonkeyPatch) -> None:
    """Timing and figures are tested elsewhere."""
    patch.setattr("rfprune.latency.speedup.MAX_ROUNDS", 1)
    patch.setattr("rfprune.report.plots.RUN_FIGURES", ())
    # load_pruned leaves progress bars to transformers
    patch.setattr("transformers.utils.logging._tqdm_active", False)


@pytest.fixture
def place(material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """An empty working directory; home, temporary folder and cache lie beside it."""
    for name in ("home", "temporary", "here"):
        (tmp_path / name).mkdir()
    _skip_slow_parts(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("RFPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "here")
    before = material.contents()
    yield Place(material, tmp_path / "here", tmp_path)
    assert material.contents() == before, "the good inputs were changed"
    assert os.environ["HOME"] == str(tmp_path / "home")
