"""`scripts/benchmark_first_model.py`: clones, runs what it is told to, counts."""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_first_model.py"
INSTALL = "import pathlib; p = pathlib.Path('.venv'); p.mkdir(); (p / 'a').write_bytes(bytes(500))"
PRUNE = """
import os, pathlib
assert pathlib.Path('.venv/a').exists() and 'VIRTUAL_ENV' not in os.environ
assert pathlib.Path(os.environ['HOME']).parent == pathlib.Path.cwd().parent
out = pathlib.Path('outputs/demo/seed-0')
out.mkdir(parents=True)
(out / 'report.json').write_text('{"command": "rfprune"}')
(out / 'model.safetensors').write_bytes(bytes(2000))
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("benchmark_first_model", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A repository with one commit of one file."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "file").write_bytes(bytes(300))
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    return folder


def python(program: str) -> str:
    return shlex.join([sys.executable, "-c", program])


def test_seconds_and_bytes_are_counted(
    script: ModuleType, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIRTUAL_ENV", "of the one who measures")
    output = tmp_path / "result.json"
    flags = ["--source", str(source), "--output", str(output)]
    flags += ["--install-command", python(INSTALL), "--command", python(PRUNE)]
    assert script.main(flags) == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    seconds = result["seconds"]
    assert seconds["total"] == pytest.approx(sum(seconds[n] for n in ("clone", "install", "prune")))
    assert min(seconds.values()) > 0
    size = result["bytes"]
    assert (size["environment"], size["weights"]) == (500, 2000)
    assert size["model"] == 2000 + len('{"command": "rfprune"}')
    assert size["repository"] == size["history"] + 300
    assert result["run"]["command"] == "rfprune"
    assert len(result["commit"]) == 40
    assert script.main(flags) == 2, "an earlier measurement is not overwritten"


@pytest.mark.parametrize(
    ("install", "prune", "words"),
    [
        ("import sys; sys.exit('no pip')", PRUNE, "ended with 1: no pip"),
        (INSTALL, "pass", "left no model"),
    ],
)
def test_what_fails_is_one_sentence(
    install: str,
    prune: str,
    words: str,
    script: ModuleType,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "result.json"
    flags = ["--source", str(source), "--output", str(output)]
    flags += ["--install-command", python(install), "--command", python(prune)]
    assert script.main(flags) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not output.exists()
