"""`scripts/compare.py`: several runs on one page, or one sentence that says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rfprune.report.report_json import write_report
from scripts import compare as script
from tests.report.conftest import make_report


@pytest.fixture
def run_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`run_at("a/b", **changes)`: a folder with a report."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        write_report(make_report(**changes), folder)
        return folder

    return make


def test_runs_are_put_on_one_page(
    run_at: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first = run_at("runs/mac-0.5/seed-0")
    second = run_at(
        "runs/mac-0.3/seed-0", constraint=0.3, achieved={"mac": 0.3, "params": 0.5, "latency": 0.4}
    )
    assert script.main([str(first), "runs/mac-0.3/seed-0", str(first)]) == 0
    assert capsys.readouterr().out == "Wrote compare.html\n"
    page = Path("compare.html").read_text(encoding="utf-8")
    assert page.count('<th scope="row">') == 2
    for part in ("mac-0.5", "mac-0.3", "30.0% of MACs", "78.90", "2 runs compared"):
        assert part in page, part
    assert f'<a href="{second.relative_to(Path.cwd()).as_posix()}/report.html">mac-0.3</a>' in page
    assert Path("compare-frontier-mrpc.png").is_file()


def test_an_earlier_page_is_replaced_only_if_asked_to(
    run_at: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run_at("run")
    for output, words in (("run", "is a folder"), ("none/page.html", "does not exist; create it")):
        assert script.main(["run", "--output", output]) == 2
        assert words in capsys.readouterr().err
    Path("page.html").write_text("mine", encoding="utf-8")
    assert script.main(["run", "--output", "page.html"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert Path("page.html").read_text(encoding="utf-8") == "mine"
    assert script.main(["run", "--output", "page.html", "--overwrite"]) == 0
    assert Path("page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "has no report.json"),
        ("", "is damaged"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"schema": 1}', "is damaged"),
        ('{"schema": 99}', "has schema 99"),
        (json.dumps(make_report(pruned=None)), "is damaged"),
        ("\x00\xff", "is damaged"),
    ],
)
def test_a_report_that_is_none_is_one_sentence(
    text: str | None,
    words: str,
    run_at: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    good, bad = run_at("good"), run_at("bad")
    (bad / "report.json").unlink()
    if text is not None:
        (bad / "report.json").write_text(text, encoding="utf-8")
    assert script.main([str(good), str(bad)]) == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.count("\n") == 1
    assert not list(Path().glob("compare*"))


def test_names_are_what_tells_runs_apart() -> None:
    def names(*paths: str) -> list[str]:
        found: list[str] = script.short_names([Path(path) for path in paths])
        return found

    assert names("/o/bert/mac-0.5/seed-0", "/o/bert/mac-0.3/seed-0") == ["mac-0.5", "mac-0.3"]
    assert names("/o/a/x/seed-0", "/o/b/y/seed-0") == ["a/x", "b/y"]
    assert names("/o/a") == ["a"]
    assert names("/o/a", "/o/a/b") == ["a", "a/b"]
    assert len(set(names("/o/a", "/p/a", "/o/b"))) == 3
