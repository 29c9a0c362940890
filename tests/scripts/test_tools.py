"""The tools in `scripts/` stand alone: each imports rfprune, and no other script.

Without these tests a tool could stop working outside of the folder of the repository.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import extract_text

SCRIPTS = Path(__file__).parents[2] / "scripts"
TOOLS = sorted(SCRIPTS.glob("*.py"))
MEASUREMENTS = sorted(SCRIPTS.glob("bench/*.py"))


@pytest.mark.parametrize("path", TOOLS + MEASUREMENTS, ids=lambda path: path.stem)
def test_a_tool_imports_no_other_script(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "sys.path" not in text or path.stem == "harness"
    imported = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    modules = {str(node.module).split(".")[0] for node in imported}
    assert path in MEASUREMENTS or "scripts" not in modules


def test_the_readme_lists_every_tool_and_measurement() -> None:
    text = (SCRIPTS / "README.md").read_text(encoding="utf-8")
    assert all(f"scripts/{path.name}" in text for path in TOOLS)
    runnable = [path.stem for path in MEASUREMENTS if "__main__" in path.read_text("utf-8")]
    assert all(f"scripts.bench.{name}" in text for name in runnable)


def test_a_tool_runs_from_any_folder(tmp_path: Path) -> None:
    """evaluate.py also scores: run as a file, it has the name of the library that does."""
    command = [sys.executable, str(SCRIPTS / "evaluate.py")]
    flags = ["--model", "demo", "--task", "sst2", "--limit", "2", "--device", "cpu"]
    done = subprocess.run(
        [*command, *flags], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout


def test_texts_of_the_validation_split_are_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pandas as pd

    texts = {"validation": ["held out", "held out", " "], "train": ["held out", "a\nb", "c"]}
    for split, rows in texts.items():
        pd.DataFrame({"context": rows}).to_parquet(tmp_path / f"{split}.parquet")
    flags = [str(tmp_path), str(tmp_path / "text"), "--column"]
    assert extract_text.main([*flags, "context"]) == 0
    assert (tmp_path / "text" / "validation.txt").read_text() == "held out\n"
    assert (tmp_path / "text" / "train.txt").read_text() == "a\nb\n\nc\n"
    capsys.readouterr()
    assert extract_text.main([*flags, "missing"]) == 2
    message = capsys.readouterr().err
    assert "a column 'missing' cannot be read" in message
    assert "--column" in message
